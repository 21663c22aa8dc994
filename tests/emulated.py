"""Builds CUDA kernels against the emulator in tests/cuda_emulator, where the toolkit's headers and a compiler are at hand."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch

ROOT = Path(__file__).parent.parent
EMULATOR = ROOT / "tests" / "cuda_emulator"
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
BINDINGS = [ROOT / "csrc" / f"{kernel.stem}.cpp" for kernel in KERNELS if (ROOT / "csrc" / f"{kernel.stem}.cpp").is_file()]


def toolkit_include() -> Path | None:
    """The folder with vector_types.h and cuda_bf16.h: of CUDA_HOME, of nvcc, or of the usual place."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parent.parent) if nvcc else None, "/usr/local/cuda"]
    for home in homes:
        for include in ("include", "targets/x86_64-linux/include"):
            if home and (Path(home) / include / "cuda_bf16.h").is_file():
                return Path(home) / include
    return None


SCHEDULER = [EMULATOR / f"{noun}.cpp" for noun in ("block", "fiber", "launch", "memory", "races", "warp")]
CHECKS = {
    None: [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


def builder(folder: Path):
    """build(kernels, output, sources, shared=, sanitize=) -> path in ``folder``; skips with the reason where something is missing.

    ``sanitize`` is None, "address" (with UndefinedBehaviorSanitizer) or "thread". With one of these, build a program: shared=False.
    """
    compiler, include = shutil.which("g++"), toolkit_include()
    if compiler is None:
        pytest.skip("g++ is not installed")
    if os.uname().machine != "x86_64":
        pytest.skip("the emulator switches stacks on x86-64 only")
    if include is None:
        pytest.skip("the CUDA toolkit's headers (cuda_bf16.h) were not found: set CUDA_HOME")
    flags = [
        "-std=c++20",
        "-g",
        "-fPIC",
        "-pthread",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        f"-I{EMULATOR}",
        f"-isystem{include}",
    ]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]

    def compile_(source: Path, prefix: str, *more: str) -> str:
        output = str(folder / f"{prefix}-{source.name}.o")
        subprocess.run([compiler, *flags, *more, "-c", str(source), "-o", output], check=True)
        return output

    @functools.cache
    def scheduler(sanitize: str | None) -> list[str]:
        # Never instrumented: it changes stacks under the sanitizers' feet, and tells them so.
        told = {None: [], "address": ["-DEMULATOR_ASAN"], "thread": ["-DEMULATOR_TSAN"]}[sanitize]
        return [compile_(source, f"emulator-{sanitize}", "-O2", *told) for source in SCHEDULER]

    def build(
        kernels: list[Path],
        output: str,
        sources: tuple[Path, ...] = (),
        *,
        shared: bool = True,
        sanitize: Literal["address", "thread"] | None = None,
        more: tuple[str, ...] = (),
        libraries: tuple[str, ...] = (),
    ) -> Path:
        checks = CHECKS[sanitize]
        as_kernel = ["-include", str(EMULATOR / "emulator.h"), "-x", "c++"]
        objects = [compile_(kernel, output, "-O1", *checks, *as_kernel) for kernel in kernels]
        objects += [compile_(source, output, "-O1", *checks, *more) for source in sources]
        link = [compiler, "-pthread", *checks, *(["-shared"] if shared else [])]
        subprocess.run([*link, *objects, *scheduler(sanitize), *libraries, "-o", str(folder / output)], check=True)
        return folder / output

    return build


class EmulatedOps:
    """The kernels of csrc/cuda and their bindings, on the emulator: ``torch.ops.edlm_emulated``, for tensors of the CPU.

    The bindings are those of the package, compiled a third time: they check, allocate, and call the launchers as a GPU's do.
    """

    def __init__(self, build) -> None:
        import edlm.ops

        root = Path(torch.__file__).parent
        target = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DEDLM_CUDA", "-DEDLM_EMULATED", "-fvisibility=hidden")
        path = build(
            KERNELS,
            "emulated_ops.so",
            tuple(BINDINGS),
            more=(*target, f"-isystem{root / 'include'}"),
            libraries=(f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu"),
        )
        made_of_others = ("linear_log_probs", "linear_cross_entropy")
        self.names = [name for name in edlm.ops.backends() if not name.startswith(made_of_others)]
        self.schemas = torch.library.Library("edlm_emulated", "DEF")
        for name in self.names:
            self.schemas.define(str(getattr(torch.ops.edlm, name).default._schema).removeprefix("edlm::"))
        torch.ops.load_library(path)
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_schedule.argtypes = [ctypes.c_int, ctypes.c_uint64]
        self.library.emulator_error.restype = ctypes.c_char_p

    def schedule(self, order: int, seed: int = 1) -> None:
        """How threads take turns: 0 forward, 1 reverse, 2 random."""
        self.library.emulator_schedule(order, seed)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Inside, the ops of ``edlm`` run these kernels for tensors of the CPU."""
        override = torch.library.Library("edlm", "IMPL")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Warning only once for all operators")
                for name in self.names:
                    override.impl(name, getattr(torch.ops.edlm_emulated, name).default, "CPU")
            yield
        finally:
            override._destroy()


def run_sanitized(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs what was built with ``sanitize``, until its first report; skips with the reason where ThreadSanitizer cannot start."""
    command = [str(program), *arguments]
    # ThreadSanitizer wants memory where it is used to: addresses are not to be random, where the machine lets us say so.
    fixed = [shutil.which("setarch") or "false", "-R"]
    if subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode == 0:
        command = [*fixed, *command]
    # At the end it would wait a second for threads, which its fibers are to it.
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if "FATAL: ThreadSanitizer: unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot start: addresses are random here, and setarch -R is not allowed")
    return done
