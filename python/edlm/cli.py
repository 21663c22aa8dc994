"""The command line: ``edlm demo | train | sample | eval | bench | info``."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__

if TYPE_CHECKING:
    import torch

    from .models import CausalLM, DiT
    from .samplers import SampleOutput

EXAMPLES = {
    "demo": "edlm demo                 # trains two tiny models in a few minutes, then decodes with both",
    "train": """edlm train examples/configs/tiny_dit.toml --out runs/denoiser
edlm train examples/configs/tiny_causal.toml --out runs/ar --set steps=2000 --set optim.lr=1e-3
The same command resumes a run that was stopped, wherever that was. Keys are those of the TOML file.""",
    "sample": """edlm sample runs/denoiser/model --num 2 --length 128 --steps 32
edlm sample runs/denoiser/model --energy runs/ar/model --window 0 1 --num-candidates 16
edlm sample runs/denoiser/model --prompt "it is a truth ____________ acknowledged"
In a prompt _ is a character to be filled in. Low energy is good; ESS says how many of the K candidates count.""",
    "eval": """edlm eval runs/denoiser/model           # NELBO: an upper bound of the negative log-likelihood
edlm eval runs/ar/model                 # exact negative log-likelihood
edlm eval runs/denoiser/model --text book.txt --json""",
    "bench": """edlm bench ops                        # the headline cases of every family, about a minute
edlm bench ops --family sampling --full
edlm bench ops --full --json results.json
edlm bench ops --markdown results.json  # the tables and the verdict of that file
Times are medians of interleaved rounds, beside a read-only pass over the same logits.""",
    "info": "edlm info                 # versions, and what is compiled for which device and instruction set",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="edlm",
        description="Energy-based diffusion language models: train, sample and evaluate, on compiled kernels.",
        epilog="edlm COMMAND --help has examples. Start with: edlm demo",
    )
    parser.add_argument("--version", action="version", version=f"edlm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog="examples:\n  " + EXAMPLES[name].replace("\n", "\n  "),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    demo = add("demo", "train two tiny models on real text, decode MDLM and EDLM side by side, and let a judge compare them")
    demo.add_argument(
        "--out", default="runs/demo", help="folder of the models (default: %(default)s); finished ones are used again"
    )
    demo.add_argument("--denoiser-steps", type=int, default=700, help="training steps of the denoiser (default: %(default)s)")
    demo.add_argument(
        "--ar-steps", type=int, default=400, help="training steps of the autoregressive model (default: %(default)s)"
    )
    demo.add_argument("--num", type=int, default=96, help="texts to decode each way (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the decoding (default: %(default)s)")

    train = add("train", "train a denoiser or an autoregressive model from a TOML file")
    train.add_argument("config", help="TOML file; examples/configs has some to start from")
    train.add_argument("--out", required=True, help="folder of the run; a run that is there is resumed")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one key: a.b=c"
    )
    train.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    sample = add("sample", "decode text from a trained denoiser, with or without an energy")
    sample.add_argument("model", help="folder of a trained denoiser")
    sample.add_argument("--energy", metavar="MODEL", help="folder of a trained autoregressive model: its residual energy is used")
    sample.add_argument("--carry-over", action="store_true", help="score masked positions alone (EDLM-coAR)")
    sample.add_argument("--prompt", help="text with _ where characters are wanted; otherwise all is generated")
    sample.add_argument("--num", type=int, default=4, help="how many texts (default: %(default)s)")
    sample.add_argument("--length", type=int, help="tokens of each, without a prompt (default: 128)")
    sample.add_argument("--sampler", choices=("ancestral", "first_hitting"), default="ancestral", help="(default: %(default)s)")
    sample.add_argument("--steps", type=int, help="ancestral steps (default: 32)")
    sample.add_argument("--num-candidates", type=int, help="K (default: 8 with an energy)")
    sample.add_argument("--window", type=float, nargs=2, metavar=("LO", "HI"), default=(0.8, 1.0), help="energy iff LO < t <= HI")
    sample.add_argument("--energy-temperature", type=float, default=1.0, help="0 picks the lowest energy (default: %(default)s)")
    sample.add_argument("--temperature", type=float, default=1.0, help="of the proposal; 0 is greedy (default: %(default)s)")
    sample.add_argument("--top-k", type=int, help="keep the k most probable tokens")
    sample.add_argument("--top-p", type=float, help="keep the most probable tokens up to this mass")
    sample.add_argument("--min-p", type=float, help="keep tokens at least this likely, relative to the likeliest")
    sample.add_argument(
        "--seed", type=int, default=0, help="text n uses seed * num + n: two seeds share no text (default: %(default)s)"
    )
    sample.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    sample.add_argument("--json", action="store_true", help="print texts, tokens and all diagnostics as JSON")

    evaluate = add("eval", "the likelihood of text under a trained model, in nats, bits per character and perplexity")
    evaluate.add_argument("model", help="folder of a trained model")
    evaluate.add_argument("--text", default="bundled", help='a file, or "bundled" (the default: its test split)')
    evaluate.add_argument("--length", type=int, default=128, help="tokens of a window (default: %(default)s)")
    evaluate.add_argument("--windows", type=int, default=512, help="at most so many, spread over the text (default: %(default)s)")
    evaluate.add_argument("--steps", type=int, help="T-step NELBO instead of the continuous one (denoisers)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the Monte Carlo (default: %(default)s)")
    evaluate.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    evaluate.add_argument("--json", action="store_true", help="print JSON")

    bench = add("bench", "time the ops against eager and compiled torch, and say which of their performance claims are met here")
    bench.add_argument("suite", choices=("ops",), help="what to time")
    # The suite lies beside the rooms: by name, and an editable installation that is older than it lacks it.
    try:
        importlib.import_module("edlm.benchmarks.arguments").add_arguments(bench)
    except ModuleNotFoundError:
        bench.add_argument("ignored", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)

    info = add("info", "versions, what is compiled for which device and instruction set, and the flags of the build")
    info.add_argument("--json", action="store_true", help="print JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. A user's mistake is one line on stderr and code 2, never a traceback."""
    options = build_parser().parse_args(arguments)
    command = {"demo": _demo, "train": _train, "sample": _sample, "eval": _eval, "bench": _bench, "info": _info}[options.command]
    try:
        code = command(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read has left, as head does. What is still buffered goes nowhere, so that Python does not complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except (ValueError, OSError, FloatingPointError, OverflowError, MemoryError) as error:
        print(f"edlm: error: {' '.join(line.strip() for line in str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _interruptible(call: Callable[[], object]) -> int:
    from .train import Interrupted

    try:
        call()
    except Interrupted as stop:
        print(f"edlm: {stop}", file=sys.stderr)
        return 130
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return _interruptible(
        lambda: demo(
            options.out,
            denoiser_steps=options.denoiser_steps,
            ar_steps=options.ar_steps,
            num_samples=options.num,
            seed=options.seed,
        )
    )


def _train(options: argparse.Namespace) -> int:
    from .config import load
    from .train import TrainConfig, train

    config, device = load(options.config, TrainConfig, options.overrides), _device(options.device)

    def run() -> None:
        print(f"trained: {train(config, options.out, device=device, progress=not options.quiet)}")

    return _interruptible(run)


def _device(name: str | None) -> torch.device:
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("edlm has kernels for these two")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's own: no such name; no CUDA in this torch, or no such GPU
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device: expected cpu, or cuda or cuda:N where there is such a GPU, got {name!r} ({reason})"
        ) from None
    return device


def _model_folder(path: str) -> str:
    """As given, unless it is the run around a model."""
    inner = Path(path) / "model"
    if inner.is_dir() and not (Path(path) / "manifest.json").exists():
        raise ValueError(f"{path}: expected a model's folder, got that of its run; name {inner}")
    return path


def _sample(options: argparse.Namespace) -> int:
    import torch

    from .data import tokenizer_from
    from .models import ARResidualEnergy, CausalLM, DiT
    from .samplers import generate

    if options.carry_over and not options.energy:
        raise ValueError("--carry-over: it is a way to score with an energy, got none; give --energy as well, or leave it out")
    if options.num < 1:
        raise ValueError(f"--num: expected a number >= 1, got {options.num}")
    device = _device(options.device)
    denoiser = DiT.from_pretrained(_model_folder(options.model), device=device)
    tokenizer = tokenizer_from(denoiser.tokenizer_description)
    energy = None
    if options.energy:
        causal = CausalLM.from_pretrained(_model_folder(options.energy), device=device)
        if causal.vocab_size != denoiser.vocab_size - 1 or causal.tokenizer_description != denoiser.tokenizer_description:
            raise ValueError(
                f"--energy: expected a model with the denoiser's tokenizer {denoiser.tokenizer_description}, got "
                f"{causal.tokenizer_description}; the two must read the same ids"
            )
        energy = ARResidualEnergy(causal, options.carry_over, mask_token_id=denoiser.mask_token_id)
    if options.prompt is None:
        shape: dict[str, Any] = {"batch_size": options.num, "length": 128 if options.length is None else options.length}
    else:
        ids = torch.from_numpy(tokenizer.encode_prompt(options.prompt).astype("int64"))
        shape = {"prompt": ids.repeat(options.num, 1), "length": options.length}
    steps = options.steps if options.steps is not None or options.sampler != "ancestral" else 32
    sample = generate(
        denoiser,
        **shape,
        steps=steps,
        energy=energy,
        num_candidates=options.num_candidates,
        window=tuple(options.window),
        energy_temperature=options.energy_temperature,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        sampler=options.sampler,
        seed=options.seed * options.num,
        device=device,
        progress=not options.json and sys.stderr.isatty(),
    )
    texts = [tokenizer.decode(row) for row in sample.tokens.tolist()]
    if options.json:
        print(json.dumps(_plain(sample, texts), allow_nan=False))
        return 0
    for text in texts:
        print(text)
    used = sample.ess[~sample.ess.isnan()]
    ess = f", ESS {float(used.mean()):.2f} on average" if used.numel() else ""
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in sample.stage_seconds.items() if value > 0)
    print(f"# {sample.nfe} denoiser calls, {sample.energy_nfe} energy calls{ess}; {seconds}", file=sys.stderr)
    return 0


def _plain(sample: SampleOutput, texts: list[str]) -> dict[str, Any]:
    """Everything as JSON values; NaN, where a sequence had no part in a step, becomes null."""

    def table(values: torch.Tensor) -> list[list[float | None]]:
        return [[_number(x) for x in row] for row in values.tolist()]

    return {
        "texts": texts,
        "tokens": sample.tokens.tolist(),
        "nfe": sample.nfe,
        "energy_nfe": sample.energy_nfe,
        "step_times": table(sample.step_times),
        "ess": table(sample.ess),
        "log_Z": table(sample.log_Z),
        "stage_seconds": sample.stage_seconds,
    }


def _number(x: float) -> float | None:
    """JSON has no numbers that are not finite."""
    return x if math.isfinite(x) else None


def _load_any(path: str, device: torch.device) -> DiT | CausalLM:
    from . import checkpoint
    from .models import CausalLM, DiT

    kinds = {"dit": DiT, "causal_lm": CausalLM}
    kind = checkpoint.kind_of(_model_folder(path))
    if kind not in kinds:
        raise ValueError(
            f"{path}: expected a model ({', '.join(kinds)}), got a checkpoint of kind {kind!r}; name its run's model folder"
        )
    return kinds[kind].from_pretrained(path, device=device)


def _eval(options: argparse.Namespace) -> int:
    from .data import read_text, split, tokenizer_from, windows
    from .data.text import BUNDLED
    from .eval import ar_nll, nelbo, unigram_entropy

    if options.length < 1 or options.windows < 1:
        raise ValueError(f"--length, --windows: expected numbers >= 1, got {options.length}, {options.windows}")
    device = _device(options.device)
    model = _load_any(options.model, device)
    text = read_text(options.text)
    tokens = tokenizer_from(model.tokenizer_description).encode(split(text).test if options.text == BUNDLED else text)
    x0 = windows(tokens, options.length, options.windows).to(device)
    if model.kind == "dit":
        name = "NELBO (upper bound)" if options.steps is None else f"NELBO of {options.steps} steps (upper bound)"
        nats = nelbo(model, x0, steps=options.steps, seed=options.seed)
    elif options.steps is not None:
        raise ValueError(f"--steps: only a denoiser has a T-step bound, got a {model.kind}")
    else:
        name, nats = "AR NLL (exact)", ar_nll(model, x0)
    estimates = {name: nats, "bits per character": nats.bits_per_character(), "perplexity": nats.perplexity()}
    estimates["unigram entropy of the text"] = unigram_entropy(x0)
    if options.json:
        plain = {
            key: {"mean": _number(e.mean), "stderr": _number(e.stderr), "unit": e.unit, "sequences": e.count}
            for key, e in estimates.items()
        }
        print(json.dumps(plain, allow_nan=False))
        return 0
    print(f"{len(x0)} windows of {options.length} tokens; +- is one standard error over windows")
    for key, estimate in estimates.items():
        print(f"{key:32}{estimate}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    try:
        suite = importlib.import_module("edlm.benchmarks.suite")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("edlm.benchmarks"):
            raise
        raise ValueError(
            "bench: this installation has no benchmarks; install edlm again: pip install --no-build-isolation -e ."
        ) from None
    return suite.run(options)


def _info(options: argparse.Namespace) -> int:
    import torch

    from . import ops
    from .ops._library import LOADED

    try:
        from . import _build

        build = _build.info()
    except ImportError:
        build = None
    facts = {
        "edlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch cuda": torch.version.cuda or "none",
        "platform": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "package": list(sys.modules["edlm"].__path__),
        "libraries": {device: str(Path(path)) for device, path in LOADED.items()},
        "build": build,
        "ops": ops.backends(),
    }
    if options.json:
        print(json.dumps(facts, indent=1))
        return 0
    for key in ("edlm", "python", "torch", "torch cuda", "platform", "package"):
        print(f"{key:12}{', '.join(facts[key]) if isinstance(facts[key], list) else facts[key]}")
    for device, path in facts["libraries"].items():
        print(f"{'library':12}{device}: {path}")
    if build is None:
        print(
            f"{'build':12}nothing is compiled: the pure-torch references run. Install with a C++20 compiler at hand: pip install ."
        )
    else:
        for key, value in build.items():
            print(f"{key.replace('_', ' '):18}{', '.join(value) if isinstance(value, list) else value}")
    print("ops" + "".join(f"\n  {op:28}cpu: {kinds['cpu']:12}cuda: {kinds['cuda']}" for op, kinds in facts["ops"].items()))
    return 0
