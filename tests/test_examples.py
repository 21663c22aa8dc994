"""Everything in examples/ works: the files load, the programs run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from edlm.config import load
from edlm.train import TrainConfig

EXAMPLES = Path(__file__).parent.parent / "examples"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.toml"))
PROGRAMS = sorted(EXAMPLES.glob("*.py"))


def test_there_are_some():
    assert {"tiny_dit.toml", "tiny_causal.toml"} <= {p.name for p in CONFIGS} and PROGRAMS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configurations_load_and_build(path):
    config = load(path, TrainConfig)
    assert config.model.kind == ("dit" if "dit" in path.stem or "mdlm" in path.stem else "causal_lm")
    model = load(path, TrainConfig, ["model.num_layers=1"]).model.build(vocab_size=28, mask_token_id=27, bos_token_id=27)
    assert model.kind == config.model.kind


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_commands_in_comments_name_their_own_file(path):
    commands = [line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# edlm ")]
    for command in commands:
        assert Path(shlex.split(command)[2]) == Path("examples/configs") / path.name


def test_pairs_differ_in_the_model_alone():
    """Same text, same windows, same optimiser: what one learns can be the other's energy."""
    for names in (("tiny_dit", "tiny_causal"), ("text8_mdlm_small", "text8_ar_small")):
        a, b = (load(EXAMPLES / "configs" / f"{name}.toml", TrainConfig) for name in names)
        assert (a.data, a.optim, a.batch_size) == (b.data, b.optim, b.batch_size)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_programs_run(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
