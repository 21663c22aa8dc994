"""Training an energy by NCE: what it starts from, what it learns, what it writes, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from edlm.config import from_dict
from edlm.models import ARResidualEnergy, CausalLM, DiT, NCEEnergy
from edlm.samplers import generate
from edlm.train import TrainConfig, train
from tiny_run import CLOCKS, assert_same_weights, tiny_config, tiny_values, weights, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def networks(tmp_path_factory, text):
    """A denoiser that has learnt letters and little else, and an autoregressive model of the same text."""
    folder = tmp_path_factory.mktemp("networks")
    better = {"steps": 150, "batch_size": 16, "valid_every": 150, "optim": {"lr": 1e-2}, "model": {"dropout": 0.0}}
    train(tiny_config("dit", text, **better), folder / "dit", progress=False)
    train(tiny_config("causal_lm", text, **better), folder / "ar", progress=False)
    return {"dit": str(folder / "dit" / "model"), "ar": str(folder / "ar" / "model")}


def nce_config(networks, text, **changes) -> TrainConfig:
    values = tiny_values("nce_energy", text, **{"nce": {"proposal": networks["dit"]}} | changes)
    values["model"] = {"kind": values["model"]["kind"], "dropout": 0.1}  # the sizes are those of the networks that are there
    return from_dict(values, TrainConfig)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines(out)]


def test_it_starts_at_chance_and_learns(tmp_path, networks, text):
    """At the start E = 0: a loss of 2 ln 2 and an accuracy of a half. The words of the text are learnt within 300 steps."""
    config = nce_config(networks, text, steps=300, batch_size=16, valid_every=100, valid_windows=64, optim={"lr": 1e-2})
    model = train(config, tmp_path / "run", progress=False)
    rows = lines(tmp_path / "run")
    assert rows[0]["nce_loss"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert rows[0]["accuracy"] == 0.5 and rows[0]["energy_gap"] == 0
    last = rows[-1]
    assert last["valid_nce_loss"] + 3 * last["valid_nce_loss_stderr"] < 2 * math.log(2)
    assert last["valid_accuracy"] - 3 * last["valid_accuracy_stderr"] > 0.5 and last["valid_energy_gap"] > 0
    assert "valid_bits" not in last and "loss" not in last  # nats a row are no bits a character
    energy, denoiser = NCEEnergy.from_pretrained(model), DiT.from_pretrained(networks["dit"])
    assert energy.tokenizer_description == denoiser.tokenizer_description
    out = generate(denoiser, batch_size=3, length=16, steps=4, energy=energy, window=(0, 1), num_candidates=4)
    assert (out.ess < 4).any()


def test_the_proposal_is_not_trained(tmp_path, networks, text):
    before = {name: w.clone() for name, w in weights(networks["dit"]).items()}
    model = train(nce_config(networks, text, steps=10), tmp_path / "run", progress=False)
    assert all(torch.equal(before[name], w) for name, w in weights(networks["dit"]).items())
    trained = weights(model)
    assert not torch.equal(trained["vocab_embed.weight"], before["vocab_embed.weight"])
    assert "mlp" in " ".join(trained) and not any(name.startswith("frozen") for name in trained)


@pytest.mark.parametrize("step", [3, 14])
def test_a_run_goes_on_to_the_same_weights(tmp_path, networks, text, monkeypatch, step):
    from edlm.train.objectives import NceObjective

    config = nce_config(networks, text, nce={"proposal": networks["dit"], "num_negatives": 3})
    whole = train(config, tmp_path / "whole", progress=False)
    real = NceObjective.terms

    def terms(self, rows, n):
        if n == step:
            raise KeyError
        return real(self, rows, n)

    with monkeypatch.context() as patch:
        patch.setattr(NceObjective, "terms", terms)
        with pytest.raises(KeyError):
            train(config, tmp_path / "run", progress=False)
    assert_same_weights(train(config, tmp_path / "run", progress=False), whole)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize("carry_over", [False, True])
def test_an_autoregressive_residual_is_trained_by_the_same_loss(tmp_path, networks, text, carry_over):
    nce = {"proposal": networks["dit"], "start": networks["ar"], "carry_over": carry_over}
    config = nce_config(networks, text, model={"kind": "causal_lm"}, nce=nce, steps=20, valid_every=20, valid_windows=32)
    model = train(config, tmp_path / "run", progress=False)
    first, last = lines(tmp_path / "run")[0], lines(tmp_path / "run")[-1]
    assert first["accuracy"] > 0.5  # it knows something from the beginning
    assert last["valid_accuracy"] > 0.5
    causal = CausalLM.from_pretrained(model)
    assert (
        causal.config.dropout == 0.1 and CausalLM.from_pretrained(networks["ar"]).config.dropout == 0.0
    )  # what it was trained with
    assert any(not torch.equal(w, weights(networks["ar"])[name]) for name, w in weights(model).items())
    energy = ARResidualEnergy(causal, carry_over, mask_token_id=27)
    denoiser = DiT.from_pretrained(networks["dit"])
    generate(denoiser, batch_size=2, length=16, steps=2, energy=energy, window=(0, 1))


def test_samples_at_validation_use_the_energy(tmp_path, networks, text):
    train(nce_config(networks, text, steps=10, logging={"samples": 2, "sample_steps": 4}), tmp_path / "run", progress=False)
    (samples,) = [row["samples"] for row in lines(tmp_path / "run") if "samples" in row]
    assert len(samples) == 2 and all(len(sample) == 16 for sample in samples)


# --- what is refused --------------------------------------------------------------------------------------------------------------


def test_another_proposal_between_two_calls(tmp_path, networks, text, monkeypatch):
    """The same path, other weights: the run would go on with another target."""
    proposal = shutil.copytree(networks["dit"], tmp_path / "proposal")
    config = nce_config(networks, text, nce={"proposal": str(proposal)}, steps=14)
    train(config, tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "model")
    other = DiT.from_pretrained(proposal)
    with torch.no_grad():
        other.linear.bias[3] += 1
    other.save_pretrained(proposal)
    with pytest.raises(
        ValueError, match=r"nce: expected the text, tokenizer and networks that .* was trained on so far, got others"
    ):
        train(config, tmp_path / "run", progress=False)


def test_a_proposal_with_another_tokenizer(tmp_path, networks, text):
    denoiser = DiT.from_pretrained(networks["dit"])
    denoiser.save_pretrained(tmp_path / "bare", tokenizer={"kind": "other"})
    config = nce_config(networks, text, nce={"proposal": str(tmp_path / "bare")})
    with pytest.raises(ValueError, match=r"nce\.proposal: expected a network with the tokenizer of data\.tokenizer.*got .*other"):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("kind", ["nce_energy", "causal_lm"])
@pytest.mark.parametrize(
    "size", [{"dim": 64}, {"num_layers": 3}, {"preset": "mini"}, {"cond_dim": 99}, {"time_conditioning": True}]
)
def test_sizes_of_their_own_are_refused(networks, text, kind, size):
    """They would be recorded in the run, and not be so."""
    values = tiny_values(
        "dit", text, nce={"proposal": networks["dit"]} | ({"start": networks["ar"]} if kind == "causal_lm" else {})
    )
    values["model"] = {"kind": kind} | size
    with pytest.raises(ValueError, match=rf"model\.{next(iter(size))}: expected none with a table \[nce\]"):
        from_dict(values, TrainConfig)


def test_validation_draws_are_a_window_s_own(networks, text):
    """Its time and its proposals belong to the window, whatever other windows are validated beside it; and times are spread."""
    from edlm.train import objectives

    proposal = DiT.from_pretrained(networks["dit"])
    config = nce_config(networks, text)
    objective = objectives.objective_for(config, config.model.build_energy(proposal).eval(), 27, proposal)
    x0, seeds, seen = torch.randint(0, 27, (6, 16)), objective.valid_seed + torch.arange(6), []
    real = objective._per_row
    objective._per_row = lambda rows, step: seen.append(rows.times) or real(rows, step)
    with torch.no_grad():
        objective.validate(x0, seeds)
        objective.validate(x0[1::2], seeds[1::2])
    assert torch.equal(seen[0][1::2], seen[1])
    assert len(set(seen[0].tolist())) == 6 and seen[0].min() < 0.3 and seen[0].max() > 0.7


def test_under_autocast_log_mu_is_of_float32_logits(networks, text):
    """bfloat16 would err by as much as energies differ; hidden rows may be rounded, the head's products are not."""
    from edlm.diffusion import MaskedDiffusion, nce_batch, schedule

    proposal, x0 = DiT.from_pretrained(networks["dit"]), torch.randint(0, 27, (6, 16))
    dtypes, real = [], proposal.head
    proposal.head = lambda rows: dtypes.append(real(rows)) or dtypes[-1]
    with torch.autocast("cpu", torch.bfloat16):
        nce_batch(proposal, x0, MaskedDiffusion(schedule("log_linear"), 27), seed=0, times=0.9)
    assert all(logits.dtype == torch.float32 for logits in dtypes)
    assert any((logits != logits.bfloat16().float()).any() for logits in dtypes)


@pytest.mark.parametrize("path", ["nowhere", "text"])
def test_a_proposal_that_is_none(tmp_path, networks, text, path):
    bad = str(tmp_path / "nowhere") if path == "nowhere" else str(text)
    with pytest.raises((ValueError, FileNotFoundError), match=r"no such checkpoint|expected a checkpoint folder"):
        train(nce_config(networks, text, nce={"proposal": bad}), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="expected a checkpoint of kind 'dit', got 'causal_lm'"):
        train(nce_config(networks, text, nce={"proposal": networks["ar"]}), tmp_path / "run", progress=False)
