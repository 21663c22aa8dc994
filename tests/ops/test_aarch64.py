"""The baseline kernels compiled for aarch64 and run by an emulator: the tokens and log-probabilities of the references.

Wants a cross compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user), and skips without.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from edlm.ops.log_probs import _gather_backward_reference, _gather_reference
from edlm.ops.sampling import _sample_categorical_reference

ROOT = Path(__file__).parent.parent.parent
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    for tool in (COMPILER, EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    out = tmp_path_factory.mktemp("aarch64") / "kernels"
    sources = [ROOT / "tests/ops/kernels.cpp", *(ROOT / "csrc/cpu" / f"{family}.cpp" for family in ("sampling", "log_probs"))]
    flags = ["-std=c++20", "-O3", "-fno-math-errno", "-fno-trapping-math", "-DEDLM_ISA=baseline", f"-I{ROOT / 'csrc'}", "-static"]
    subprocess.run([COMPILER, *flags, *map(str, sources), "-o", str(out)], check=True)
    return out


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (20, 0.9, 0.01)])
@pytest.mark.parametrize(("dtype", "code"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)])
@pytest.mark.parametrize("vocab_size", [27, 700, 5000])
def test_kernels(vocab_size, dtype, code, filters, program):
    n, k, temperature = 5, 12, 0.8
    logits = (torch.randn(n, vocab_size) * 3).to(dtype)
    done = subprocess.run(
        [EMULATOR, str(program), *map(str, (n, vocab_size, code, k, temperature, *filters))],
        input=logits.view(torch.uint8).numpy().tobytes(),
        capture_output=True,
        check=True,
    )
    raw = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8).split(
        [8 * n * k, 4 * n * k, 4 * n * k, logits.element_size() * n * vocab_size]
    )
    tokens, log_probs, scores, grad = (
        x.contiguous().view(kind).view(n, -1)
        for x, kind in zip(raw, (torch.int64, torch.float32, torch.float32, dtype), strict=True)
    )
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
