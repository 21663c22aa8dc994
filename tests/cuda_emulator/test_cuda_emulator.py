"""The emulator against kernels with faults: right ones pass in every build, each fault is noticed where README.md's table says.

This says that the emulator bites, not that a GPU would behave so.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from emulated import EMULATOR, run_sanitized

FORWARD, REVERSE, RANDOM = 0, 1, 2
SOURCES = {"rows": "seeded.cu", "ticket": "seeded_blocks.cu", "grid": "seeded_blocks.cu", "chain": "seeded_blocks.cu"}
KERNELS = [EMULATOR / name for name in dict.fromkeys(SOURCES.values())]


def faults(source: str) -> list[str]:
    return re.search(r"enum Fault \{(.*?)\}", (EMULATOR / source).read_text(), re.S)[1].replace(",", " ").split()


def table() -> dict[tuple[str, str], dict[str, str]]:
    """(kernel, fault) -> column -> what README.md says about it."""
    lines = (EMULATOR / "README.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header = next(i for i, row in enumerate(rows) if row[:2] == ["kernel", "fault"])
    return {(row[0], row[1]): dict(zip(rows[header], row, strict=True)) for row in rows[header + 2 :]}


TABLE = table()
RIGHT = [key for key in TABLE if key[1] == "kNone"]
FAULTS = [key for key in TABLE if key[1] != "kNone"]


def number(kernel: str, fault: str) -> int:
    return faults(SOURCES[kernel]).index(fault)


@pytest.fixture(scope="module")
def library(build_emulated):
    library = ctypes.CDLL(str(build_emulated(KERNELS, "libseeded.so")))
    library.emulator_error.restype = ctypes.c_char_p
    library.emulator_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
    return library


def run(library, kernel: str, fault: str, order: int, seed: int = 1, columns: int = 1040) -> str:
    """What was noticed: the emulator's sentence, that sums are wrong, or "-", nothing."""
    rows = 5 if kernel == "rows" else 1
    x = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) % 11
    sums, out = x.sum(1), torch.zeros(rows)
    partial, ticket = torch.full((4,), torch.nan), torch.zeros(1, dtype=torch.int32)
    if kernel == "ticket":
        sums, out = torch.stack([sums[0], torch.tensor(float(fault == "kBlocksWrite"))]), torch.zeros(2)
    elif kernel == "grid":
        sums, out = torch.cat([sums.expand(4), 2 * sums.expand(4)]), torch.zeros(8)
    used = {"rows": [x, out], "ticket": [x, partial, ticket, out], "grid": [x, partial, out], "chain": [x, ticket, out]}
    sizes = [rows, columns] if kernel == "rows" else [columns]
    launch = getattr(library, "sum_rows_launch" if kernel == "rows" else f"sum_by_{kernel}_launch")
    library.emulator_schedule(order, seed)
    rc = launch(*[ctypes.c_void_p(buffer.data_ptr()) for buffer in used[kernel]], *sizes, number(kernel, fault))
    sentence = library.emulator_error().decode()
    assert (rc != 0) == bool(sentence)
    return sentence or ("-" if torch.equal(out, sums) else f"wrong sums: {out.tolist()}")


def word(noticed: str) -> str:
    """As the table says it."""
    return noticed if noticed == "-" else "sums" if noticed.startswith("wrong sums") else "stopped"


def test_every_fault_is_in_the_table():
    for source in KERNELS:
        listed = [fault for kernel, fault in TABLE if SOURCES[kernel] == source.name]
        assert set(listed) == set(faults(source.name))
    assert {kernel for kernel, _ in RIGHT} == set(SOURCES)


@pytest.mark.parametrize("columns", [1, 31, 127, 512, 1040])
@pytest.mark.parametrize("kernel", SOURCES)
def test_right_kernels_pass(library, kernel, columns):
    for order in (FORWARD, REVERSE):
        assert run(library, kernel, "kNone", order, columns=columns) == "-"
    for seed in range(10):
        assert run(library, kernel, "kNone", RANDOM, seed, columns=columns) == "-"


@pytest.mark.parametrize(("kernel", "fault"), FAULTS)
def test_a_fault_in_the_plain_build(library, kernel, fault):
    said = TABLE[kernel, fault]
    assert word(run(library, kernel, fault, FORWARD)) == said["forward"]
    assert word(run(library, kernel, fault, REVERSE)) == said["reverse"]
    assert sum(run(library, kernel, fault, RANDOM, seed) != "-" for seed in range(10)) == int(said["random x10"])


def test_sentences_name_kernel_thread_and_line(library):
    assert re.fullmatch(
        r"kernel sum_rows, block \(0, 0, 0\), thread \d+: a shuffle at .*seeded.cu:\d+: mask ffffffff names lane 5, which has returned",
        run(library, "rows", "kReturnedLane", FORWARD),
    )
    assert re.search(
        r"threads wait at different barriers: thread \d+ waits at __syncthreads \(.*seeded.cu:\d+\), thread \d+ waits at",
        run(library, "rows", "kDivergentBarrier", FORWARD),
    )
    assert re.fullmatch(
        r"kernel sum_by_grid, block \(0, 0, 0\): no thread can go on: thread 0 waits at the grid's sync\(\) \(.*blocks.cu:\d+\).*",
        run(library, "grid", "kReturnedBlock", FORWARD),
    )
    assert "in a launch that is not cooperative" in run(library, "grid", "kNotCooperative", FORWARD)


def test_launches_are_checked(library):
    out = torch.zeros(1)
    at = ctypes.c_void_p(out.data_ptr())
    assert library.sum_rows_launch(at, at, 0, 4, 0) != 0
    assert b"launch of sum_rows: a grid has" in library.emulator_error()


BUILDS = {"ASan + UBSan": "address", "TSan": "thread"}
ENDS = {0: "-", 10: "stopped", 20: "sums"}  # of seeded_main.cpp
REPORT = {"address": "AddressSanitizer: |runtime error: ", "thread": "ThreadSanitizer: data race"}


@pytest.fixture(scope="module", params=BUILDS)
def sanitized(request, build_emulated):
    sanitize = BUILDS[request.param]
    main = EMULATOR / "seeded_main.cpp"
    return request.param, build_emulated(KERNELS, f"seeded-{sanitize}", (main,), shared=False, sanitize=sanitize)


def noticed_by(build: str, program, kernel: str, fault: str, order: int) -> str:
    done = run_sanitized(program, kernel, str(number(kernel, fault)), str(order))
    if re.search(REPORT[BUILDS[build]], done.stderr):
        assert done.returncode not in ENDS
        assert SOURCES[kernel] in done.stderr, done.stderr
        return "report"
    if "not cooperative under AddressSanitizer" in done.stdout:
        return "not run"
    assert done.returncode in ENDS, done.stderr
    return ENDS[done.returncode]


@pytest.mark.parametrize("order", [FORWARD, REVERSE, RANDOM])
@pytest.mark.parametrize("kernel", SOURCES)
def test_right_kernels_under_sanitizers(sanitized, kernel, order):
    build, program = sanitized
    assert noticed_by(build, program, kernel, "kNone", order) == TABLE[kernel, "kNone"][build]


@pytest.mark.parametrize(("kernel", "fault"), FAULTS)
def test_a_fault_under_sanitizers(sanitized, kernel, fault):
    build, program = sanitized
    assert noticed_by(build, program, kernel, fault, FORWARD) == TABLE[kernel, fault][build]
