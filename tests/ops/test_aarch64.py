"""The baseline kernels compiled for aarch64 and run by an emulator: the tokens and log-probabilities of the references.

Wants a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user), and skips without.
"""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from edlm.ops.importance import _resample_reference, _select_reference
from edlm.ops.log_probs import _gather_backward_reference, _gather_reference
from edlm.ops.sampling import _sample_categorical_reference

ROOT = Path(__file__).parent.parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


def compiled(folder: Path, main: str, *families: str) -> Path:
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    sources = [ROOT / "tests" / "ops" / main, *(ROOT / "csrc" / "cpu" / f"{family}.cpp" for family in families)]
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-DEDLM_ISA=baseline", f"-I{ROOT / 'csrc'}", "-static"]
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(folder / "kernels")], check=True)
    return folder / "kernels"


def run(program: Path, x: torch.Tensor, *arguments: object) -> torch.Tensor:
    """The bytes that the program makes of x."""
    command = [EMULATOR, str(program), *map(str, arguments)]
    done = subprocess.run(command, input=x.view(torch.uint8).numpy().tobytes(), capture_output=True, check=True)
    return torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)


def parts(raw: torch.Tensor, *shapes: tuple[torch.dtype, tuple[int, ...]]) -> list[torch.Tensor]:
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in shapes]
    return [x.clone().view(dtype).view(shape) for x, (dtype, shape) in zip(raw.split(sizes), shapes, strict=True)]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("aarch64"), "kernels.cpp", "sampling", "log_probs")


@pytest.fixture(scope="module")
def importance_program(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("aarch64"), "importance_kernels.cpp", "importance")


@pytest.mark.parametrize("scheme", range(4))
@pytest.mark.parametrize("k", [1, 7, 64])
def test_importance(k, scheme, importance_program):
    batch = 6
    energy = torch.randn(batch, k) * 3
    real, whole = torch.float32, torch.int64
    index, log_weights, loo, ess, log_z, ancestors, xs = parts(
        run(importance_program, energy, batch, k, scheme),
        (whole, (batch,)), (real, (batch, k)), (real, (batch, k)), (real, (batch,)), (real, (batch,)),
        (whole, (batch, k)), (whole, (batch, k)),
    )  # fmt: skip
    seeds, offset = 5 + torch.arange(batch), torch.tensor([2])
    want = _select_reference(energy, 0.7, None, seeds, offset)
    assert torch.equal(index, want[0])
    for got, expected in zip((log_weights, ess, log_z, loo), want[1:5], strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6, equal_nan=True)
    assert torch.equal(ancestors, _resample_reference(-energy, scheme, seeds, offset)[0])
    opens = torch.arange(1, k + 1) / k >= 0.5
    assert torch.equal(xs, torch.where(opens, index[:, None], -1))


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (20, 0.9, 0.01)])
@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)])
@pytest.mark.parametrize("vocab_size", [27, 700, 5000])
def test_kernels(vocab_size, dtype, code, filters, program):
    n, k, temperature = 5, 12, 0.8
    logits = (torch.randn(n, vocab_size) * 3).to(dtype)
    tokens, log_probs, scores, grad = parts(
        run(program, logits, n, vocab_size, code, k, temperature, *filters),
        (torch.int64, (n, k)), (torch.float32, (n, k)), (torch.float32, (n, k)), (dtype, (n, vocab_size)),
    )  # fmt: skip
    mask = torch.tensor([vocab_size - 1])
    want = _sample_categorical_reference(
        logits, k, torch.full((n,), 3), temperature, *filters, mask, 5 + torch.arange(n), torch.tensor([2])
    )
    same = tokens == want[0]
    assert (~same).sum() <= 1
    torch.testing.assert_close(log_probs[same], want[1][same], atol=3e-6, rtol=1e-6)
    scored, stats, _ = _gather_reference(logits[None], tokens[None], 0.7, mask)
    torch.testing.assert_close(scores, scored[0], atol=4e-6, rtol=1e-6)
    expected = _gather_backward_reference(torch.ones(1, n, k), logits[None], tokens[None], stats, 0.7, mask)[0]
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(grad, expected, atol=max(tolerance / 10, 3e-5), rtol=tolerance)  # terms of 17 cancel
