"""Configuration: TOML to dataclasses and back, and what a wrong file or a wrong ``--set`` is answered with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from edlm.config import from_dict, load, override, to_dict


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    hold: int | None = 7

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate: expected a number > 0, got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    name: str = "run"
    flag: bool = False
    mode: Literal["fast", "slow", 1] = "fast"
    limit: int | None = None
    size: int | Literal["auto"] = "auto"
    layers: tuple[int, ...] = ()
    grid: tuple[tuple[int, int], ...] = ()
    inner: Inner = field(default_factory=Inner)


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- good input -------------------------------------------------------------------------------------------------------------------


def test_values_of_every_type(tmp_path):
    text = """
        steps = 3
        name = "größer"
        flag = true
        mode = "slow"
        limit = 4
        size = 9
        layers = [1, 2, 3]
        grid = [[1, 2], [3, 4]]
        [inner]
        rate = 2
        betas = [0, 1.5]
    """
    config = load(write(tmp_path, text), Outer)
    assert config == Outer(
        steps=3,
        name="größer",
        flag=True,
        mode="slow",
        limit=4,
        size=9,
        layers=(1, 2, 3),
        grid=((1, 2), (3, 4)),
        inner=Inner(rate=2.0, betas=(0.0, 1.5)),
    )
    # An int is accepted for a float, and is one from then on.
    assert [type(x) for x in (config.inner.rate, *config.inner.betas)] == [float] * 3


def test_defaults(tmp_path):
    assert load(write(tmp_path, "steps = 1"), Outer) == Outer(steps=1)


@pytest.mark.parametrize(
    "config",
    [
        Outer(steps=1),
        Outer(steps=2, limit=5, mode=1, size=3, layers=(4,), grid=((1, 2),), inner=Inner(hold=None, betas=(0.1, 0.2))),
    ],
)
def test_round_trip(config):
    """Also through JSON, and also a None that replaces another default."""
    plain = to_dict(config)
    assert "limit" in plain or config.limit is None
    assert from_dict(json.loads(json.dumps(plain)), Outer) == config
    assert from_dict(plain, Outer) == config


# --- overrides --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=5", {"steps": 5}),
        ("inner.rate=1e-3", {"steps": 1, "inner": {"rate": 1e-3}}),
        (" inner . betas = [0.5, 0.6] ", {"steps": 1, "inner": {"betas": [0.5, 0.6]}}),
        ("flag=true", {"steps": 1, "flag": True}),
        ("mode=slow", {"steps": 1, "mode": "slow"}),
        ("name=two words", {"steps": 1, "name": "two words"}),
        ("name=a/b.txt", {"steps": 1, "name": "a/b.txt"}),
        ("name=a=b", {"steps": 1, "name": "a=b"}),
        ('name="5"', {"steps": 1, "name": "5"}),
        ('name=""', {"steps": 1, "name": ""}),
    ],
)
def test_override(text, expected):
    values = {"steps": 1}
    override(values, text)
    assert values == expected


def test_overrides_win_in_order_and_keep_their_neighbours(tmp_path):
    path = write(tmp_path, "steps = 1\n[inner]\nrate = 3.0\nhold = 2\n")
    config = load(path, Outer, ["inner.rate=4", "inner.rate=5", "mode=slow"])
    assert config == Outer(steps=1, mode="slow", inner=Inner(rate=5.0, hold=2))


@pytest.mark.parametrize("text", ["", "steps", "=3", ".=3", "a..b=3", "inner.=3", "steps=", "steps=  ", "steps=1\nname=2"])
def test_malformed_override(text):
    values = {"steps": 1}
    with pytest.raises(ValueError, match=r"--set: expected key=value, such as optim.lr=1e-3, got ") as caught:
        override(values, text)
    assert repr(text) in str(caught.value)
    assert values == {"steps": 1}


@pytest.mark.parametrize("raw", ["[0.9,", '"half', "{a=", "'half"])
def test_override_that_was_meant_as_toml(raw):
    with pytest.raises(ValueError, match="--set: name: expected a TOML value or a bare word, got "):
        override({}, f"name={raw}")


def test_override_through_a_value():
    with pytest.raises(ValueError, match=r"--set: steps.deep: expected steps to be a table, got a value"):
        override({"steps": 1}, "steps.deep=3")


def test_override_is_checked_like_the_file(tmp_path):
    path = write(tmp_path, "steps = 1")
    with pytest.raises(ValueError, match=r"unknown key inner.rat; did you mean inner.rate\?"):
        load(path, Outer, ["inner.rat=3"])
    with pytest.raises(ValueError, match="inner: expected a table, got 3"):
        load(path, Outer, ["inner=3"])


# --- bad files --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "missing key steps$"),
        ("step = 1", r"unknown key step; did you mean steps\?"),
        ("steps = 1\nzzzz = 2", r"unknown key zzzz; known here: steps, name, flag, .*inner"),
        ("steps = 1\n[inner]\nbeta = 1", r"unknown key inner.beta; did you mean inner.betas\?"),
        ("steps = true", r"steps: expected int, got True \(bool\)"),
        ("steps = 1.0", r"steps: expected int, got 1.0 \(float\)"),
        ('steps = "1"', r"steps: expected int, got '1' \(str\)"),
        ("steps = 1\nname = 3", r"name: expected str, got 3 \(int\)"),
        ("steps = 1\nflag = 1", r"flag: expected bool, got 1 \(int\)"),
        ("steps = 1\nmode = 'medium'", r"mode: expected one of 'fast', 'slow', 1, got 'medium'"),
        ("steps = 1\nmode = true", r"mode: expected one of 'fast', 'slow', 1, got True"),
        ("steps = 1\nmode = ['fast']", r"mode: expected one of .*, got \['fast'\]"),
        ("steps = 1\nlimit = 'none'", r"limit: expected int, got 'none' \(str\)"),
        ("steps = 1\nsize = 2.5", r"size: expected int or .*auto.*, got 2.5 \(float\)"),
        ("steps = 1\nlayers = [1, 'a']", r"layers: expected int, got 'a' \(str\)"),
        ("steps = 1\nlayers = 3", r"layers: expected a list, got 3"),
        ("steps = 1\ngrid = [[1, 2], [3]]", r"grid: expected a list of 2, got \[3\]"),
        ("steps = 1\ninner = 4", "inner: expected a table, got 4"),
        ("steps = 1\n[inner]\nrate = 'fast'", r"inner.rate: expected float, got 'fast' \(str\)"),
        ("steps = 1\n[inner]\nrate = true", r"inner.rate: expected float, got True \(bool\)"),
        ("steps = 1\n[inner]\nbetas = [0.9]", r"inner.betas: expected a list of 2, got \[0.9\]"),
        ("steps = 1\n[inner]\nbetas = [0.9, 0.99, 1.0]", r"inner.betas: expected a list of 2"),
        ("steps = 1\n[inner]\nbetas = [0.9, '1']", r"inner.betas: expected float, got '1' \(str\)"),
        ("steps = 1\n[inner]\nbetas = 0.9", r"inner.betas: expected a list of 2, got 0.9"),
        ("steps = 1\n[inner]\nrate = -1.0", r"run.toml: inner: rate: expected a number > 0, got -1.0$"),
        ("steps = = 1", "expected TOML, got a syntax error: .*line 1"),
        ("steps = 1\nsteps = 2", "expected TOML, got a syntax error"),
    ],
)
def test_bad_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load(path, Outer)
    assert str(caught.value).startswith(f"{path}: ")


def test_not_text_and_not_there(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(FileNotFoundError, match=r"run\.toml"):
        load(path, Outer)
    path.write_bytes(b"name = '\xff\xfe'")
    with pytest.raises(ValueError, match=r"run\.toml: expected TOML, which is UTF-8, got other bytes"):
        load(path, Outer)


@pytest.mark.parametrize("values", [[1], "steps", None, 3])
def test_top_level_is_a_table(values: Any):
    with pytest.raises(ValueError, match="here: top level: expected a table, got "):
        from_dict(values, Outer, source="here")
