"""What a user meets before anything runs: configuring without torch or compiler, the sdist, and what a wheel built from it holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The sources alone, as an sdist has them: no build folder of the checkout is touched."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "cmake", "csrc", "python"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "PATH": PATH, **environment})


def configure(tree, build, *options, **environment):
    pybind11 = pytest.importorskip("pybind11", reason="pip install .[test] brings it")
    if not shutil.which("cmake", path=PATH) or not shutil.which("ninja", path=PATH):
        pytest.skip("cmake or ninja is not installed; pip install .[test] brings both")
    return run(
        "cmake", "-S", str(tree), "-B", str(build), "-G", "Ninja", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options, **environment
    )  # fmt: skip


def test_without_torch_the_remedy_is_one_line(tree, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare"))
    done = configure(tree, tmp_path / "build", f"-DPython_EXECUTABLE={tmp_path / 'bare' / 'bin' / 'python'}")
    assert done.returncode != 0
    text = " ".join(done.stderr.split())
    assert "edlm: torch is not installed for" in text
    assert "pip install torch==2.13.0 && pip install ." in text


def test_without_a_compiler(tree, tmp_path):
    done = configure(tree, tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}", CXX="/nonexistent/c++")
    assert done.returncode != 0
    text = " ".join(done.stderr.split())
    assert "edlm: no working C++20 compiler" in text and "g++" in text


@pytest.mark.parametrize(
    ("value", "message"), [("MAYBE", "expected AUTO, ON, OFF or COMPILE, got MAYBE"), ("ON", "EDLM_CUDA=ON needs")]
)
def test_cuda_option(tree, tmp_path, value, message):
    import torch

    if value == "ON" and torch.version.cuda:
        pytest.skip("this torch has CUDA")
    done = configure(tree, tmp_path / "build", f"-DPython_EXECUTABLE={sys.executable}", f"-DEDLM_CUDA={value}")
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_cuda_library_compiles_against_a_torch_without_cuda(tree, tmp_path):
    """EDLM_CUDA=COMPILE: bindings and kernels, for one architecture; what the library leaves undefined is torch's, or the system's."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    build = tmp_path / "build"
    options = f"-DPython_EXECUTABLE={sys.executable}", "-DEDLM_CUDA=COMPILE", "-DCMAKE_CUDA_ARCHITECTURES=90"
    done = configure(tree, build, *options)
    assert done.returncode == 0, done.stderr
    assert "edlm: CUDA compiled only: NVIDIA" in done.stdout and "sm 90" in done.stdout
    done = run("ninja", "-C", str(build), "_C_cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    if shutil.which("nm"):
        lines = run("nm", "-D", "--undefined-only", str(build / "_C_cuda.so")).stdout.splitlines()
        names = [line.split()[-1] for line in lines]
        ours = [n for n in names if "@" not in n and not n.startswith(("aoti_torch_", "torch_", "_ITM_", "__gmon_", "__cxa_"))]
        assert len(names) > 20 and not ours
        defined = run("nm", "-D", "--defined-only", str(build / "_C_cuda.so")).stdout
        assert "edlm_cuda" not in defined  # nothing that another library could take for its own
    to_install = (build / "cmake_install.cmake").read_text()
    assert "/_C.so" in to_install and "_C_cuda" not in to_install


def test_sdist_and_the_wheel_from_it(tree, tmp_path):
    """The sdist holds the sources and the bundled text; a wheel built from it, without isolation, holds the libraries as well."""
    pytest.importorskip("scikit_build_core", reason="pip install .[test] brings it")
    pytest.importorskip("pybind11", reason="pip install .[test] brings it")
    hook = "import sys; from scikit_build_core.build import build_{0} as build; print(build(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", hook.format("sdist"), str(tmp_path)], cwd=tree, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("edlm_torch-*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    for name in (
        "CMakeLists.txt",
        "cmake/isa.cmake",
        "csrc/cpu/sampling.cpp",
        "csrc/cuda/sampling.cu",
        "python/edlm/data/austen.txt.xz",
        "README.md",
        "LICENSE",
    ):
        assert name in names
    source = next(path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith("edlm_torch-"))
    done = subprocess.run(
        [sys.executable, "-c", hook.format("wheel"), str(tmp_path)],
        cwd=source, capture_output=True, text=True, check=False, env={**os.environ, "PATH": PATH},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("edlm_torch-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        metadata = archive.read(next(n for n in inside if n.endswith("METADATA"))).decode()
    assert "edlm/_C.so" in inside and "edlm/data/austen.txt.xz" in inside and "edlm/cli/__init__.py" in inside
    assert any(n.startswith("edlm/_build.") for n in inside)
    assert not [n for n in inside if n.startswith(("tests/", "csrc/"))]
    assert "Name: edlm-torch" in metadata and "License-Expression: Apache-2.0" in metadata


def test_no_local_path_is_compiled_in():
    """What was built carries no path of the machine that built it."""
    build = pytest.importorskip("edlm._build", reason="nothing is compiled")
    import edlm.ops._library as library

    for path in [*library.LOADED.values(), Path(build.__file__)]:
        assert str(ROOT / "csrc").encode() not in Path(path).read_bytes()
