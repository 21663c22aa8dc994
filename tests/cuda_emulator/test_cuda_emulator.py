"""The emulator against a kernel with faults: the right one passes under every schedule, each fault is caught where it should be.

This says that the emulator bites, not that a GPU would behave so. Faults that only ThreadSanitizer sees, such as a missing fence
before a ticket, are not among them: there is no such build yet.
"""

from __future__ import annotations

import ctypes
import re
import subprocess

import pytest
import torch
from emulated import EMULATOR

FORWARD, REVERSE, RANDOM = 0, 1, 2
FAULTS = re.search(r"enum Fault \{(.*?)\}", (EMULATOR / "seeded.cu").read_text(), re.S)[1].replace(",", " ").split()
# Where a fault must be noticed. Some depend on the order in which threads run; the sanitizers see what the plain build cannot.
ALWAYS = {
    "kMissingBarrier",
    "kShuffleInBranch",
    "kReadPastRow",
    "kWrongSlot",
    "kDivergentBarrier",
    "kMissingWait",
    "kLaneOutsideMask",
    "kReturnedLane",
    "kUnwrittenShared",
    "kMissingSyncwarp",
}
UNFAIR_ONLY = {"kMissingBarrierBeforeReuse"}
SANITIZERS_ONLY = {"kShortDynamicShared", "kMisaligned"}


@pytest.fixture(scope="module")
def kernels(build_emulated):
    library = ctypes.CDLL(str(build_emulated([EMULATOR / "seeded.cu"], "libseeded.so")))
    library.emulator_error.restype = ctypes.c_char_p
    library.emulator_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
    library.sum_rows_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    return library


def run(kernels, fault, order, seed=1, rows=5, columns=1040):
    """None if all went well, else what was noticed: the emulator's sentence, or that sums are wrong."""
    x = torch.arange(rows * columns, dtype=torch.float32).view(rows, columns) % 11
    out = torch.zeros(rows)
    kernels.emulator_schedule(order, seed)
    rc = kernels.sum_rows_launch(x.data_ptr(), out.data_ptr(), rows, columns, FAULTS.index(fault))
    sentence = kernels.emulator_error().decode()
    assert (rc != 0) == bool(sentence)
    return sentence or (None if torch.equal(out, x.sum(1)) else f"wrong sums: {out.tolist()}")


def test_every_fault_has_its_place():
    assert ALWAYS | UNFAIR_ONLY | SANITIZERS_ONLY | {"kNone"} == set(FAULTS)


@pytest.mark.parametrize("columns", [1, 31, 127, 512, 1040])
def test_the_right_kernel_passes(kernels, columns):
    for order in (FORWARD, REVERSE):
        assert run(kernels, "kNone", order, columns=columns) is None
    for seed in range(10):
        assert run(kernels, "kNone", RANDOM, seed, columns=columns) is None


@pytest.mark.parametrize("fault", sorted(ALWAYS))
def test_a_fault_is_noticed_in_any_order(kernels, fault):
    assert run(kernels, fault, FORWARD) is not None
    assert run(kernels, fault, REVERSE) is not None
    assert all(run(kernels, fault, RANDOM, seed) is not None for seed in range(10))


@pytest.mark.parametrize("fault", sorted(UNFAIR_ONLY))
def test_a_fault_is_noticed_where_threads_are_not_treated_alike(kernels, fault):
    assert run(kernels, fault, REVERSE) is not None
    assert all(run(kernels, fault, RANDOM, seed) is not None for seed in range(10))


def test_sentences_name_kernel_thread_and_line(kernels):
    sentence = run(kernels, "kReturnedLane", FORWARD)
    assert re.search(
        r"kernel sum_rows, block \(0, 0, 0\), thread \d+: a shuffle at .*seeded.cu:\d+: mask ffffffff names lane 5, which",
        sentence,
    )
    assert "threads wait at different barriers" in run(kernels, "kDivergentBarrier", FORWARD)


def test_launches_are_checked(kernels):
    out = torch.zeros(1)
    assert kernels.sum_rows_launch(out.data_ptr(), out.data_ptr(), 0, 4, 0) != 0
    assert b"launch of sum_rows: a grid has" in kernels.emulator_error()


@pytest.fixture(scope="module")
def sanitized(build_emulated):
    return build_emulated([EMULATOR / "seeded.cu"], "seeded-asan", (EMULATOR / "seeded_main.cpp",), shared=False, sanitize=True)


@pytest.mark.parametrize("fault", FAULTS)
def test_under_sanitizers(sanitized, fault):
    done = subprocess.run([str(sanitized), str(FAULTS.index(fault))], capture_output=True, text=True, check=False)
    if fault == "kNone":
        assert done.returncode == 0, done.stderr
    if fault in SANITIZERS_ONLY | {"kReadPastRow"}:
        assert done.returncode != 0 and re.search("AddressSanitizer|runtime error", done.stderr), done.stderr
