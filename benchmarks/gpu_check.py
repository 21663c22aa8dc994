"""Every op on a device beside the CPU, at small and awkward shapes: for a sanitizer, which would take hours over the tests.

python -m edlm.benchmarks.gpu_check [--every N]          compare; exit status 1 where something differs or fails
python -m edlm.benchmarks.gpu_check --profile            each main kernel once, at its size, between profiler marks
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from edlm import ops

Tensors = tuple[torch.Tensor, ...]
Case = tuple[str, Callable[[torch.device], Tensors]]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns: none divides by a vector. Rows: few, so that a row is shared by blocks; and more than a device has multiprocessors.
SHAPES = ((3, 1), (300, 27), (5, 511), (5, 513), (2, 50257), (300, 1031))
FILTERS = (
    {},
    {"temperature": 0.7},
    {"temperature": 0.0},
    {"top_k": 5},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.01},
)


def noise(*shape: int, scale: float = 2.0) -> torch.Tensor:
    """The same at every call: both devices get the same numbers."""
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def misaligned(x: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n, v] that begins an element past an allocation, in rows that lie three elements apart."""
    n, v = x.shape
    flat = torch.full((1 + n * (v + 3),), torch.nan, dtype=dtype, device=device)  # what lies between must not be read as a column
    view = flat[1:].view(n, v + 3)[:, :v]
    view.copy_(x.to(dtype))
    return view


def ids(n: int, v: int, k: int | None = None) -> torch.Tensor:
    return torch.randint(v, (n,) if k is None else (n, k), generator=torch.Generator().manual_seed(n + v))


def draw(n: int, v: int, dtype: torch.dtype, options: dict, device: torch.device) -> Tensors:
    logits = misaligned(noise(n, v), dtype, device)
    return ops.sample_categorical(logits, 3, position=torch.arange(n, device=device), seed=7, offset=2, **options)


def complete(n: int, v: int, dtype: torch.dtype, options: dict, device: torch.device) -> Tensors:
    """Two sequences, every third position clean, every fifth not active; the mask's column is the largest there is."""
    x = noise(2 * n, v)
    x[:, v - 1] = 60.0
    place = torch.arange(2 * n, device=device).view(2, n)
    xt = torch.where(place % 3 == 0, place % v, v - 1)
    logits = misaligned(x, dtype, device).unflatten(0, (2, n))
    return ops.sample_candidates(logits, xt, v - 1, 4, active=place % 5 != 0, seed=11, offset=1, **options)


def gather(n: int, v: int, dtype: torch.dtype, k: int | None, options: dict, device: torch.device) -> Tensors:
    logits = misaligned(noise(n, v), dtype, device).requires_grad_()
    out = ops.gather_log_probs(logits, ids(n, v, k).to(device), **options)
    finite = torch.where(out.isinf(), 0.0, out)  # of a forbidden token
    (grad,) = torch.autograd.grad((finite * torch.arange(1, out.numel() + 1, device=device).view_as(out)).sum() / n, logits)
    return out.detach(), grad


def linear(n: int, d: int, v: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    hidden, weight, bias = (x.to(device, dtype).requires_grad_() for x in (noise(n, d), noise(v, d, scale=d**-0.5), noise(v)))
    out = ops.linear_log_probs(hidden, weight, ids(n, v).to(device), bias, forbidden=v - 1)
    finite = torch.where(out.isinf(), 0.0, out)
    return out.detach(), *torch.autograd.grad(finite.mean(), (hidden, weight, bias))


def select(b: int, k: int, dtype: torch.dtype, temperature: float, corrected: bool, device: torch.device) -> Tensors:
    energy = misaligned(noise(b, k), dtype, device)
    correction = noise(b, k, scale=1.0).to(device, dtype) if corrected else None
    return ops.select_candidate(energy, temperature=temperature, log_correction=correction, seed=3, offset=4)


def resample(b: int, n: int, scheme: str, device: torch.device) -> Tensors:
    return (ops.resample(misaligned(noise(b, n), torch.float32, device), scheme, seed=5),)


def reverse(b: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensors:
    k, place = 3, torch.arange(b * length, device=device).view(b, length)
    x0 = torch.stack([place + 1000 * (i + 1) for i in range(k)], 1)
    return (ops.reverse_step(place, x0, torch.arange(b, device=device) % k, (place % 10).to(dtype) / 10, 0.5),)


def report(device: torch.device) -> Tensors:
    """What is not valid is reported by its row, and raises."""
    logits = noise(40, 600)
    logits[17, 300] = torch.nan
    try:
        ops.sample_categorical(logits.to(device), 2, seed=0)
    except ValueError as error:
        if "row 17" in str(error):
            return ()
        raise
    raise RuntimeError("a NaN in row 17 was not reported")


def cases() -> Iterator[Case]:
    for n, v in SHAPES:
        for dtype in DTYPES:
            shape = f"[{n}, {v}] {str(dtype).removeprefix('torch.')}"
            for options in FILTERS if dtype == torch.bfloat16 else FILTERS[:1]:
                yield f"sample_categorical {shape} {options}", partial(draw, n, v, dtype, options)
                if v > 1:
                    yield f"sample_candidates {shape} {options}", partial(complete, n, v, dtype, options)
            for k, options in ((None, {}), (3, {"temperature": 0.7, **({"forbidden": [0, v - 1]} if v > 2 else {})})):
                yield f"gather_log_probs {shape} K = {k} {options}", partial(gather, n, v, dtype, k, options)
    yield "sample_categorical, forbidden", partial(draw, 5, 513, torch.float32, {"forbidden": [0, 511, 512]})
    for dtype in DTYPES:
        for n, d, v in ((3, 5, 7), (70, 33, 1031)):
            yield f"linear_log_probs [{n}, {d}] [{v}, {d}] {dtype}", partial(linear, n, d, v, dtype)
    for k in (1, 3, 16, 33, 70):
        for temperature, corrected in ((1.0, False), (0.5, True), (0.0, False), (float("inf"), True)):
            yield f"select_candidate K = {k} T = {temperature}", partial(select, 9, k, torch.float32, temperature, corrected)
    yield "select_candidate bfloat16", partial(select, 5, 8, torch.bfloat16, 1.0, True)
    for scheme in ("systematic", "stratified", "multinomial", "residual"):
        for n in (1, 31, 300):
            yield f"resample {scheme} N = {n}", partial(resample, 3, n, scheme)
    for dtype in (torch.float32, torch.float64):
        for length in (1, 37, 1025):
            yield f"reverse_step L = {length} {dtype}", partial(reverse, 3, length, dtype)
    yield "a report", report


def difference(found: Tensors, wanted: Tensors) -> str | None:
    """None where they agree: integers but for one in a thousand (a draw on a boundary), numbers to the precision of their dtype."""
    same = None
    for a, b in zip(found, wanted, strict=True):
        a = a.cpu()
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype} {list(a.shape)}, not {b.dtype} {list(b.shape)}"
        if not a.is_floating_point():
            same = a == b
            if float((~same).sum()) > same.numel() / 1000:
                return f"{int((~same).sum())} of {same.numel()} integers differ"
            continue
        rtol = 1e-4 if a.dtype == torch.float32 else 2e-2
        close = torch.isclose(a.float(), b.float(), rtol=rtol, atol=rtol / 10, equal_nan=True)
        if same is not None and same.shape == close.shape:  # what belongs to another draw is another number
            close |= ~same
        if not bool(close.all()):
            return f"{int((~close).sum())} of {close.numel()} numbers differ, by up to {float((a - b).abs()[~close].max()):.2e}"
    return None


def compare(device: torch.device, every: int = 1) -> int:
    """The number of cases that differ or fail."""
    count = bad = 0
    for name, case in itertools.islice(cases(), 0, None, every):
        count += 1
        try:
            problem = difference(case(device), case(torch.device("cpu")))
        except Exception as error:  # the other cases are worth a look all the same
            problem = f"{type(error).__name__}: {error}"
        if problem:
            bad += 1
            print(f"{name}: {problem}", flush=True)
    print(f"{count - bad} of {count} cases on {device} agree with the CPU")
    return bad


def profile() -> None:
    """Every call once before the marks, so that nothing is made between them but launches."""
    device = torch.device("cuda")
    calls: list[Callable[[], object]] = []
    for n, v in ((1, 50258), (1024, 50258), (1024, 151936), (65536, 27)):
        logits = (2 * torch.randn(n, v, device=device)).bfloat16()
        args = {
            "position": torch.zeros(n, dtype=torch.int64, device=device),
            "offset": torch.zeros(1, dtype=torch.int64, device=device),
        }
        args["seed"] = torch.arange(n, device=device)
        for k in (1, 16):
            calls.append(partial(ops.sample_categorical, logits, k, **args))
        if (n, v) == (1024, 50258):
            for options in FILTERS[3:6]:
                calls.append(partial(ops.sample_categorical, logits, 8, **args, **options))
            leaf, tokens = logits.detach().requires_grad_(), ids(n, v).to(device)
            calls.append(lambda leaf=leaf, tokens=tokens: torch.autograd.grad(ops.gather_log_probs(leaf, tokens).sum(), leaf))
    hidden, weight = torch.randn(1024, 768, device=device).bfloat16(), torch.randn(50258, 768, device=device).bfloat16()
    calls.append(partial(ops.linear_log_probs, hidden, weight, ids(1024, 50258).to(device)))
    calls.append(partial(ops.select_candidate, torch.randn(1024, 16, device=device), seed=0))
    calls.append(partial(ops.resample, torch.randn(16, 1024, device=device), seed=0))
    with ops.deferred_checks():
        for call in calls:
            call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    with ops.deferred_checks():
        for call in calls:
            call()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    print(f"{len(calls)} calls between the marks")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="compared with the CPU (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="one case of N, for slow tools (default: all)")
    parser.add_argument("--profile", action="store_true", help="compare nothing: calls for a profiler")
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        print("gpu_check: torch can use no GPU here", file=sys.stderr)
        return 2
    if options.profile:
        profile()
        return 0
    return 1 if compare(torch.device(options.device), options.every) else 0


if __name__ == "__main__":
    sys.exit(main())
