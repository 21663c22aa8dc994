"""``edlm convert``: a model's folder in another precision."""

from __future__ import annotations

import argparse
from pathlib import Path

from .models import model_folder

HELP = "write a trained model again in another precision: bfloat16 takes half the room"
EXAMPLES = """edlm convert runs/denoiser/model small/denoiser --dtype bfloat16
The weights are rounded; what reads the folder computes in float32 as before."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder of a trained model, of any kind")
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16", help="(default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    import torch

    from .. import checkpoint, models

    if Path(options.out).exists():
        raise ValueError(
            f"out: expected the name of a new folder, got {options.out}, which is there; remove it or choose another"
        )
    kinds = {kind.kind: kind for kind in (models.DiT, models.CausalLM, models.NCEEnergy)}
    kind = checkpoint.kind_of(model_folder(options.model))
    if kind not in kinds:
        raise ValueError(f"{options.model}: expected a model ({', '.join(kinds)}), got a checkpoint of kind {kind!r}")
    model = kinds[kind].from_pretrained(options.model)
    model.save_pretrained(options.out, dtype=getattr(torch, options.dtype))
    print(f"written: {options.out}, {sum(p.numel() for p in model.parameters()):,} parameters as {options.dtype}")
    return 0
