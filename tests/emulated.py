"""Builds CUDA kernels against the emulator in tests/cuda_emulator, where the toolkit's headers and a compiler are at hand."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest

EMULATOR = Path(__file__).parent / "cuda_emulator"


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
    flags = ["-std=c++20", "-g", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror", f"-I{EMULATOR}", f"-isystem{include}"]

    def compile_(source: Path, prefix: str, *more: str) -> str:
        output = str(folder / f"{prefix}-{source.stem}.o")
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
    ) -> Path:
        checks = CHECKS[sanitize]
        as_kernel = ["-include", str(EMULATOR / "emulator.h"), "-x", "c++"]
        objects = [compile_(kernel, output, "-O1", *checks, *as_kernel) for kernel in kernels]
        objects += [compile_(source, output, "-O1", *checks) for source in sources]
        link = [compiler, "-pthread", *checks, *(["-shared"] if shared else [])]
        subprocess.run([*link, *objects, *scheduler(sanitize), "-o", str(folder / output)], check=True)
        return folder / output

    return build


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
