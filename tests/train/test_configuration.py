"""What a run's configuration accepts, and what it builds."""

from __future__ import annotations

import math

import pytest
from edlm.config import from_dict, to_dict
from edlm.models import PRESETS, CausalLM, DiT
from edlm.train import DataSpec, DiffusionSpec, ModelSpec, OptimSpec, TrainConfig

IDS = {"vocab_size": 28, "mask_token_id": 27, "bos_token_id": 27}


def test_a_round_trip():
    config = TrainConfig(
        model=ModelSpec(kind="causal_lm", preset="mini", dim=64, dropout=0.3),
        data=DataSpec(text="book.txt", length=32),
        optim=OptimSpec(lr=1e-3, betas=(0.8, 0.95), decay="linear"),
        diffusion=DiffusionSpec(schedule="cosine", eps=0.0),
        steps=7,
        seed=2**62,
    )
    assert from_dict(to_dict(config), TrainConfig) == config


@pytest.mark.parametrize("kind", ["dit", "causal_lm"])
@pytest.mark.parametrize("name", ["tiny", "mini"])
def test_a_preset_gives_the_sizes(kind, name):
    built = ModelSpec(kind=kind, preset=name).build(**IDS).config
    assert {key: getattr(built, key) for key in PRESETS[name]} == PRESETS[name]


def test_a_size_that_is_set_replaces_the_preset_s():
    before = dict(PRESETS["tiny"])
    built = ModelSpec(kind="dit", dim=32, num_heads=2, dropout=0.25, cond_dim=16, time_conditioning=True).build(**IDS)
    assert isinstance(built, DiT)
    assert (built.config.dim, built.config.num_heads, built.config.num_layers) == (32, 2, before["num_layers"])
    assert (built.config.dropout, built.config.cond_dim, built.config.time_conditioning) == (0.25, 16, True)
    assert PRESETS["tiny"] == before
    off = ModelSpec(kind="dit", preset="medium", dim=32, num_layers=1, dropout=0.0).build(**IDS)
    assert off.config.dropout == 0.0  # 0 is a value, not a blank


def test_vocabularies():
    """The denoiser counts the mask, the causal model predicts everything else."""
    dit, causal = (ModelSpec(kind=kind, dim=16, num_heads=2, num_layers=1).build(**IDS) for kind in ("dit", "causal_lm"))
    assert (dit.vocab_size, dit.mask_token_id) == (28, 27)
    assert isinstance(causal, CausalLM)
    assert (causal.vocab_size, causal.config.bos_token_id) == (27, 27)


BAD = [
    (ModelSpec, {"preset": "huge"}, "preset: expected one of tiny, mini"),
    (ModelSpec, {"dim": 0}, "dim: expected a number >= 1, got 0"),
    (ModelSpec, {"num_layers": -1}, "num_layers: expected a number >= 1, got -1"),
    (ModelSpec, {"num_heads": 0}, "num_heads: expected a number >= 1, got 0"),
    (ModelSpec, {"cond_dim": 0}, "cond_dim: expected a number >= 1, got 0"),
    (ModelSpec, {"dropout": 1.0}, r"dropout: expected a number in \[0, 1\), got 1.0"),
    (ModelSpec, {"dropout": math.nan}, "dropout: .* got nan"),
    (DataSpec, {"length": 0}, r"length: expected a number >= 1 \(3 with BOS and EOS\), got 0"),
    (DiffusionSpec, {"eps": 1.0}, r"eps: expected a number in \[0, 1\), got 1.0"),
    (DiffusionSpec, {"t_min": -0.1}, r"t_min: expected a number in \[0, 1\), got -0.1"),
    (OptimSpec, {"lr": 0.0}, "lr, warmup_steps, grad_clip: expected > 0, >= 0, > 0, got 0.0"),
    (OptimSpec, {"lr": math.nan}, "got nan"),
    (OptimSpec, {"lr": math.inf}, "got inf"),
    (OptimSpec, {"warmup_steps": -1}, "got 0.0003, -1"),
    (OptimSpec, {"grad_clip": 0.0}, "got 0.0003, 100, 0.0"),
    (OptimSpec, {"betas": (0.9, 1.0)}, r"betas\[1\]: expected a number in \[0, 1\), got 1.0"),
    (OptimSpec, {"betas": (-0.1, 0.9)}, r"betas\[0\]: .* got -0.1"),
    (OptimSpec, {"weight_decay": -1.0}, "weight_decay: expected a number >= 0, got -1.0"),
    (OptimSpec, {"final_lr_ratio": 1.5}, r"final_lr_ratio: expected a number in \[0, 1\], got 1.5"),
    (OptimSpec, {"ema_decay": 1.0}, r"ema_decay: expected a number in \[0, 1\), got 1.0"),
    *(
        (TrainConfig, {name: 0}, f"{name}: expected a number >= 1, got 0")
        for name in ("steps", "batch_size", "log_every", "valid_every", "valid_windows", "checkpoint_every", "keep_checkpoints")
    ),
    (TrainConfig, {"seed": -1}, r"seed: expected a number in 0 \.\. 2\*\*63 - 1, got -1"),
    (TrainConfig, {"seed": 2**63}, "seed: "),
]


@pytest.mark.parametrize(("kind", "values", "message"), BAD, ids=[f"{k.__name__}-{v}" for k, v, _ in BAD])
def test_what_is_out_of_range(kind, values, message):
    rest = {ModelSpec: {"kind": "dit"}, TrainConfig: {"model": ModelSpec(kind="dit")}}.get(kind, {})
    with pytest.raises(ValueError, match=message):
        kind(**rest, **values)
    kind(**rest)  # it was the value's fault


def test_choices_come_from_the_file_as_well():
    with pytest.raises(ValueError, match=r"model\.kind: expected one of 'dit', 'causal_lm', 'nce_energy', got 'gpt'"):
        from_dict({"model": {"kind": "gpt"}}, TrainConfig)
    with pytest.raises(ValueError, match=r"missing key model"):
        from_dict({}, TrainConfig)
    with pytest.raises(ValueError, match=r"unknown key optim\.learning_rate"):
        from_dict({"model": {"kind": "dit"}, "optim": {"learning_rate": 1.0}}, TrainConfig)
