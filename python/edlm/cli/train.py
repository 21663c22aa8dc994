"""``edlm train``: a TOML file to a trained model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from .models import device_named

HELP = "train a denoiser, an autoregressive model or an energy from a TOML file"
EXAMPLES = """edlm train examples/configs/tiny_dit.toml --out runs/denoiser
edlm train examples/configs/tiny_causal.toml --out runs/ar --set steps=2000 --set optim.lr=1e-3
edlm train examples/configs/tiny_nce.toml --out runs/nce       # from the denoiser in runs/denoiser
torchrun --nproc-per-node 2 -m edlm train examples/configs/tiny_dit.toml --out runs/two
The same command resumes a run that was stopped, wherever that was. Keys are those of the TOML file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="TOML file; examples/configs has some to start from")
    parser.add_argument("--out", required=True, help="folder of the run; a run that is there is resumed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override one key: a.b=c"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(options: argparse.Namespace) -> int:
    import torch

    from ..config import load
    from ..train import TrainConfig, train

    config, device = load(options.config, TrainConfig, options.overrides), device_named(options.device)

    def work() -> None:
        model = train(config, options.out, device=device, progress=not options.quiet)
        if torch.distributed.get_node_local_rank(fallback_rank=0) == 0:
            print(f"trained: {model}")

    return interruptible(work)


def interruptible(call: Callable[[], object]) -> int:
    from ..train import Interrupted

    try:
        call()
    except Interrupted as stop:
        print(f"edlm: {stop}", file=sys.stderr)
        return 130
    return 0
