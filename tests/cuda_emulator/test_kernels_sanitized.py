"""The kernels of csrc/cuda under sanitizers, called by a program that looks at what they write; and faults, written into a copy.

This says that the kernels keep within their memory, race nowhere and compute what they should, not that a GPU's code does.
"""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from emulated import EMULATOR, KERNELS, ROOT, run_sanitized

FORWARD, REVERSE, RANDOM = 0, 1, 2
MAINS = tuple(EMULATOR / f"kernels_{noun}.cpp" for noun in ("main", "sampling", "log_probs", "importance"))
REPORT = {"address": "AddressSanitizer: |runtime error: ", "thread": "ThreadSanitizer: data race"}


class Fault(NamedTuple):
    """A line of a kernel, and what stands there instead, where FAULT is 1 for this fault and 0 for the others."""

    file: str
    line: str
    instead: str
    sanitize: str
    run: tuple[str, str, int]  # family, how much, order
    noticed: str  # report: the sanitizer's; wrong: the program's, of results


BARRIER = "if (!FAULT) __syncthreads();"
FAULTS = {
    # Memory. Buffers are exact, and gaps between rows are poisoned.
    "a tile that is read behind its row's end": Fault(
        "tiles.cuh", "(shift / sizeof(T))) <= row.run.size;", "(shift / sizeof(T))) <= row.run.size + FAULT;",
        "address", ("log_probs", "some", FORWARD), "report",
    ),
    "a tile that is read from before its row": Fault(
        "tiles.cuh", "return (kAligned || tile > 0) &&", "return (kAligned || FAULT || tile > 0) &&",
        "address", ("log_probs", "some", FORWARD), "report",
    ),
    "a vector of logits that is read from before its row": Fault(
        "vec.cuh", "if (first < lead ||", "if ((!FAULT && first < lead) ||",
        "address", ("log_probs", "some", FORWARD), "report",
    ),
    "the last gradients as a whole vector": Fault(
        "log_probs.cu", "first + kVec<T> <= vocab;", "first + kVec<T> <= vocab + FAULT;",
        "address", ("log_probs", "some", FORWARD), "report",
    ),
    "gradients stored where they are not aligned": Fault(
        "log_probs.cu", " * kVec<T> - lead;", " * kVec<T> - (FAULT ? 0 : lead);",
        "address", ("log_probs", "some", FORWARD), "report",
    ),
    "scratch without the last tile's end": Fault(
        "tiles.cuh", "static_cast<size_t>(rows * bytes)};", "static_cast<size_t>(rows * bytes) - 8 * FAULT};",
        "address", ("log_probs", "some", FORWARD), "report",
    ),
    "shared memory for small rows one float short": Fault(
        "sampling.cu", "(sizeof(double) + sizeof(float));", "(sizeof(double) + sizeof(float)) - 4 * FAULT;",
        "address", ("sampling", "some", FORWARD), "report",
    ),
    "scratch of resample one particle short": Fault(
        "importance.cu", "return batch * args->particles *", "return (batch * args->particles - FAULT) *",
        "address", ("importance", "some", FORWARD), "report",
    ),
    # Barriers and warps.
    "no barrier between reading a row and weighing it": Fault(
        "log_probs.cu", "__syncthreads();\n  gather_row", BARRIER + "\n  gather_row",
        "thread", ("log_probs", "few", FORWARD), "report",
    ),
    "no barrier behind accumulate": Fault(
        "importance.cu", "__syncthreads();\n  return carry;", BARRIER + "\n  return carry;",
        "thread", ("importance", "few", FORWARD), "report",
    ),
    "a board that is used again too early": Fault(
        "reduce.cuh", "__syncthreads();\n  *total = sum;", BARRIER + "\n  *total = sum;",
        "thread", ("importance", "few", FORWARD), "report",
    ),
    "a histogram that is filled before it is cleared": Fault(
        "filters.cuh", "h.count[i] = 0;\n  __syncthreads();", "h.count[i] = 0;\n  " + BARRIER,
        "thread", ("sampling", "few", FORWARD), "report",
    ),
    "a tile that is cut while lanes still look at it": Fault(
        "filters.cuh", "__syncwarp();  // all lanes have looked", "if (!FAULT) __syncwarp();  // all lanes have looked",
        "thread", ("sampling", "few", FORWARD), "report",
    ),
    "a small row that is weighed while lanes still read it": Fault(
        "sampling.cu", "__syncwarp();\n  // A lane's columns", "if (!FAULT) __syncwarp();\n  // A lane's columns",
        "thread", ("sampling", "few", FORWARD), "report",
    ),
    "copies that are counted without atomics": Fault(
        "importance.cu", "atomicAdd(&copies[at < n ? at : n - 1], 1);",
        "if (FAULT) ++copies[at < n ? at : n - 1]; else atomicAdd(&copies[at < n ? at : n - 1], 1);",
        "thread", ("importance", "few", FORWARD), "report",
    ),
    # Results, which the program looks at.
    "no barrier between reading a row and drawing from it": Fault(
        "sampling.cu", "__syncthreads();\n  finish_row", BARRIER + "\n  finish_row",
        "address", ("sampling", "some", REVERSE), "wrong",
    ),
    # ThreadSanitizer does not see these two: g++ tells it nothing of what a function returns into memory.
    "columns that are drawn before their places are found": Fault(
        "sampling.cu",
        "__syncthreads();\n#pragma unroll 1\n    for (int k = team;", BARRIER + "\n#pragma unroll 1\n    for (int k = team;",
        "address", ("sampling", "some", REVERSE), "wrong",
    ),
    "places that are found anew before they are drawn from": Fault(
        "sampling.cu", "    }\n    __syncthreads();\n  }\n}", "    }\n    " + BARRIER + "\n  }\n}",
        "address", ("sampling", "some", REVERSE), "wrong",
    ),
    "a report that is not cleared": Fault(
        "launch.cuh", "error = cudaMemsetAsync(", "error = FAULT ? cudaSuccess : cudaMemsetAsync(",
        "address", ("importance", "some", FORWARD), "wrong",
    ),
    "ties that all stay": Fault(
        "filters.cuh", "const int tie_end = cut.ties < cut.equal ?", "const int tie_end = !FAULT && cut.ties < cut.equal ?",
        "address", ("sampling", "some", FORWARD), "wrong",
    ),
    "elements shifted by one word": Fault(
        "tiles.cuh", "switch (shift / 4) {", "switch (shift / 4 - (FAULT && shift / 4 == 3)) {",
        "address", ("log_probs", "some", FORWARD), "wrong",
    ),
    "the tile's uniform for the column too": Fault(
        "sampling.cu", "const double target = u.second *", "const double target = (FAULT ? u.first : u.second) *",
        "address", ("sampling", "some", FORWARD), "wrong",
    ),
    "a gradient that an excluded column keeps": Fault(
        "log_probs.cu", "if (at == i) dx[i] = 0;", "if (!FAULT && at == i) dx[i] = 0;",
        "address", ("log_probs", "some", FORWARD), "wrong",
    ),
}  # fmt: skip


def write_faults(folder: Path) -> list[Path]:
    """A copy of the kernels, with the faults that `seeded_fault` chooses from; of one dtype, as compiling them takes long."""
    csrc = folder / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    for number, fault in enumerate(FAULTS.values(), 1):
        path = csrc / "cuda" / fault.file
        source = path.read_text()
        assert source.count(fault.line) == 1, f"{fault.file}: expected once: {fault.line}"
        path.write_text(source.replace(fault.line, re.sub(r"\bFAULT\b", f"(seeded_fault == {number})", fault.instead)))
    launch = csrc / "cuda" / "launch.cuh"
    launch.write_text(launch.read_text().replace("#pragma once\n", '#pragma once\nextern "C" int seeded_fault;\n', 1))
    kernels = [csrc / "cuda" / kernel.name for kernel in KERNELS]
    for kernel in kernels:
        one = re.sub(r"(case DType::kFloat(?:32|16): return) launch.*;", r"\1 cudaErrorInvalidValue;", kernel.read_text())
        kernel.write_text(one)
    return kernels


@pytest.fixture(scope="module")
def programs(build_emulated, tmp_path_factory):
    """(sanitizer, whether faults are written into the kernels) -> a program."""
    sources = {False: KERNELS, True: write_faults(tmp_path_factory.mktemp("faults"))}
    # What calls the kernels is compiled once, without a sanitizer, and linked into all four.
    mains = build_emulated([], "kernels-mains.so", MAINS, more=("-g1",))
    objects = tuple(str(mains.parent / f"{mains.name}-{main.name}.o") for main in MAINS)

    def build_both(sanitize: str) -> dict[tuple[str, bool], Path]:
        return {
            (sanitize, is_faulty): build_emulated(
                kernels, f"kernels-{sanitize}-{is_faulty}", shared=False, sanitize=sanitize, libraries=objects
            )
            for is_faulty, kernels in sources.items()
        }

    with ThreadPoolExecutor(2) as pool:
        return dict(item for built in pool.map(build_both, REPORT) for item in built.items())


def noticed(sanitize: str, program: Path, family: str, amount: str, order: int, fault: int = 0) -> str:
    """report, stopped, wrong, or nothing; then what was said of it."""
    done = run_sanitized(program, family, amount, str(order), str(fault))
    said = done.stdout + done.stderr
    if re.search(REPORT[sanitize], done.stderr):
        return "report: " + said
    assert done.returncode in (0, 10, 20), said
    return {0: "nothing", 10: "stopped: ", 20: "wrong: "}[done.returncode] + said


RUNS = {
    "address": [
        *((family, "many", FORWARD) for family in ("sampling", "million", "log_probs", "importance")),
        *((family, "some", order) for family in ("sampling", "log_probs", "importance") for order in (REVERSE, RANDOM)),
    ],
    "thread": [(family, "few", order) for family in ("sampling", "log_probs", "importance") for order in (FORWARD, RANDOM)],
}


@pytest.mark.parametrize(("family", "amount", "order"), RUNS["address"])
def test_memory_and_results(programs, family, amount, order):
    assert noticed("address", programs["address", False], family, amount, order) == "nothing"


@pytest.mark.parametrize(("family", "amount", "order"), RUNS["thread"])
def test_races(programs, family, amount, order):
    assert noticed("thread", programs["thread", False], family, amount, order) == "nothing"


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(programs, name):
    fault = FAULTS[name]
    said = noticed(fault.sanitize, programs[fault.sanitize, True], *fault.run, list(FAULTS).index(name) + 1)
    assert said.startswith(fault.noticed + ": "), said


@pytest.mark.parametrize("run", [("sampling", "some", FORWARD), ("log_probs", "some", FORWARD), ("importance", "some", FORWARD)])
def test_without_a_fault_the_copy_is_right(programs, run):
    assert noticed("address", programs["address", True], *run) == "nothing"
