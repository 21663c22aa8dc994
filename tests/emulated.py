"""Builds CUDA kernels against the emulator in tests/cuda_emulator, where the toolkit's headers and a compiler are at hand."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

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


def builder(folder: Path):
    """build(kernels, output, sources, shared=, sanitize=) -> path in ``folder``; skips with the reason where something is missing."""
    compiler, include = shutil.which("g++"), toolkit_include()
    if compiler is None:
        pytest.skip("g++ is not installed")
    if os.uname().machine != "x86_64":
        pytest.skip("the emulator switches stacks on x86-64 only")
    if include is None:
        pytest.skip("the CUDA toolkit's headers (cuda_bf16.h) were not found: set CUDA_HOME")

    def build(kernels: list[Path], output: str, sources: tuple[Path, ...] = (), *, shared: bool = True, sanitize: bool = False):
        flags = ["-std=c++20", "-O1", "-g", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{EMULATOR}", f"-isystem{include}"]
        checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"] if sanitize else []
        objects = []

        def compile_(source: Path, *more: str) -> None:
            objects.append(str(folder / f"{output}-{source.stem}.o"))
            subprocess.run([compiler, *flags, *more, "-c", str(source), "-o", objects[-1]], check=True)

        for kernel in kernels:
            compile_(kernel, *checks, "-include", str(EMULATOR / "emulator.h"), "-x", "c++")
        for source in sources:
            compile_(source, *checks)
        # The scheduler itself is never instrumented: it changes stacks under the sanitizer's feet, and tells it so.
        compile_(EMULATOR / "emulator.cpp", *(["-DEMULATOR_ASAN"] if sanitize else []))
        subprocess.run([compiler, *checks, *(["-shared"] if shared else []), *objects, "-o", str(folder / output)], check=True)
        return folder / output

    return build
