"""Rows from memory-mapped tokens, against the training step that they feed: data should never be what a run waits for.

``WindowDataset.batch`` over a token folder that ``pack`` wrote (its pages are in the page cache: this is not a test of a disk), and the
forward and backward of the small denoiser of step.py on rows of the same size. python benchmarks/training/loader.py --help
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import torch

if not __package__:  # run as a script: the checkout it lies in is the package that it belongs to
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    __package__ = "benchmarks.training"

from edlm.data import CharTokenizer, WindowDataset, open_tokens, pack

from ..harness import Variant
from ..session import Session
from .step import EDLM, TEXT8, Sizes, losses, network, step_of

OPS = ()
LARGEST = LARGEST_CUDA = 1 << 16  # of the session's pool of logits, which is not used here
CHARACTERS = 1 << 25  # more than a last-level cache of a laptop holds
BATCH, STEP = "WindowDataset.batch", "training step, DiT"
SMOKE = Sizes("tiny", 2, 8, 28, dim=16, layers=1, heads=2)


def documents(characters: int) -> list[str]:
    """Random words, a million characters a document."""
    letters, rest = random.Random(0), max(1, characters >> 20)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=letters.randint(2, 8))) for _ in range(1000)]
    size = min(characters, 1 << 20)
    return [" ".join(letters.choices(words, k=size // 6)) for _ in range(rest)]


def run(session: Session) -> None:
    sizes = SMOKE if session.smoke else TEXT8
    with tempfile.TemporaryDirectory() as folder:
        pack(documents(4096 if session.smoke else CHARACTERS), CharTokenizer(), Path(folder) / "tokens", source="random words")
        tokens = open_tokens(Path(folder) / "tokens")
        dataset = WindowDataset(tokens, sizes.length, sizes.batch, seed=session.inputs.generator.initial_seed())
        dataset.batch(0)  # the order of an epoch is drawn once for many batches
        model = network("DiT", sizes, session.device)
        loss = losses("DiT", model, sizes)[EDLM]
        n = sizes.batch * sizes.length
        size = n * (tokens.dtype.itemsize + torch.int64.itemsize)
        weights = 3 * sum(p.nbytes for p in model.parameters())
        variants = [
            Variant(BATCH, dataset.batch, size, wall=True),
            Variant(STEP, step_of(loss, list(model.parameters())), weights),
        ]
        session.measure(f"rows: {sizes.case}", variants, n=n, v=sizes.vocab, dtype=None, budget_s=1 if session.smoke else 20)
    for row in session.results[-len(variants) :]:
        row["tokens_per_second"] = 1e3 * n / row["median"]
        print(f"  {row['name']:<44}{row['tokens_per_second']:>14,.0f} tokens a second")


if __name__ == "__main__":
    from ..suite import script

    sys.exit(script("loader", __doc__))
