"""save_pretrained and from_pretrained: what comes back, and which folders are refused."""

from __future__ import annotations

import pytest
import torch
from edlm import checkpoint
from edlm.models import CausalLM, CausalLMConfig, DiT, DiTConfig

X = torch.tensor([[0, 1, 4, 2], [4, 4, 3, 0]])
TOKENIZER = {"kind": "char", "alphabet": " äb"}


def network(kind=DiT, seed=0, **change):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 5, "dim": 16, "num_layers": 2, "num_heads": 2, "dropout": 0.3} | change
    if kind is DiT:
        model = DiT(DiTConfig(mask_token_id=4, cond_dim=8, time_conditioning=True, **sizes))
    else:
        model = CausalLM(CausalLMConfig(bos_token_id=7, **sizes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def answer(model):
    return model(X, torch.tensor([0.2, 0.8])) if isinstance(model, DiT) else model.log_probs(X)


@pytest.mark.parametrize("kind", [DiT, CausalLM])
def test_round_trip(tmp_path, kind):
    model = network(kind)
    model.save_pretrained(tmp_path / "m", tokenizer=TOKENIZER)
    assert checkpoint.kind_of(tmp_path / "m") == kind.kind
    loaded = kind.from_pretrained(tmp_path / "m")
    assert type(loaded) is kind and loaded.config == model.config and not loaded.training
    assert loaded.tokenizer_description == TOKENIZER
    assert torch.equal(answer(loaded), answer(model.eval()))
    assert not torch.equal(answer(loaded), answer(network(kind, seed=1).eval()))


def test_the_tokenizer_stays_with_its_network(tmp_path):
    """Through a second save as well; another one replaces it; without one there is None, on a new network too."""
    model = network()
    assert model.tokenizer_description is None
    model.save_pretrained(tmp_path / "none")
    assert DiT.from_pretrained(tmp_path / "none").tokenizer_description is None
    model.save_pretrained(tmp_path / "a", tokenizer=TOKENIZER)
    DiT.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = DiT.from_pretrained(tmp_path / "b")
    assert again.tokenizer_description == TOKENIZER
    again.save_pretrained(tmp_path / "c", tokenizer={"kind": "other"})
    assert DiT.from_pretrained(tmp_path / "c").tokenizer_description == {"kind": "other"}


def test_other_weights_are_written_in_place_of_its_own(tmp_path):
    model, average = network(), network(seed=1)
    model.save_pretrained(tmp_path / "m", weights=average.state_dict())
    assert torch.equal(answer(DiT.from_pretrained(tmp_path / "m")), answer(average.eval()))


def test_weights_that_could_not_be_read_back_are_not_written(tmp_path):
    model = network()
    model.save_pretrained(tmp_path / "m")
    good = model.state_dict()
    missing = {name: w for name, w in good.items() if name != "linear.bias"}
    for weights, name in (
        (missing, "linear.bias"),
        (good | {"surplus": torch.zeros(1)}, "surplus"),
        (good | {"linear.bias": torch.zeros(4)}, "linear.bias"),
    ):
        with pytest.raises(ValueError, match=rf"weights: expected the names and shapes of state_dict\(\), .* at {name}"):
            model.save_pretrained(tmp_path / "m", weights=weights)
    assert torch.equal(answer(DiT.from_pretrained(tmp_path / "m")), answer(model.eval()))


def test_another_kind_is_refused(tmp_path):
    network().save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"m: expected a checkpoint of kind 'causal_lm', got 'dit'"):
        CausalLM.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("fault", ["missing", "surplus", "shape", "none"])
def test_weights_of_another_configuration(tmp_path, fault):
    model = network()
    model.save_pretrained(tmp_path / "m")
    stored = checkpoint.load(tmp_path / "m")
    weights = dict(stored.tensors["model"])
    if fault == "missing":
        del weights["linear.bias"]
    elif fault == "surplus":
        weights["surplus"] = torch.zeros(1)
    elif fault == "shape":
        weights["linear.bias"] = torch.zeros(6)
    groups = {} if fault == "none" else {"model": weights}
    checkpoint.save(tmp_path / "m", kind="dit", meta=stored.meta, tensors=groups)
    with pytest.raises(ValueError, match=r"m: expected the weights of its own configuration, got others: "):
        DiT.from_pretrained(tmp_path / "m")


def test_a_configuration_that_this_version_does_not_know(tmp_path):
    model = network()
    model.save_pretrained(tmp_path / "m")
    stored = checkpoint.load(tmp_path / "m")
    for change, message in (
        ({"rope_base": 1}, r"m: unknown key rope_base"),
        ({"mask_token_id": 5}, r"m: mask_token_id: expected an id in 0 .. 4, got 5"),
        ({"dim": "16"}, r"m: dim: expected int, got '16'"),
    ):
        meta = stored.meta | {"config": stored.meta["config"] | change}
        checkpoint.save(tmp_path / "m", kind="dit", meta=meta, tensors=stored.tensors)
        with pytest.raises(ValueError, match=message):
            DiT.from_pretrained(tmp_path / "m")
    checkpoint.save(tmp_path / "m", kind="dit", meta={}, tensors=stored.tensors)
    with pytest.raises(ValueError, match=r"m: top level: expected a table, got None"):
        DiT.from_pretrained(tmp_path / "m")
