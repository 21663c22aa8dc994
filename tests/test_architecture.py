"""Who may import whom, and how large a room may grow: read from the sources, not from a run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "edlm"

# room -> rooms that it may import. protocols and config are leaves that everyone may use.
LEAVES = {"protocols", "config"}
MAY_IMPORT = {
    "protocols": set(),
    "config": set(),
    "ops": set(),
    "checkpoint": set(),
    "diffusion": {"ops"},
    "data": set(),
    "models": {"ops", "checkpoint"},
    "samplers": {"diffusion", "ops"},
    "eval": {"samplers", "diffusion", "ops"},
    "view": {"samplers"},
    "train": {"eval", "models", "data", "checkpoint", "samplers", "diffusion", "ops"},
    "__main__": {"cli"},
    "demo": {"train", "eval", "models", "data", "checkpoint", "samplers", "diffusion", "ops"},
    "cli": {"demo", "train", "eval", "view", "models", "data", "checkpoint", "samplers", "diffusion", "ops"},
}
# What the base install may import: everything else is an extra, and imported where it is used.
BASE = {"torch", "numpy", "safetensors", "tqdm"} | set(sys.stdlib_module_names)
EXTRAS = {
    "data": {"tokenizers", "datasets"},
    "eval": {"transformers", "pocketsphinx", "sacrebleu", "mauve", "lm_eval", "matplotlib"},
    "train": {"matplotlib"},
    "view": {"rich"},
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute names of everything that a file imports, at any depth, with line numbers."""
    parts = ["edlm", *path.relative_to(PACKAGE).with_suffix("").parts]
    package = parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(f"{module}.{alias.name}" if module == "edlm" else module, node.lineno) for alias in node.names]
    return found


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_walls(path):
    here = room(path)
    if here == "__init__":
        assert not [name for name, _ in imports(path) if name.startswith("edlm")], "importing edlm must import no room"
        return
    allowed = MAY_IMPORT[here] | LEAVES | {here, "_build", "__version__"} if here not in LEAVES else {here}
    for name, line in imports(path):
        top = name.split(".")[0]
        if top == "edlm":
            target = name.split(".")[1]
            assert target in allowed, f"{path.name}:{line}: {here} may not import {target}"
        else:
            assert top in BASE | EXTRAS.get(here, set()) | {"__future__"}, (
                f"{path.name}:{line}: {top} is not part of the base install"
            )


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) == "ops"], ids=lambda p: p.name)
def test_ops_import_torch_alone(path):
    foreign = {name.split(".")[0] for name, _ in imports(path)} - {"edlm", "torch"} - set(sys.stdlib_module_names)
    assert not foreign


def test_no_room_outgrows_one_noun():
    too_long = {}
    for path in [*SOURCES, *(ROOT / "csrc").rglob("*"), *(ROOT / "tests" / "cuda_emulator").rglob("*")]:
        limit = 400 if path.suffix == ".py" else 500
        if path.is_file() and len(path.read_text().splitlines()) > limit:
            too_long[str(path.relative_to(ROOT))] = len(path.read_text().splitlines())
    assert not too_long


def test_no_room_is_named_after_nothing():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "base", "core"}
    files = [p for folder in ("python", "csrc", "cmake", "tests", "benchmarks") for p in (ROOT / folder).rglob("*")]
    assert not [p for p in files if p.stem in vague]


def test_tests_mirror_the_sources():
    """A folder of tests for each room with code, and no test folder without its room; the emulator is a tool of tests."""
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    tested = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and list(p.glob("test_*.py"))}
    assert rooms == tested - {"cuda_emulator"}


def run(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_importing_is_light():
    """No transformers, no room, no CUDA context; then the public names are there."""
    done = run(
        """
import sys
import edlm
assert not [m for m in sys.modules if m.startswith("edlm.")], "rooms were imported"
for room in ("ops", "samplers", "diffusion", "models", "eval", "data", "train", "checkpoint", "view"):
    getattr(edlm, room)
assert edlm.generate is edlm.samplers.generate
import torch
optional = {"transformers", "datasets", "tokenizers", "matplotlib", "rich", "wandb", "pocketsphinx", "sacrebleu", "mauve", "lm_eval"}
foreign = optional & {m.split(".")[0] for m in sys.modules}
assert not foreign, foreign
assert not torch.cuda.is_initialized()
"""
    )
    assert done.returncode == 0, done.stderr


def test_the_loop_comes_without_our_networks():
    done = run(
        "import sys, edlm.samplers; assert not [m for m in sys.modules if m.startswith(('edlm.models', 'edlm.train', 'edlm.data'))]"
    )
    assert done.returncode == 0, done.stderr
