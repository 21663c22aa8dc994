"""The demo: it runs to its end, shows both decoders, and its verdict says what the numbers say."""

from __future__ import annotations

import math
import re

import edlm.demo as demo_module
import pytest
import torch
from edlm.config import from_dict, to_dict
from edlm.demo import _verdict, demo, run_config
from edlm.eval import Estimate
from edlm.train import TrainConfig


def bits(mean, stderr=0.01):
    return Estimate(mean=mean, stderr=stderr, count=64, unit="bits/character")


@pytest.mark.parametrize(
    ("mdlm", "edlm", "better"),
    [
        (bits(3.0), bits(2.5), True),  # lower is better
        (bits(2.5), bits(3.0), False),
        (bits(3.0), bits(3.0), False),
        (bits(3.0), bits(2.98), False),  # by 1.4 standard errors of the difference
        (bits(3.0), bits(2.96), True),  # by 2.8
        (bits(3.0, 0.2), bits(2.5, 0.2), False),  # by 1.8
        (bits(3.0, 0.3), bits(2.5, 0.0), False),  # the noise of either counts
        (bits(3.0, 0.0), bits(2.5, 0.3), False),
        (bits(3.0, math.nan), bits(2.5), False),
        (bits(math.nan), bits(2.5), False),
    ],
)
def test_the_verdict(mdlm, edlm, better):
    sentence, verdict = _verdict(8, mdlm, edlm)
    assert verdict is better
    assert ("NOT better by more than the noise" in sentence) is not better
    assert sentence.startswith("  8 steps: EDLM is ")
    if not math.isnan(mdlm.mean) and mdlm.mean != edlm.mean:
        assert f"{abs(mdlm.mean - edlm.mean):.3f}" in sentence
        assert ("better than MDLM" if edlm.mean < mdlm.mean else "worse than MDLM") in sentence


def test_both_runs_are_configurations_of_a_file():
    for kind in ("dit", "causal_lm"):
        config = run_config(kind, 7)
        assert config.model.kind == kind and config.steps == 7
        assert from_dict(to_dict(config), TrainConfig) == config


@pytest.fixture
def small(monkeypatch):
    """The demo's course with networks of one layer, on one thread."""
    real = demo_module.run_config

    def run(kind, steps):
        values = to_dict(real(kind, steps)) | {"batch_size": 2, "valid_windows": 4}
        return from_dict(values | {"model": {"kind": kind, "dim": 16, "num_layers": 1, "num_heads": 2}}, TrainConfig)

    monkeypatch.setattr(demo_module, "run_config", run)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("small")
def test_it_runs_and_shows_both(tmp_path, capsys):
    better = demo(tmp_path, denoiser_steps=2, ar_steps=2, num_samples=3)
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if re.match(r"(MDLM|EDLM), \d+ steps  ", line)]
    assert [row.split("  ")[0] for row in rows] == ["MDLM, 8 steps", "EDLM, 8 steps", "MDLM, 32 steps", "EDLM, 32 steps"]
    assert re.search(r"^real text +\d\.\d{3} \+- \d\.\d{3} ", out, re.MULTILINE)
    for row in rows:
        assert re.search(r"\d\.\d{3} \+- \d\.\d{3} .*\d\.\d{3} \+- \d\.\d{3} +\d\.\d{2} ", row), row
    ess = [row[len("MDLM, 32 steps") :].split()[7] for row in rows]
    assert ess[0] == ess[2] == "-" and all(1 <= float(value) <= 16 for value in (ess[1], ess[3]))
    verdicts = [line for line in out.splitlines() if "EDLM is" in line]
    assert [v.split()[0] for v in verdicts] == ["8", "32"]
    assert better is (not any("NOT better" in v for v in verdicts))
    samples = re.findall(r"^   (MDLM|EDLM), (\d+) steps +\|([a-z ]{64})\|$", out, re.MULTILINE)
    assert [(name, steps) for name, steps, _ in samples] == [("MDLM", "8"), ("EDLM", "8"), ("MDLM", "32"), ("EDLM", "32")]

    # Again: the models are used as they are, and the seed gives the same texts.
    again = demo(tmp_path, denoiser_steps=2, ar_steps=2, num_samples=3)
    repeated = capsys.readouterr().out
    assert again == better and all(text in repeated for _, _, text in samples)


def test_mistakes_are_told_before_anything_is_trained(tmp_path):
    for values, message in (
        ({"num_samples": 1}, "num_samples: expected at least 2 texts"),
        ({"denoiser_steps": 0}, "steps: expected a number >= 1, got 0"),
        ({"ar_steps": 0}, "steps: expected a number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            demo(tmp_path / "demo", **values)
    assert not (tmp_path / "demo").exists()
