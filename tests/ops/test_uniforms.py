"""The kernels' uniforms, eight at a time, against csrc/philox.h, bit by bit: a lost low bit would show in no frequency."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("isa", ["baseline", "x86_64_v3", "x86_64_v4"])
def test_eight_at_once(isa, tmp_path):
    build = pytest.importorskip("edlm._build", reason="nothing is compiled")
    names, compiler = build.info()["cpu_isa_compiled"], shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    if isa not in names or names.index(isa) > names.index(build.info()["cpu_isa_used"]):
        pytest.skip(f"{isa} is not compiled in, or this processor does not run it")
    flags = [] if isa == "baseline" else [f"-march={isa.replace('_', '-')}"]
    program = tmp_path / "uniforms"
    source = ROOT / "tests/ops/uniforms.cpp"
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-Wno-psabi", f"-I{ROOT / 'csrc'}", *flags, str(source), "-o", str(program)], check=True
    )
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
