"""The arithmetic of a step against torch's own count; peaks by name; what is measured where there is no name."""

from __future__ import annotations

import pytest
import torch
from edlm.models import CausalLM, CausalLMConfig, DiT, DiTConfig
from edlm.train import throughput
from edlm.train.throughput import Peak, flops_per_token, mfu, peak_flops
from torch.utils.flop_counter import FlopCounterMode

SIZES = {"dim": 32, "num_layers": 2, "length": 24, "vocab_size": 50}


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call().backward()
    return counter.get_total_flops()


def test_a_causal_step_against_torchs_count():
    batch = 3
    model = CausalLM(CausalLMConfig(vocab_size=50, bos_token_id=0, dim=32, num_layers=2, num_heads=2, dropout=0.0))
    x0 = torch.randint(50, (batch, 24))
    # CPU attention is one operation that the counter does not know: what it consists of is.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = counted(lambda: model(x0).square().mean())
    wanted = batch * 24 * flops_per_token(**SIZES)
    # The first layer's input needs no gradient of the embedding by a product, and everything else is in the formula.
    assert found == pytest.approx(wanted, rel=0.005)


def test_a_denoiser_with_its_head_on_some_rows_against_torchs_count():
    batch, cond = 4, 8
    model = DiT(DiTConfig(vocab_size=50, mask_token_id=49, dim=32, num_layers=2, num_heads=2, dropout=0.0, cond_dim=cond))
    x0, t = torch.randint(49, (batch, 24)), torch.rand(batch)
    masked = torch.zeros(batch, 24, dtype=torch.bool)
    masked[:, :6] = True
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = counted(lambda: model.head(model.hidden(x0, t)[masked]).square().mean())
    wanted = batch * 24 * flops_per_token(**SIZES, head_share=0.25)
    # Once a sequence: the embedding of t and the modulation of every layer.
    condition = batch * 6 * (256 * cond + cond * cond + cond * 32 * (2 * 6 + 2))
    assert found == pytest.approx(wanted + condition, rel=0.01)


def test_a_known_figure():
    # GPT-2 small's shape: 85 M weights in its layers, 38.6 M in its head; 6 operations each, and attention over 1024 tokens.
    found = flops_per_token(dim=768, num_layers=12, length=1024, vocab_size=50257)
    assert found == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 1024 * 768
    assert mfu(1e6, 3e8, Peak(6e14, "")) == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["dim", "num_layers", "length", "vocab_size"])
def test_sizes_that_are_none(name):
    with pytest.raises(ValueError, match=f"{name}: expected a number >= 1, got 0"):
        flops_per_token(**SIZES | {name: 0})
    with pytest.raises(ValueError, match="head_share: expected a share"):
        flops_per_token(**SIZES, head_share=1.5)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989.5, 67),
        ("NVIDIA H100 PCIe", 756.5, 51),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.5, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_known_gpus(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(throughput, "_measured", lambda *a: pytest.fail("measured"))
    for dtype in (torch.bfloat16, torch.float16):
        peak = peak_flops("cuda", dtype)
        assert peak.flops == pytest.approx(half * 1e12) and "NVIDIA" in peak.source and "dense" in peak.source
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert peak_flops("cuda", torch.float32).flops == pytest.approx(single * 1e12)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    peak = peak_flops("cuda", torch.float32)
    assert single * 1e12 < peak.flops < half * 1e12 or name.endswith("4090")
    assert "TF32" in peak.source


@pytest.mark.parametrize("name", ["NVIDIA L40S", "NVIDIA L40", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 MIG 1g.10gb"])
def test_other_gpus_are_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(throughput, "_measured", lambda device, dtype: Peak(1.0, "measured"))
    assert peak_flops("cuda:0", torch.bfloat16) == Peak(1.0, "measured")


def test_a_cpu_is_measured_and_nothing_is_drawn():
    before = torch.get_rng_state()
    peak = peak_flops("cpu", torch.float32)
    assert 1e8 < peak.flops < 1e15 and peak.source.startswith("measured: the fastest of ") and "1024 x 1024" in peak.source
    assert torch.equal(before, torch.get_rng_state())
    with pytest.raises(ValueError, match="dtype: expected"):
        peak_flops("cpu", torch.int64)
