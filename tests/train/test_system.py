"""How a run computes: micro-batches, precision, compilation, recomputation. What is computed stays what it was."""

from __future__ import annotations

import json

import pytest
import torch
from edlm.models import DiT
from edlm.train import train, trainer
from edlm.train.distributed import World
from tiny_run import assert_same_weights, tiny_config, weights, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def run(folder, text, kind="dit", dropout=0.0, **system):
    config = tiny_config(kind, text, steps=12, batch_size=8, model={"dropout": dropout}, system=system)
    train(config, folder, progress=False)
    return losses(folder)


@pytest.mark.parametrize("kind", ["dit", "causal_lm"])
def test_gradients_add_up_to_those_of_the_whole_batch(tmp_path, text, kind):
    """Without dropout a batch of 8 is a batch of 8, in one piece or in four; losses to float32's rounding."""
    whole = run(tmp_path / "whole", text, kind)
    for size in (1, 2, 8):
        assert run(tmp_path / str(size), text, kind, micro_batch_size=size) == pytest.approx(whole, rel=2e-5)
    assert_same_weights(tmp_path / "8" / "model", tmp_path / "whole" / "model")


def test_a_micro_batch_has_its_own_dropout(tmp_path, text):
    """Else all of a batch's pieces would drop the same units; and the masks of two steps differ too."""
    seeds = {trainer._dropout_seed(seed, step, row) for seed in (0, 1) for step in range(10) for row in range(0, 8, 2)}
    assert len(seeds) == 80 and all(0 <= seed < 2**63 for seed in seeds)
    assert run(tmp_path / "a", text, dropout=0.5, micro_batch_size=2) != run(
        tmp_path / "b", text, dropout=0.5, micro_batch_size=4
    )
    assert run(tmp_path / "c", text, dropout=0.5, micro_batch_size=2) == losses(tmp_path / "a")


@pytest.mark.parametrize("kind", ["dit", "causal_lm"])
def test_activations_computed_again_are_the_same(tmp_path, text, kind):
    """Dropout included: torch's generator is put back before a block is computed again."""
    plain = run(tmp_path / "plain", text, kind, dropout=0.3)
    assert run(tmp_path / "again", text, kind, dropout=0.3, activation_checkpointing=True) == plain
    assert_same_weights(tmp_path / "again" / "model", tmp_path / "plain" / "model")


def test_activation_checkpointing_keeps_less():
    """Bytes that autograd saves for the backward, of 4 layers: the inputs of blocks instead of all inside them."""

    def saved(on):
        config = tiny_config("dit", "bundled", model={"num_layers": 4})
        model = config.model.build(vocab_size=28, mask_token_id=27, bos_token_id=27)
        model.transformer.checkpoint_activations = on
        total, parameters = 0, {p.data_ptr() for p in model.parameters()}

        def pack(tensor):
            nonlocal total
            total += 0 if tensor.data_ptr() in parameters else tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randint(0, 27, (4, 32)), torch.rand(4)).sum()
        return total

    assert saved(True) < saved(False) / 3


def test_bfloat16_learns_the_same_thing_with_float32_weights(tmp_path, text):
    """Products are rounded: the losses agree to 1 %, not to the last bits, and weights and losses are float32."""
    plain, cast = run(tmp_path / "plain", text), run(tmp_path / "cast", text, precision="bfloat16")
    assert cast == pytest.approx(plain, rel=1e-2) and cast != plain
    assert all(weight.dtype == torch.float32 for weight in weights(tmp_path / "cast" / "model").values())


def test_compiled_blocks_compute_the_same(tmp_path, text):
    plain = run(tmp_path / "plain", text)
    assert run(tmp_path / "compiled", text, compile=True) == pytest.approx(plain, rel=1e-4)
    DiT.from_pretrained(tmp_path / "compiled" / "model")  # under the names of the network that was not compiled


@pytest.mark.parametrize(
    ("batch", "micro", "size", "message"),
    [
        (8, None, 3, "batch_size: expected a multiple of the 3 processes, got 8"),
        (8, 4, 4, r"expected batch_size / micro_batch_size to be a multiple of the 4 processes, got 8 / 4 = 2"),
    ],
)
def test_processes_that_cannot_share_a_batch(batch, micro, size, message):
    config = tiny_config("dit", "bundled", batch_size=batch, system={} if micro is None else {"micro_batch_size": micro})
    with pytest.raises(ValueError, match=message):
        trainer._micro_batches(config, World(0, size, torch.device("cpu")))


def test_processes_share_the_rows_of_a_batch():
    config = tiny_config("dit", "bundled", batch_size=12, system={"micro_batch_size": 2})
    mine = [trainer._micro_batches(config, World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    assert [list(rows) for process in mine for rows in process] == [[i, i + 1] for i in range(0, 12, 2)]
    with pytest.raises(ValueError, match=r"system\.micro_batch_size: expected a divisor of batch_size 12, got 5"):
        tiny_config("dit", "bundled", batch_size=12, system={"micro_batch_size": 5})


def test_a_rate_that_drives_the_loss_out_of_range_stops_the_run(tmp_path, text):
    """For real: infinite weights, and an error that says at which step and which checkpoint is good."""
    config = tiny_config("dit", text, optim={"lr": 1e36, "warmup_steps": 0, "grad_clip": 1e30}, checkpoint_every=1)
    with pytest.raises(
        FloatingPointError, match=r"step \d+: the (loss|gradient) is not finite; lower optim\.lr.*(step_0|no checkpoint)"
    ):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "model").exists()


def test_subnormals_are_0_while_a_run_trains_and_what_they_were_afterwards(tmp_path, text, monkeypatch):
    seen = []
    real = trainer._means
    monkeypatch.setattr(trainer, "_means", lambda *a: seen.append(float(torch.tensor(1e-40) * 1)) or real(*a))
    run(tmp_path / "run", text)
    assert set(seen) == {0.0}
    assert float(torch.tensor(1e-40) * 1) > 0
