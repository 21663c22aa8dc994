"""``edlm eval``: the likelihood of text under a trained model."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .models import device_named, load_any
from .printing import number

if TYPE_CHECKING:
    from ..data import Tokens

HELP = "the likelihood of text under a trained model, in nats, bits per character and perplexity"
EXAMPLES = """edlm eval runs/denoiser/model           # NELBO: an upper bound of the negative log-likelihood
edlm eval runs/ar/model                 # exact negative log-likelihood
edlm eval runs/denoiser/model --text book.txt --json
edlm eval runs/denoiser/model --text data/public_domain --split valid --length 256"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a trained model")
    parser.add_argument(
        "--text",
        default="bundled",
        help='a file, which is read whole; or, for one split, "bundled" (the default), a folder, a corpus',
    )
    parser.add_argument("--split", choices=("valid", "test", "train"), default="test", help="(default: %(default)s)")
    parser.add_argument(
        "--blocks",
        choices=("plain", "bos_eos"),
        default="plain",
        help="as the model was trained, data.blocks (default: %(default)s)",
    )
    parser.add_argument("--length", type=int, default=128, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=512, help="at most so many, spread over the text (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="T-step NELBO instead of the continuous one (denoisers)")
    parser.add_argument("--seed", type=int, default=0, help="of the Monte Carlo (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    from ..data import tokenizer_from, windows
    from ..eval import ar_nll, nelbo, unigram_entropy

    if options.length < 1 or options.windows < 1:
        raise ValueError(f"--length, --windows: expected numbers >= 1, got {options.length}, {options.windows}")
    device = device_named(options.device)
    model = load_any(options.model, device)
    tokenizer = tokenizer_from(model.tokenizer_description)
    frame, ends = None, hasattr(tokenizer, "eos_token_id")
    if options.blocks == "bos_eos":
        if not ends:
            raise ValueError("--blocks: expected a model whose tokenizer has an end of text for bos_eos, got text8")
        frame = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        tokens = _tokens(options.text, options.split, tokenizer, folder)
        x0 = windows(tokens, options.length, options.windows, frame=frame).to(device)
    characters = tokens.characters_per_token if ends else 1.0
    characters *= 1.0 if frame is None else (options.length - 2) / options.length
    if model.kind == "dit":
        name = "NELBO (upper bound)" if options.steps is None else f"NELBO of {options.steps} steps (upper bound)"
        nats = nelbo(model, x0, steps=options.steps, seed=options.seed)
    elif options.steps is not None:
        raise ValueError(f"--steps: only a denoiser has a T-step bound, got a {model.kind}")
    else:
        name, nats = "AR NLL (exact)", ar_nll(model, x0)
    estimates = {name: nats, "bits per character": nats.bits_per_character(characters), "perplexity": nats.perplexity()}
    estimates["unigram entropy of the text"] = unigram_entropy(x0)
    if options.json:
        plain = {
            key: {"mean": number(e.mean), "stderr": number(e.stderr), "unit": e.unit, "sequences": e.count}
            for key, e in estimates.items()
        }
        print(json.dumps(plain, allow_nan=False))
        return 0
    print(f"{len(x0)} windows of {options.length} tokens; +- is one standard error over windows")
    for key, estimate in estimates.items():
        print(f"{key:32}{estimate}")
    return 0


def _tokens(source: str, split: str, tokenizer: Any, folder: str) -> Tokens:
    """The tokens of a text as training would make them, in ``folder``. A file is one document, whatever the split."""
    from ..data import open_text, pack, read_text
    from ..data.corpora import CORPORA
    from ..data.text import BUNDLED

    named = source == BUNDLED or source in CORPORA
    documents = [read_text(source)] if not named and Path(source).is_file() else open_text(source).split(split)
    return pack(documents, tokenizer, Path(folder) / "tokens", source=source)
