"""Capture and replay. Without a GPU the graph is emulated: every operator of a captured step is recorded and run again into the same
memory, and to read a value on the host, or to make a shape of one, is an error while it is recorded."""

from __future__ import annotations

import contextlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from edlm.models import DiT
from edlm.models.dit import DiTConfig
from edlm.samplers import cuda_graph, generate
from edlm.samplers.choose import Scorer
from exact import SplitDenoiser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


class Recording(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function._schema.name in READS:
            raise RuntimeError(f"read while capturing: {function._schema.name}")
        result = function(*arguments, **options)
        self.tape.append((function, arguments, options, result))
        return result


class Tape:
    """In the place of a torch.cuda.CUDAGraph."""

    def __init__(self):
        self.tape, self.replays = [], 0

    def replay(self):
        self.replays += 1
        for function, arguments, options, result in self.tape:
            again = function(*arguments, **options)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.numel() and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def recorded(graph, pool=None, stream=None):
    assert pool is not None and stream is not None
    with Recording(graph.tape):
        yield


@pytest.fixture
def emulated(monkeypatch):
    """A CPU that passes for a GPU as far as the loop looks: graphs are tapes, and what ops and energies report is read at the end."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fake = SimpleNamespace(
        CUDAGraph=Tape, Stream=lambda: stream, current_stream=lambda: stream, stream=lambda s: contextlib.nullcontext(),
        graph=recorded, graph_pool_handle=object, device=lambda d: contextlib.nullcontext(),
    )  # fmt: skip
    monkeypatch.setattr(cuda_graph, "torch", SimpleNamespace(cuda=fake))
    loop = sys.modules["edlm.samplers.generate"]
    monkeypatch.setattr(loop.check, "check_shape", lambda *arguments: None)
    deferred = loop.deferred_checks
    monkeypatch.setattr(loop, "deferred_checks", lambda enabled: deferred(True))

    def keep(self, energy, names, all_excluded=False):
        self.unread.append((names, energy.isnan() | (energy == -math.inf) | (energy == math.inf).all(1, keepdim=True)))

    monkeypatch.setattr(Scorer, "_check", keep)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("sampler", ["ancestral", "first_hitting", "remasking", "left_to_right"])
@pytest.mark.parametrize("variant", [{}, {"top_k": 2}, {"num_particles": 3}, {"block_length": 2}, {"num_candidates": 1}], ids=str)
def test_replays_are_the_steps(emulated, universe, denoiser, energy, split, sampler, variant):
    network = SplitDenoiser(denoiser) if split else denoiser
    m = universe.mask
    common = {
        "prompt": torch.tensor([(m, m, m), (1, m, m), (m, m, 2)]).repeat(5, 1), "sampler": sampler, "energy": energy,
        "steps": 4 if sampler in ("ancestral", "remasking") else None, "seed": 83, "window": (0.3, 1), "num_candidates": 3,
        "return_history": True, "compact": False, **variant,
    }  # fmt: skip
    fixed, graph = generate(network, **common), generate(network, cuda_graph=True, **common)
    assert torch.equal(fixed.history, graph.history) and torch.equal(fixed.tokens, graph.tokens)
    assert (fixed.nfe, fixed.energy_nfe) == (graph.nfe, graph.energy_nfe)
    for name in ("ess", "log_Z", "energy", "step_times"):
        assert torch.equal(getattr(fixed, name).nan_to_num(), getattr(graph, name).nan_to_num())


@pytest.mark.parametrize("graph", [False, True])
def test_what_is_wrong_in_one_replay_is_told(emulated, universe, denoiser, energy, graph):
    """In the middle of the run: the last replay finds nothing wrong."""

    class Bad:
        mask_token_id, vocab_size = universe.mask, universe.num_tokens + 1

        def __call__(self, xt, t):
            logits = denoiser(xt, t)
            return torch.where(((xt == universe.mask).sum(1) == 2)[:, None, None], math.nan, logits)

    def bad_energy(x0, xt, t, log_p):
        value = energy(x0, xt, t, log_p)
        return torch.where(((xt == universe.mask).sum(1) == 2)[:, None], math.nan, value)

    common = {"batch_size": 4, "length": 3, "sampler": "first_hitting", "seed": 1, "compact": False, "cuda_graph": graph}
    with pytest.raises(ValueError, match="sample_candidates: logits: "):
        generate(Bad(), **common)
    with pytest.raises(ValueError, match="sample_candidates: logits: "):  # not the energy, which they make bad
        generate(Bad(), energy=energy, num_candidates=3, window=(0, 1), **common)
    with pytest.raises(ValueError, match=r"energy: .* for all 3 candidates of sequence 0 in step 1$"):
        generate(denoiser, energy=bad_energy, num_candidates=3, window=(0, 1), **common)


def test_a_read_is_found(emulated, denoiser):
    """The emulation has teeth."""

    def reads(x0, xt, t, log_p):
        return log_p.sum(-1) * float(log_p.max())

    with pytest.raises(RuntimeError, match="read while capturing"):
        generate(
            denoiser,
            batch_size=2,
            length=3,
            steps=2,
            energy=reads,
            num_candidates=2,
            window=(0, 1),
            compact=False,
            cuda_graph=True,
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_on_a_gpu():
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size=100, mask_token_id=99, dim=64, num_layers=2, num_heads=2)).cuda().eval()
    torch.nn.init.normal_(model.linear.weight, std=0.3)

    def energy(x0, xt, t, log_p):
        return -log_p.sum(-1) + (x0 == xt[:, None]).sum(-1)

    common = {
        "batch_size": 4, "length": 32, "steps": 16, "energy": energy, "num_candidates": 4, "window": (0.5, 1), "seed": 3,
        "device": "cuda",
    }  # fmt: skip
    fixed = generate(model, compact=False, **common)
    graph = generate(model, compact=False, cuda_graph=True, **common)
    assert torch.equal(fixed.tokens, graph.tokens) and fixed.energy_nfe == graph.energy_nfe
    assert (generate(model, **common).tokens == fixed.tokens).double().mean() > 0.9
