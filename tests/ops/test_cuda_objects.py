"""What nvcc makes of csrc/cuda, without a GPU: registers, shared memory, spills, and the instructions of loops that read logits.

Objects are looked at, nothing is run: this says what a kernel costs a multiprocessor, not how fast it is.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90", "100")
FLAGS = ["-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}", "-Werror", "all-warnings"]
FLAGS += ["-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-cubin"]

# Registers: of 65536 a multiprocessor, so that four blocks of 256 threads run at once with 64, and two with 128.
# Shared memory: what a launcher leaves for it beside a row's tiles (kStaticShared), or little.
BESIDE_TILES, LITTLE = 8 << 10, 1 << 10
LIMITS = {
    "sample_rows<plain>": (64, BESIDE_TILES),
    "sample_rows<tempered>": (64, BESIDE_TILES),
    "sample_rows<filtered>": (128, BESIDE_TILES),
    "sample_small": (64, 0),
    "gather": (64, BESIDE_TILES),
    "fold": (64, BESIDE_TILES),
    "backward": (64, 0),
    "select": (128, 0),
    "resample": (64, LITTLE),
    "reverse": (64, 0),
}
MODES = ("plain", "tempered", "filtered")
DTYPES = {"f": "float", "d": "double", "13__nv_bfloat16": "bf16", "6__half": "half"}
BYTES = {"float": 4, "bf16": 2, "half": 2}
LANE_COLUMNS = 16  # of a tile of 512


class Kernel(NamedTuple):
    name: str  # as LIMITS has it
    dtype: str | None


def kernel_of(mangled: str) -> Kernel:
    names = "|".join({name.split("<")[0] for name in LIMITS})
    found = re.search(rf"\d({names})(?:I({'|'.join(DTYPES)})?(?:LN\w*?4ModeE(\d)E)?|(?=E))", mangled)
    assert found, f"a kernel without limits: {mangled}"
    mode = f"<{MODES[int(found[3])]}>" if found[3] else ""
    return Kernel(found[1] + mode, DTYPES.get(found[2]) or ("float" if found[1] == "fold" else None))


class Cubin(NamedTuple):
    path: Path
    said: str  # by nvcc, and by ptxas -v

    @property
    def warnings(self) -> list[str]:
        """All but what ptxas -v tells of every kernel."""
        return [
            line
            for line in self.said.splitlines()
            if line.strip() and not re.match(r"ptxas info|    \d+ bytes stack frame", line)
        ]


@pytest.fixture(scope="module")
def cubins(tmp_path_factory) -> dict[tuple[str, str], Cubin]:
    """(source, architecture) -> its object."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    folder = tmp_path_factory.mktemp("cubins")

    def compile_(of: tuple[Path, str]) -> tuple[tuple[str, str], Cubin]:
        source, architecture = of
        path = folder / f"{source.stem}-{architecture}.cubin"
        target = f"arch=compute_{architecture},code=sm_{architecture}"
        command = [nvcc, *FLAGS, "-gencode", target, str(source), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        cubin = Cubin(path, done.stdout + done.stderr)
        assert done.returncode == 0, "\n".join(cubin.warnings)
        return (source.stem, architecture), cubin

    longest_first = sorted(SOURCES, key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(compile_, [(source, architecture) for source in longest_first for architecture in ARCHITECTURES]))


class Resources(NamedTuple):
    kernel: Kernel
    stack: int
    spilled: int
    registers: int
    shared: int


def resources(said: str) -> Iterator[Resources]:
    for part in said.split("Compiling entry function '")[1:]:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        yield Resources(
            kernel_of(part.split("'")[0]),
            int(frame[1]),
            int(frame[2]) + int(frame[3]),
            int(re.search(r"Used (\d+) registers", part)[1]),
            int(shared[1]) if shared else 0,
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_warned_of(cubins, architecture):
    for source in SOURCES:
        assert not cubins[source.stem, architecture].warnings


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(cubins, architecture):
    seen = set()
    for source in SOURCES:
        for used in resources(cubins[source.stem, architecture].said):
            registers, shared = LIMITS[used.kernel.name]
            assert (used.stack, used.spilled) == (0, 0), used
            assert used.registers <= registers, used
            assert used.shared <= shared, used
            seen.add(used.kernel.name)
    assert seen == set(LIMITS), "each kernel has limits, and each limit a kernel"


# --- instructions ---------------------------------------------------------------------------------------------------------------


class Instruction(NamedTuple):
    address: int
    guard: str  # the predicate without which it is not executed, or none
    text: str

    @property
    def target(self) -> int | None:
        found = re.match(r"BRA(?:\.U)?(?: !?U?P\w+,)? 0x([0-9a-f]+)", self.text)
        return int(found[1], 16) if found else None

    @property
    def may_fall_through(self) -> bool:
        return self.target is None or bool(self.guard) or bool(re.match(r"BRA\S* !?U?P", self.text))

    @property
    def is_exponential(self) -> bool:
        return self.text.startswith("MUFU.EX2")

    @property
    def is_wide_load(self) -> bool:
        return self.text.startswith("LDG.E.128.CONSTANT")


def cuobjdump() -> tuple[str, dict[str, str]]:
    """The tool, and the environment that it wants: from PATH, or from the wheels that the skip names."""
    spec = importlib.util.find_spec("nvidia")
    wheels = [
        str(at.parent) for root in (spec.submodule_search_locations if spec else []) for at in Path(root).glob("*/bin/cuobjdump")
    ]
    path = os.pathsep.join([os.environ.get("PATH", ""), *wheels])
    for tool in ("cuobjdump", "nvdisasm"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    return shutil.which("cuobjdump", path=path), os.environ | {"PATH": path}


@pytest.fixture(scope="module")
def code(cubins) -> dict[Kernel, list[Instruction]]:
    """What each kernel is made of, for sm_90."""
    tool, environment = cuobjdump()
    found: dict[Kernel, list[Instruction]] = {}
    for source in SOURCES:
        path = cubins[source.stem, "90"].path
        done = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True, check=True, env=environment)
        for part in done.stdout.split("Function : ")[1:]:
            listing = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+) )?\s*(\S.*?)\s*;", part, re.M)
            kernel = kernel_of(part.split()[0])
            found[kernel] = [Instruction(int(address, 16), guard, text) for address, guard, text in listing]
    return found


def exponentials_of(body: list[Instruction]) -> int:
    return sum(at.is_exponential for at in body)


def reading_loops(listing: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops that load sixteen bytes at a time and take exponentials of all that they load."""
    backward = [(at.target, at.address) for at in listing if at.target is not None and at.target < at.address]
    found: list[list[Instruction]] = []
    for first, last in sorted(backward, key=lambda ends: ends[1] - ends[0]):
        body = [at for at in listing if first <= at.address <= last]
        is_reading = exponentials_of(body) >= LANE_COLUMNS and any(at.is_wide_load for at in body)
        if is_reading and not any(first <= inner[0].address and inner[-1].address <= last for inner in found):
            found.append(body)
    return found


def shortest_turn(body: list[Instruction], loads: int, exponentials: int) -> int:
    """Instructions of one turn of a loop on its shortest way, with so many wide loads and exponentials.

    That is an aligned row's turn in the middle of its columns: ends of a row and excluded columns branch off.
    """
    index = {at.address: i for i, at in enumerate(body)}
    best: list[dict[tuple[int, int], int]] = [{} for _ in body]

    def arrive(i: int, loaded: int, taken: int, before: int) -> None:
        if i >= len(body):
            return
        state = (
            min(loads, loaded + (body[i].is_wide_load and not body[i].guard)),
            min(exponentials, taken + body[i].is_exponential),
        )
        best[i][state] = min(best[i].get(state, 1 << 30), before + 1)

    arrive(0, 0, 0, 0)
    for i, at in enumerate(body):
        for (loaded, taken), so_far in best[i].items():
            if at.target is not None and at.target > at.address and at.target in index:
                arrive(index[at.target], loaded, taken, so_far)
            if at.may_fall_through:
                arrive(i + 1, loaded, taken, so_far)
    assert (loads, exponentials) in best[-1], f"no way through the loop has {loads} wide loads and {exponentials} exponentials"
    return best[-1][loads, exponentials]


READERS = [Kernel(f"sample_rows<{mode}>", dtype) for mode in MODES for dtype in BYTES]
READERS += [*(Kernel("gather", dtype) for dtype in BYTES), Kernel("fold", "float")]


def exponentials_an_element(kernel: Kernel) -> int:
    """A second one is for the model's own log-probability, at temperature 1."""
    return 2 if kernel.name in ("sample_rows<tempered>", "sample_rows<filtered>") else 1


def measuring_loops(kernel: Kernel, listing: list[Instruction]) -> list[list[Instruction]]:
    """Those of all columns. A filter may have another, of what it keeps."""
    return [body for body in reading_loops(listing) if exponentials_of(body) == exponentials_an_element(kernel) * LANE_COLUMNS]


def slots_an_element(kernel: Kernel, listing: list[Instruction]) -> float:
    loads, exponentials = BYTES[kernel.dtype], exponentials_an_element(kernel) * LANE_COLUMNS
    return min(shortest_turn(body, loads, exponentials) for body in measuring_loops(kernel, listing)) / LANE_COLUMNS


def test_nothing_is_kept_in_local_memory(code):
    for kernel, listing in code.items():
        assert not [at for at in listing if re.match(r"(LDL|STL)\b", at.text)], kernel


@pytest.mark.parametrize("kernel", READERS, ids=str)
def test_reading_loops(code, kernel):
    assert measuring_loops(kernel, code[kernel]), "no loop takes as many exponentials as it has columns"
    for body in reading_loops(code[kernel]):
        assert sum(at.is_wide_load for at in body) >= BYTES[kernel.dtype]
        assert exponentials_of(body) in (LANE_COLUMNS, exponentials_an_element(kernel) * LANE_COLUMNS)
        assert not [at for at in body if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\w+\..*F64", at.text)], (
            "doubles are slow in a loop"
        )


@pytest.mark.parametrize("dtype", BYTES)
def test_gradients_are_loaded_and_stored_sixteen_bytes_at_a_time(code, dtype):
    listing = code[Kernel("backward", dtype)]
    assert any(at.text.startswith("LDG.E.128") for at in listing)
    assert any(re.match(r"STG\.E(\.\w+)*?\.128", at.text) for at in listing)


# An H200 reads 4.8 TB/s, which is 2.4e12 elements of two bytes, and the schedulers of its 132 multiprocessors, four each, issue
# 33.4e12 lanes' instructions at 1.98 GHz: 13.9 an element. No scheduler issues in every cycle: a tenth is left for that. float32
# has twice the time. An exponential holds its unit for eight of a scheduler's cycles, so two of them for 16: up to there, other
# instructions cost nothing.
SLOTS = 132 * 4 * 32 * 1.98e9 / 4.8e12


@pytest.mark.parametrize("kernel", READERS, ids=str)
def test_memory_is_what_reading_waits_for(code, kernel):
    slots, available = slots_an_element(kernel, code[kernel]), 0.9 * SLOTS * BYTES[kernel.dtype]
    if exponentials_an_element(kernel) == 2:
        available = max(available, 16)
    assert slots <= available
