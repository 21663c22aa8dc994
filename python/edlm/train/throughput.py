"""How fast a run could be: the arithmetic of a training step, and what a device can do in a second."""

from __future__ import annotations

import re
import time
from typing import NamedTuple

import torch

_TERA = 1e12


class Peak(NamedTuple):
    """What a device can do at best."""

    flops: float  # floating-point operations a second
    source: str  # where the number is from, in words


class _Sheet(NamedTuple):
    """Dense figures of a data sheet, in teraflops: a sheet that prints them "with sparsity" has twice as much."""

    name: str  # a regular expression for what torch calls the device
    half: float  # bfloat16 and float16 on tensor cores, sums in float32
    tf32: float
    single: float  # float32 without tensor cores
    source: str


# The first that matches. A slice of a GPU (MIG) has "MIG" in its name and is in no sheet.
_SHEETS = (
    _Sheet(r"B200\b", 2250, 1100, 75, "NVIDIA HGX B200 specifications, a GPU"),
    _Sheet(r"H200 NVL\b", 835.5, 417.5, 60, "NVIDIA H200 data sheet, NVL"),
    _Sheet(r"H200\b", 989.5, 494.5, 67, "NVIDIA H200 data sheet, SXM"),
    _Sheet(r"H100 NVL\b", 835.5, 417.5, 60, "NVIDIA H100 data sheet, NVL"),
    _Sheet(r"H100 PCIe\b", 756.5, 378, 51, "NVIDIA H100 data sheet, PCIe"),
    _Sheet(r"H100\b", 989.5, 494.5, 67, "NVIDIA H100 data sheet, SXM"),
    _Sheet(r"A100\b", 312, 156, 19.5, "NVIDIA A100 data sheet"),
    _Sheet(r"\bL4$", 121, 60, 30.3, "NVIDIA L4 data sheet"),
    _Sheet(r"RTX 4090$", 165.2, 82.6, 82.6, "NVIDIA Ada GPU architecture white paper, appendix A"),
)


def flops_per_token(*, dim: int, num_layers: int, length: int, vocab_size: int, head_share: float = 1.0) -> float:
    """Floating-point operations of forward and backward for one token of a transformer of this package:

        6 N + 12 num_layers length dim,      N = 12 num_layers dim^2 + head_share vocab_size dim

    N counts the weights that multiply a token: 4 dim^2 for attention and 8 dim^2 for the MLP of each layer, and the output layer. A
    product takes 2 operations a weight forward and 4 backward. The rest is attention's two products of length x length. What is left
    out: embeddings (a look-up), the conditioning (once a sequence, not once a token), norms, softmax. A causal mask halves attention's
    useful work; like the source, this counts all of it.

    Args:
        dim, num_layers, vocab_size: of the model. length: L. head_share: the share of tokens that the output layer is run for: 1 for
            an autoregressive model; about 1/2 for a denoiser, whose head runs on masked rows.

    Raises:
        ValueError: sizes below 1, or a share outside [0, 1].

    Source: Chowdhery et al., arXiv 2204.02311 (PaLM), appendix B, with the output layer's rows counted.
    """
    for name, value in (("dim", dim), ("num_layers", num_layers), ("length", length), ("vocab_size", vocab_size)):
        if value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}")
    if not 0 <= head_share <= 1:
        raise ValueError(f"head_share: expected a share in [0, 1], got {head_share}")
    weights = 12 * num_layers * dim**2 + head_share * vocab_size * dim
    return 6 * weights + 12 * num_layers * length * dim


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> Peak:
    """What the device can do in a second at best, in products of that dtype.

    Of known GPUs it is the dense figure of the vendor's data sheet. Of everything else, CPUs included, it is measured: the fastest of
    the square products that fit in 50 ms, with torch's threads of that moment. A measured peak is what a product of that size reaches,
    not what the silicon could, and ``source`` says so.

    Args:
        device: "cpu" or a CUDA device. dtype: float32, bfloat16 or float16. float32 means TF32 where torch is allowed to use it
            (``torch.set_float32_matmul_precision``).

    Raises:
        ValueError: another dtype.

    RNG: none; the operands are constants.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype}")
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    tf32 = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    if "MIG" not in name:
        for sheet in _SHEETS:
            if name and re.search(sheet.name, name):
                tera = sheet.half if dtype != torch.float32 else sheet.tf32 if tf32 else sheet.single
                kind = "TF32" if tf32 else str(dtype).removeprefix("torch.")
                return Peak(tera * _TERA, f"{sheet.source}, dense {kind}")
    return _measured(device, dtype)


def _measured(device: torch.device, dtype: torch.dtype, seconds: float = 0.05) -> Peak:
    """The fastest product that was seen in so many seconds, and at least one after the first."""
    size = 4096 if device.type == "cuda" else 1024  # a GPU is not busy with less
    a = torch.full((size, size), 0.5, device=device, dtype=dtype)
    b, out = a.clone(), torch.empty_like(a)

    def product() -> float:
        begin = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    product()  # threads, libraries
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(product())
    kind = str(dtype).removeprefix("torch.")
    return Peak(2 * size**3 / min(times), f"measured: the fastest of {len(times)} {kind} products of {size} x {size}")


def mfu(tokens_per_second: float, flops_per_token: float, peak: Peak) -> float:
    """Model FLOPs utilisation, a share: ``tokens_per_second * flops_per_token / peak.flops``. For n devices scale the peak by n."""
    return tokens_per_second * flops_per_token / peak.flops
