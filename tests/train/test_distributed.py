"""Two processes give what one gives: losses, weights, checkpoints. gloo, on the CPU."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from edlm import checkpoint
from edlm.eval import Estimate
from edlm.train.distributed import Shared, World, assign, joined, whole
from tiny_run import CLOCKS, assert_same_weights, tiny_values, toml, weights, write_text

TESTS = Path(__file__).parent.parent
STEPS = 12

# Starting python and torch takes seconds: one process starts, and forks the others before any of torch's threads exist.
DRIVER = """
import os, signal, sys, traceback
sys.path.insert(0, {tests!r})
import torch, torch.distributed as dist
import torch.distributed.checkpoint, torch.distributed.fsdp, torch._dynamo
from pathlib import Path
from edlm import checkpoint
from edlm.train import Interrupted, train, objectives, run
from tiny_run import tiny_config

torch.set_num_threads(1)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
folder, text = Path({folder!r}), {text!r}

done = []

class Stopped(Exception):
    pass

class Odd(ValueError):
    def __init__(self, *, detail):  # as it is, it cannot be built again on the other side
        super().__init__(detail)

def interrupt_the_second(rank):
    real, told = objectives.DiffusionObjective.terms, []
    def terms(self, rows, step):
        if rank == 1 and step == 5 and not told:
            told.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, rows, step)
    objectives.DiffusionObjective.terms = terms

def full_disk(rank):
    real = checkpoint.native._flush
    def flush(path):
        if path.name == "manifest.json" and "step_00000008" in str(path):
            raise OSError(28, "No space left on device", str(path))
        real(path)
    checkpoint.native._flush = flush

def odd_error(rank):
    def claim(out, config):
        raise Odd(detail="the first process says why")
    run.claim = claim

def worker(rank, size, out, kind, stop, changes):
    hook = changes.pop("hook", None)
    if hook is not None:
        hook(rank)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{{folder}}/store_{{len(done)}}", rank=rank, world_size=size)
    if stop is not None:
        for objective in (objectives.DiffusionObjective, objectives.CausalObjective, objectives.NceObjective):
            def terms(self, rows, step, real=objective.terms):
                if step == stop:
                    raise Stopped
                return real(self, rows, step)
            objective.terms = terms
    train(tiny_config(kind, text, **changes), folder / out, progress=False)

def go(size, out, kind, stop=None, wanted=0, **changes):
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                worker(rank, size, out, kind, stop, changes)
                code = 0
            except Stopped:
                code = 9
            except Interrupted:
                code = 130
            except (OSError, ValueError, RuntimeError) as error:
                os.write(1, f"{{rank}} {{type(error).__name__}} {{error}}\\n".encode())  # one piece, beside the other's
                code = 28
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    done.append(out)  # a store is used once: what an earlier group left in it would be taken for this one's
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    expected = wanted if stop is None else 9
    assert codes == [expected] * size, (out, codes)

base = dict(steps={steps}, batch_size=8, checkpoint_every=4, valid_every=4)
micro = {{"micro_batch_size": 2}}
fsdp = {{"micro_batch_size": 2, "parallel": "fsdp"}}
for kind in ("dit", "causal_lm"):
    go(1, kind + "_one", kind, **base, system=micro)
    go(2, kind + "_ddp", kind, **base, system=micro)
    go(2, kind + "_fsdp", kind, **base, system=fsdp)
nce = {{"proposal": str(folder / "dit_one" / "model")}}
for name, size, system in (("one", 1, micro), ("ddp", 2, micro), ("fsdp", 2, fsdp)):
    model = {{"kind": "nce_energy", "dim": None, "num_layers": None, "num_heads": None, "cond_dim": 128}}
    go(size, "nce_energy_" + name, "nce_energy", **base, system=system, nce=nce, model=model)
# Stopped after the checkpoint of step 8, and continued by another number of processes, sharded or not.
go(2, "two_then_one", "dit", 10, **base, system=fsdp)
go(1, "two_then_one", "dit", **base, system=micro)
go(1, "one_then_two", "dit", 10, **base, system=micro)
go(2, "one_then_two", "dit", **base, system=fsdp)
go(2, "sharded_twice", "dit", 10, **base, system=fsdp)
go(2, "sharded_twice", "dit", **base, system=fsdp)
# One of two is told to stop, or fails: both do, and for the same reason.
go(2, "told", "dit", **base, system=micro, wanted=130, hook=interrupt_the_second)
go(2, "told", "dit", **base, system=micro)
go(2, "full", "dit", **base, system=fsdp, wanted=28, hook=full_disk)
go(2, "full", "dit", **base, system=fsdp)
go(2, "odd", "dit", **base, system=fsdp, wanted=28, hook=odd_error)
go(2, "recomputed", "dit", **base, system=fsdp | {{"activation_checkpointing": True}})
"""


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    text = write_text(folder)
    program = DRIVER.format(tests=str(TESTS), folder=str(folder), text=str(text), steps=STEPS)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


def assert_agree(a, b, *, rel=1e-5):
    """The same steps, and every figure of each equal to ``rel``: losses are sums of float32 terms in another order."""
    ours, theirs = lines(a), lines(b)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(1, STEPS + 1))
    for x, y in zip(ours, theirs, strict=True):
        assert x.keys() == y.keys()
        for name in x.keys() - CLOCKS:
            assert x[name] == pytest.approx(y[name], rel=rel, abs=1e-6), (x["step"], name)
    for name, weight in weights(a / "model").items():
        torch.testing.assert_close(weight, weights(b / "model")[name], rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["dit", "causal_lm", "nce_energy"])
def test_two_processes_give_what_one_gives(runs, kind, parallel):
    """Dropout included: micro-batches of 2 rows have the same masks wherever they are computed."""
    assert_agree(runs / f"{kind}_one", runs / f"{kind}_{parallel}")


def test_the_comparison_can_fail(runs):
    with pytest.raises(AssertionError):
        assert_agree(runs / "dit_one", runs / "causal_lm_one")
    other = [row | {"loss": row["loss"] * 1.0001} for row in lines(runs / "dit_one")]
    assert other[3]["loss"] != pytest.approx(lines(runs / "dit_one")[3]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["two_then_one", "one_then_two", "sharded_twice"])
def test_a_checkpoint_goes_on_with_another_number_of_processes(runs, name):
    assert_agree(runs / "dit_one", runs / name)


def test_sharded_again_is_the_same_to_the_bit(runs):
    assert_same_weights(runs / "sharded_twice" / "model", runs / "dit_fsdp" / "model")


def test_one_that_is_interrupted_stops_both_and_they_go_on(runs):
    assert_same_weights(runs / "told" / "model", runs / "dit_ddp" / "model")


def test_an_error_of_one_is_the_error_of_both(runs):
    """A disk that is full while the manifest is written, and an error that does not survive the way between processes."""
    said = sorted((runs / "said.txt").read_text().splitlines())
    full = [line for line in said if "No space left on device" in line]
    assert [line.split()[:2] for line in full] == [["0", "OSError"], ["1", "OSError"]]
    assert_same_weights(runs / "full" / "model", runs / "dit_fsdp" / "model")
    odd = [line for line in said if "the first process says why" in line]
    assert [line.split()[:2] for line in odd] == [["0", "Odd"], ["1", "RuntimeError"]]


def test_activations_computed_again_are_the_same(runs):
    """With the same dropout masks, that is."""
    assert_agree(runs / "dit_fsdp", runs / "recomputed")


def test_a_sharded_checkpoint_has_every_process_s_part(runs):
    names = {p.name for p in (runs / "dit_fsdp" / "checkpoints" / "step_00000012").iterdir()}
    assert names == {"manifest.json", ".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert checkpoint.kind_of(runs / "dit_fsdp" / "checkpoints" / "step_00000012") == "trainer_sharded"
    assert {p.name for p in (runs / "dit_ddp" / "checkpoints" / "step_00000012").iterdir()} == {
        "manifest.json",
        "model.safetensors",
        "ema.safetensors",
        "optimizer.safetensors",
    }


# --- torchrun ---------------------------------------------------------------------------------------------------------------------


def torchrun(config, out, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "-m", "edlm", "train", str(config), "--out", str(out), "--device", "cpu", "--quiet"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the workers of torchrun are found in /proc")
def test_a_killed_worker_is_started_again_and_the_run_ends_with_the_same_weights(tmp_path):
    """SIGKILL of a random worker, twice, at random moments (seeded); torchrun starts both again, and they resume."""
    values = tiny_values(
        "dit", write_text(tmp_path), steps=60, batch_size=8, checkpoint_every=6, valid_every=30, system={"parallel": "fsdp"}
    )
    (tmp_path / "run.toml").write_text(toml(values))
    whole_run = torchrun(tmp_path / "run.toml", tmp_path / "whole", "--max-restarts", "3")  # gloo may fail to connect
    out, err = whole_run.communicate(timeout=240)
    assert whole_run.returncode == 0, err
    assert out.count("trained:") == 1

    luck = random.Random(5)
    process = torchrun(tmp_path / "run.toml", tmp_path / "killed", "--max-restarts", "3")
    checkpoints = tmp_path / "killed" / "checkpoints"
    for wanted in (12, 36):  # alive and somewhere beyond that step
        for _ in range(24_000):
            if checkpoints.exists() and any(int(p.name.removeprefix("step_")) >= wanted for p in checkpoints.glob("step_*")):
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        time.sleep(luck.uniform(0, 0.2))
        os.kill(luck.choice(children(process.pid)), signal.SIGKILL)
        time.sleep(0.5)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert_same_weights(tmp_path / "killed" / "model", tmp_path / "whole" / "model")
    assert [row["step"] for row in lines(tmp_path / "killed")] == list(range(1, 61))


# --- the parts --------------------------------------------------------------------------------------------------------------------


def test_alone_there_is_nothing_to_share():
    with joined("cpu") as world:
        assert world == World(0, 1, torch.device("cpu"))
        assert world.first(lambda: 3) == 3 and world.sum(torch.ones(2)).tolist() == [1, 1]
        net = torch.nn.Linear(2, 2)
        assert Shared(net, torch.nn.ModuleList(), world, "ddp").wrapped is net
        with pytest.raises(ValueError, match=r"system\.parallel: expected processes of torchrun with 'fsdp', got one by itself"):
            Shared(net, torch.nn.ModuleList(), world, "fsdp")
    tensor = torch.arange(3.0)
    assert whole(tensor) is tensor
    assign(tensor, torch.zeros(3))
    assert tensor.tolist() == [0, 0, 0]


def test_pooled_estimates_are_those_of_all_sequences(monkeypatch):
    """Sums over processes, here of two parts that one process holds."""
    values = torch.randn(10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [Estimate.of(values[:4], "nats/token"), Estimate.of(values[4:], "nats/token")]
    world, seen = World(0, 1, torch.device("cpu")), []
    monkeypatch.setattr(World, "sum", lambda self, sums: seen.append(sums) or sums)
    for part in parts:
        world.pooled(part)
    monkeypatch.setattr(World, "sum", lambda self, sums: seen[0] + seen[1])
    pooled, expected = world.pooled(parts[0]), Estimate.of(values, "nats/token")
    assert pooled.mean == pytest.approx(expected.mean) and pooled.stderr == pytest.approx(expected.stderr)
    assert (pooled.count, pooled.unit) == (10, "nats/token") and not math.isnan(pooled.stderr)
