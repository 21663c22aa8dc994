"""Where the ops are registered: schema, reference and fake in Python; compiled kernels override the reference for their device.

The compiled libraries (``_C.so`` for CPU, ``_C_cuda.so`` where torch has CUDA) hold nothing but kernels, registered through
PyTorch's stable C ABI for the schemas defined here. Where one is missing the reference runs instead, on that device, after one
warning; ``backends()`` says which is which.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

# Raised together with csrc/module.cpp whenever the schema of a compiled op changes.
ABI = 2

_LIBRARY = torch.library.Library("edlm", "DEF")
_OPS: dict[str, str] = {}  # name -> the op whose kernel does its work: itself, for all but those made of others


def _find(stem: str) -> Path | None:
    # In an editable install the libraries lie in site-packages and the sources elsewhere: both are on the package's path.
    for folder in sys.modules["edlm"].__path__:
        path = Path(folder) / f"{stem}.so"
        if path.is_file():
            return path
    return None


def _load() -> dict[str, Path]:
    loaded = {}
    wanted = {"cpu": "_C"} | ({"cuda": "_C_cuda"} if torch.version.cuda else {})
    for device, stem in wanted.items():
        path = _find(stem)
        if path is not None:
            torch.ops.load_library(path)
            loaded[device] = path
    if loaded:
        from edlm import _build

        # An editable install reads Python from the tree and kernels from the last build: schemas of two versions must never meet.
        if getattr(_build, "ABI", None) != ABI:
            raise ImportError(
                f"edlm: the compiled kernels are of another version (interface {getattr(_build, 'ABI', None)}, expected {ABI}); "
                "build them again: pip install --no-build-isolation -e ."
            )
    if "cpu" not in loaded:
        warnings.warn(
            "edlm: no compiled kernels were found; the pure-torch references run instead (correct, and much slower). "
            "Install with a C++ compiler at hand: pip install --no-build-isolation . ; `edlm info` tells what is there.",
            RuntimeWarning,
            stacklevel=2,
        )
    return loaded


LOADED = _load()


@functools.cache
def _warn_of_references_on_cuda(name: str) -> None:
    warnings.warn(
        f"edlm: no CUDA kernel of {name} was built; its pure-torch reference runs on the GPU instead (correct, and much slower). "
        "Install with nvcc on PATH: pip install --no-build-isolation . -C cmake.define.EDLM_CUDA=ON ; `edlm info` tells what is there.",
        RuntimeWarning,
        stacklevel=4,
    )


def define_op(schema: str, reference: Callable, fake: Callable, made_of: str | None = None) -> Callable:
    """Define ``edlm::<schema>`` with its reference (any device without a kernel of its own) and its fake; return the op.

    ``made_of``: the op whose kernel ``reference`` calls, where it has none of its own on any device.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(*arguments: Any) -> Any:
        if made_of is None and any(isinstance(x, torch.Tensor) and x.is_cuda for x in arguments):
            _warn_of_references_on_cuda(name)
        # Inside an autocast region the reference's own products would be cast to bfloat16: nats over a sequence.
        with torch._C._DisableAutocast():
            return reference(*arguments)

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"edlm::{name}", fake, lib=_LIBRARY)
    _OPS[name] = made_of or name
    return getattr(torch.ops.edlm, name).default


def register_backward(name: str, backward: Callable, setup_context: Callable) -> None:
    """First-order autograd for ``edlm::<name>``; its ``edlm::<name>_backward`` refuses to be differentiated again."""
    torch.library.register_autograd(f"edlm::{name}", backward, setup_context=setup_context, lib=_LIBRARY)

    def refuse(ctx: object, *grads: torch.Tensor) -> None:
        raise RuntimeError(f"{name}: first-order gradients only; for a second one write it with torch.log_softmax")

    torch.library.register_autograd(f"edlm::{name}_backward", refuse, lib=_LIBRARY)


def backends() -> dict[str, dict[str, str]]:
    """For every op and device, ``"compiled"`` or ``"reference"``: ``{op: {"cpu": ..., "cuda": ...}}``."""

    def kind(name: str, key: str) -> str:
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"edlm::{name}", key)
        return "compiled" if compiled else "reference"

    return {name: {"cpu": kind(kernel, "CPU"), "cuda": kind(kernel, "CUDA")} for name, kernel in _OPS.items()}


FLOATING = (torch.float32, torch.bfloat16, torch.float16)  # what kernels read


def check_logits(name: str, logits: torch.Tensor, dims: str, argument: str = "logits", may_be_empty: bool = False) -> None:
    """A floating tensor with the named axes, the last one (V) not empty."""
    axes = dims.strip("[]").split(", ")
    if not isinstance(logits, torch.Tensor) or logits.dtype not in FLOATING:
        got = f"{logits.dtype}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"{name}: {argument}: expected a float32, bfloat16 or float16 tensor {dims}, got {got}")
    if axes[0] != "..." and logits.dim() != len(axes):
        raise ValueError(f"{name}: {argument}: expected the shape {dims}, got {list(logits.shape)}")
    if not may_be_empty and (logits.dim() == 0 or logits.shape[-1] == 0):
        raise ValueError(f"{name}: {argument}: expected a vocabulary of at least one column, got the shape {list(logits.shape)}")


def unit_stride(logits: torch.Tensor) -> torch.Tensor:
    """NOTE: kernels read unit stride in V; anything else costs one copy, here and nowhere else."""
    return logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()


def check_tensor(
    name: str, argument: str, value: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """One sentence for every wrong dtype, shape or device."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: {argument}: expected a {dtype} tensor {list(shape)}, got {type(value).__name__}")
    if value.dtype != dtype or tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: {argument}: expected a {dtype} tensor of shape {list(shape)}, got {value.dtype} {list(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name}: {argument}: expected on {device}, beside the other tensors, got {value.device}")


def forbidden_ids(
    name: str, forbidden: int | list[int] | torch.Tensor | None, vocab_size: int, device: torch.device
) -> torch.Tensor:
    """int64 [F] of ids that are excluded from the softmax; empty for None."""
    if forbidden is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    if isinstance(forbidden, torch.Tensor):  # already on the device: checked by its owner, never read back here
        if forbidden.dtype != torch.int64 or forbidden.dim() != 1:
            raise ValueError(
                f"{name}: forbidden: expected an id, a list of ids or an int64 tensor [F], got {forbidden.dtype} "
                f"{list(forbidden.shape)}"
            )
        if forbidden.device.type == "cpu" and forbidden.numel() and not torch.compiler.is_compiling():
            low, high = (int(i) for i in forbidden.aminmax())
            if low < 0 or high >= vocab_size:
                raise ValueError(f"{name}: forbidden: expected ids in 0 .. {vocab_size - 1}, got {low if low < 0 else high}")
        return forbidden.to(device).contiguous()
    ids = list(forbidden) if isinstance(forbidden, list | tuple) else [forbidden]
    for i in ids:
        if not hasattr(i, "__index__") or not 0 <= i < vocab_size:  # numpy's integers are welcome, floats are not
            raise ValueError(f"{name}: forbidden: expected ids in 0 .. {vocab_size - 1}, got {i!r}")
    if len(ids) == 1:
        return torch.full((1,), ids[0], dtype=torch.int64, device=device)  # made on the device: nothing to wait for
    return torch.tensor(ids, dtype=torch.int64, device=device)


def first_of(bad: torch.Tensor) -> torch.Tensor:
    """int64 [1]: the first row [n] of a reference that is bad, or -1."""
    return torch.where(bad.any(), bad.long().argmax() if len(bad) else 0, -1).reshape(1)


def refuse_forward_mode(name: str, *inputs: torch.Tensor | None) -> None:
    """An op without a forward-mode rule would drop the tangent and say nothing."""
    if forward_ad._current_level >= 0 and any(
        x is not None and x.is_floating_point() and forward_ad.unpack_dual(x).tangent is not None for x in inputs
    ):
        raise RuntimeError(f"{name}: reverse-mode gradients only; for forward mode write it with torch.log_softmax")


def shorten(values: list, limit: int = 8) -> str:
    """The first few of a row, for a message."""
    return str(values) if len(values) <= limit else f"[{', '.join(map(str, values[:limit]))}, ... {len(values)} in all]"


def check_number(name: str, argument: str, value: float) -> None:
    """For None and strings, before a comparison says less."""
    if not torch.compiler.is_compiling() and not isinstance(value, int | float):
        raise ValueError(f"{name}: {argument}: expected a number, got {type(value).__name__}")


class Reports:
    """What the ops under a ``deferred_checks`` reported, unread: int64 tensors on the device, -1 where all rows were good."""

    def __init__(self) -> None:
        self._reports: list[tuple[str, torch.Tensor, Callable[[int], str]]] = []

    def add(self, name: str, invalid: torch.Tensor, describe: Callable[[int], str]) -> None:
        self._reports.append((name, invalid, describe))

    def __len__(self) -> int:
        return len(self._reports)

    def take(self, since: int) -> list[tuple[str, torch.Tensor, Callable[[int], str]]]:
        """What was added after the first ``since``, which it loses: the arguments of ``add``, for whoever replays those ops."""
        taken = self._reports[since:]
        del self._reports[since:]
        return taken

    def status(self) -> torch.Tensor:
        """int64 [n] on the CPU: for each op called so far its code, -1 where its rows were good. Waits for the devices."""
        return (
            torch.cat([invalid.cpu() for _, invalid, _ in self._reports]) if self._reports else torch.empty(0, dtype=torch.int64)
        )

    def check(self) -> None:
        """Raise the first report, in the order of the calls, as the op itself would have done. Waits for the devices.

        After the replay of a captured graph the reports of its ops are those of that replay.
        """
        for code, (name, _, describe) in zip(self.status().tolist(), self._reports, strict=True):
            if code >= 0:
                raise ValueError(f"{name}: {describe(code)}")


_deferred: contextvars.ContextVar[Reports | None] = contextvars.ContextVar("edlm_deferred_checks", default=None)


@contextlib.contextmanager
def deferred_checks(enabled: bool = True) -> Iterator[Reports]:
    """Inside, ops do not wait to learn whether rows on the device were valid: their reports are kept, and checked at the end.

    Outside, an op on a GPU waits for its own report, to raise where the fault is. What is bad writes no id that is out of range:
    token 0 with log-probability NaN, equal weights, a clamped index; so a loop may go on until its end. While a CUDA graph is
    captured nothing can be waited for: there, an op outside of a ``deferred_checks`` is not checked at all; and since the end of a
    ``deferred_checks`` waits, it must lie outside of the capture. Call an op once before it is captured, as with any kernel that is
    loaded at its first call. ``enabled=False`` changes nothing.

    Yields:
        Reports: ``check()`` raises the first report so far, ``status()`` gives all codes.

    Raises:
        ValueError: at the end, what the first op with a bad row would have raised. Not where the block itself raises.
    """
    reports = Reports()
    if not enabled:
        yield reports
        return
    token = _deferred.set(reports)
    try:
        yield reports
    finally:
        _deferred.reset(token)
    reports.check()


def check_invalid(name: str, invalid: torch.Tensor, describe: Callable[..., str], *shown: torch.Tensor) -> None:
    """Raise ``describe(code, *values)`` if a kernel reported a bad row: -1 is none. Inside a compiled graph the report becomes an
    assertion of the graph.

    ``shown``: tensors whose values in that row the message quotes. ``describe`` itself must hold no tensor: deferred reports would
    keep it alive, step after step, and say "values not kept" instead.

    NOTE: reading the report of a CUDA op waits for the device: see ``deferred_checks``.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(invalid[0] < 0, f"{name}: a row of the input is not valid; run it without torch.compile for details")
        return
    reports = _deferred.get()
    if reports is not None:
        unknown = ("values not kept",) * len(shown)
        reports.add(name, invalid, lambda code: describe(code, *unknown))
        return
    if invalid.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    code = int(invalid)
    if code >= 0:
        values = [x[code].tolist() for x in shown]
        raise ValueError(f"{name}: {describe(code, *(shorten(v) if isinstance(v, list) else str(v) for v in values))}")
