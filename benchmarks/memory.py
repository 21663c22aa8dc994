"""Peak resident memory of one call, beyond what the process held before it: measured in a fresh process, which this file is too.

Method: the process makes its inputs, runs products of 64 rows with the weight and their backward by torch alone, for the library of
the products keeps buffers from then on (the op itself is not called, so that what *it* keeps is counted), gives freed memory back
(malloc_trim) and reads VmRSS. It then resets the peak by writing 5 to /proc/self/clear_refs, calls once, and reads VmHWM. Where the
reset is refused, a thread reads VmRSS every half millisecond instead. The difference counts everything: results, workspaces of the
products, the C library's slack. The gradients that a backward returns are given too, for what lies beyond them. Linux only.

On a GPU it is torch's own count of allocated bytes, in this process: the peak over the call, beyond what was allocated before.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch

CALLS = ("gather_log_probs", "cross_entropy", "log_softmax + gather", "linear_log_probs", "logits + cross_entropy")


def _status(key: str) -> int:
    """Bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(key + ":"))


def _loss(call: str, n: int, d: int, v: int, device: str = "cpu") -> tuple[Callable[[], torch.Tensor], list[torch.Tensor]]:
    """A function that gives the negative log-likelihood, and the tensors that it is differentiated by."""
    from edlm.ops import gather_log_probs, linear_log_probs
    from torch.nn.functional import cross_entropy

    tokens = torch.randint(v, (n,), device=device)
    if call in ("linear_log_probs", "logits + cross_entropy"):
        hidden, weight = torch.randn(n, d, device=device), torch.randn(v, d, device=device) / d**0.5
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        if call == "linear_log_probs":
            return lambda: -linear_log_probs(hidden, weight, tokens).mean(), leaves
        return lambda: cross_entropy(hidden @ weight.t(), tokens), leaves
    logits = (2 * torch.randn(n, v, device=device)).requires_grad_()
    losses = {
        "gather_log_probs": lambda: -gather_log_probs(logits, tokens).mean(),
        "cross_entropy": lambda: cross_entropy(logits, tokens),
        "log_softmax + gather": lambda: -logits.log_softmax(-1).gather(-1, tokens[:, None]).mean(),
    }
    return losses[call], [logits]


def _warm_up(leaves: list[torch.Tensor]) -> None:
    """Products in the orientations of a forward and a backward, by torch alone: what their library keeps is nobody's extra memory.
    With the weight's own size, for the buffers follow it."""
    hidden, weight = (t.detach() for t in leaves) if len(leaves) == 2 else (torch.randn(64, 64), torch.randn(512, 64))
    for _ in range(2):
        few = hidden[:64].clone().requires_grad_(), weight.clone().requires_grad_()
        torch.nn.functional.cross_entropy(few[0] @ few[1].t(), torch.zeros(len(few[0]), dtype=torch.int64)).backward()


def _trim() -> None:
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _peak(call: Callable[[], object]) -> tuple[int, object, str]:
    """(bytes at the peak, what the call gave, how it was measured)."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        seen, done = [_status("VmRSS")], threading.Event()

        def sample() -> None:
            while not done.is_set():
                seen.append(_status("VmRSS"))
                time.sleep(0.0005)

        thread = threading.Thread(target=sample)
        thread.start()
        result = call()
        done.set()
        thread.join()
        return max(seen), result, "VmRSS, sampled"
    result = call()
    return _status("VmHWM"), result, "VmHWM, reset before the call"


def _measure(call: str, backward: bool, n: int, d: int, v: int, threads: int) -> dict[str, object]:
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    loss, leaves = _loss(call, n, d, v)
    _warm_up(leaves)
    _trim()

    def forward_backward() -> object:
        return torch.autograd.grad(loss(), leaves)

    def forward() -> object:
        with torch.no_grad():
            return loss()

    before = _status("VmRSS")
    peak, _, method = _peak(forward_backward if backward else forward)
    gradients = sum(t.numel() * t.element_size() for t in leaves) if backward else 0
    return {"extra_bytes": peak - before, "gradient_bytes": gradients, "method": method}


def _measure_on_gpu(call: str, backward: bool, n: int, d: int, v: int) -> dict[str, object]:
    loss, leaves = _loss(call, n, d, v, "cuda")
    for _ in range(2):  # the library of the products keeps a workspace from its first call on
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        if backward:
            torch.autograd.grad(loss(), leaves)
        else:
            with torch.no_grad():
                loss()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    gradients = sum(t.numel() * t.element_size() for t in leaves) if backward else 0
    return {"extra_bytes": peak - before, "gradient_bytes": gradients, "method": "max_memory_allocated, the second call"}


def measure(call: str, *, backward: bool, n: int, d: int, v: int, device: str = "cpu") -> dict[str, object]:
    """``extra_bytes`` at the peak, ``gradient_bytes`` of them that are results, ``method``; of a CPU in a fresh process."""
    if device == "cuda":
        return _measure_on_gpu(call, backward, n, d, v)
    arguments = json.dumps([call, backward, n, d, v, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-P", __file__, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak memory of {call}: the process that measures it failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measurable() -> bool:
    try:
        return _status("VmRSS") > 0
    except OSError:
        return False


if __name__ == "__main__":
    print(json.dumps(_measure(*json.loads(sys.argv[1]))))
