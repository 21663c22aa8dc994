"""What is shown in a terminal, and what is printed where there is none."""

from __future__ import annotations

import io
import math
import sys
from types import SimpleNamespace

import decoded
import pytest
import torch

pytest.importorskip("rich")
from edlm.view import Watch, show, trajectory
from rich.console import Console


def report(number: int, tokens: list, total: int = 3, energy: float = math.nan, rows: tuple[int, ...] | None = None, **changed):
    tokens = torch.tensor(tokens)
    rows = tuple(range(len(tokens))) if rows is None else rows
    fields = {
        "number": number,
        "total": total,
        "rows": torch.tensor(rows, dtype=torch.int64),
        "t": torch.full((len(rows),), 1 - number / total, dtype=torch.float64),
        "tokens": tokens,
        "ess": torch.full((len(tokens),), math.nan if math.isnan(energy) else 5.25),
        "log_Z": torch.full((len(tokens),), math.nan),
        "energy": torch.full((len(tokens),), energy),
        "num_candidates": torch.full((len(tokens),), 0 if math.isnan(energy) else 8),
        "nfe": number + 1,
        "energy_nfe": 0 if math.isnan(energy) else number + 1,
    }
    return SimpleNamespace(**fields | changed)


def terminal(height: int = 25) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=80, height=height, color_system="standard", _environ={})


def pipe() -> Console:
    return Console(file=io.StringIO(), width=80, _environ={})


def plain(console: Console) -> str:
    from rich.text import Text

    return Text.from_ansi(console.file.getvalue()).plain


REPORTS = [
    report(0, [[3, 0, 0, 2]]),
    report(1, [[3, 0, 7, 2]], energy=-12.25),
    report(2, [[3, 4, 7, 2]]),
]


def test_a_decode_on_a_terminal():
    console = terminal()
    with Watch(decoded.decode_letters, 0, console, refresh_per_second=1e9) as watch:
        watch(REPORTS[0])
        first = console.file.getvalue()
        watch(REPORTS[1])
        second = console.file.getvalue()[len(first) :]
        watch(REPORTS[2])
    everything = console.file.getvalue()
    assert "c\x1b[90m·\x1b[0m\x1b[90m·\x1b[0mb" in first and "step 1 of 3, t 1, nfe 1" in first
    assert "\x1b[30;43mg\x1b[0mb" in second  # newly opened
    assert "step 2 of 3, t 0.667, ESS 5.25 of 8, energy -12.25 nats, nfe 2 + 2 energy" in second
    assert "cdgb\n" in everything[len(first) + len(second) :]  # the text stays
    assert everything.endswith("step 3 of 3, t 0.333, nfe 3\x1b[0m\n") and "\x1b[?25h" in everything  # and so does the cursor


def test_what_was_shown_vanishes_where_it_is_asked_to():
    console = terminal()
    with Watch(decoded.decode_letters, 0, console, refresh_per_second=1e9, leave=False) as watch:
        for one in REPORTS:
            watch(one)
        before = console.file.getvalue()
    last = console.file.getvalue()[len(before) :].split("\x1b[?25h")[1]  # rich draws once more, and shows the cursor again
    assert "step 3 of 3" in before and last.strip() == "\x1b[1A\x1b[2K" * 2
    console = pipe()
    with Watch(decoded.decode_letters, 0, console, leave=False) as watch:
        watch(REPORTS[2])
    assert console.file.getvalue() == ""


def test_redraws_are_throttled():
    console = terminal()
    with Watch(decoded.decode_letters, 0, console, refresh_per_second=0.001) as watch:
        for number in range(50):
            watch(report(number, [[3, 0, 7, 2]], total=50))
    assert plain(console).count("step 1 of 50") == 1
    assert all(f"step {n} of 50" not in plain(console) for n in range(2, 50))
    assert "step 50 of 50" in plain(console)


class Untouchable:
    def __getattr__(self, name):
        raise AssertionError(f"{name} was read between redraws: on a GPU that waits")


def test_between_redraws_nothing_is_read():
    watch = Watch(decoded.decode_letters, 0, terminal(), refresh_per_second=0.001)
    with watch:
        watch(REPORTS[0])
        watch(Untouchable())
        watch(REPORTS[2])


def test_without_a_terminal_only_the_text_is_printed():
    console = pipe()
    with Watch(decoded.decode_letters, 0, console) as watch:
        for one in REPORTS:
            watch(one)
        assert console.file.getvalue() == ""
    assert console.file.getvalue() == "cdgb\n"
    console = pipe()
    with Watch(decoded.decode_letters, 0, console) as watch:
        watch(report(0, [[1] * 300]))
    assert console.file.getvalue() == "a" * 300 + "\n"  # not folded: there is no screen
    console = pipe()
    with Watch(decoded.decode_letters, 0, console):
        pass
    assert console.file.getvalue() == ""


def test_several_sequences():
    console = pipe()
    with Watch(decoded.decode_letters, 0, console, rows=2) as watch:
        watch(report(0, [[1, 2], [3, 4], [5, 6]]))
    assert console.file.getvalue() == "sequence 0\nab\nsequence 1\ncd\nand 1 more\n"
    console = terminal()
    with Watch(decoded.decode_letters, 0, console) as watch:
        one = report(1, [[1, 2], [0, 4], [5, 6]], rows=(0, 2), t=torch.tensor([0.5, 0.25]).double(), energy=2.0)
        one.energy[1] = one.ess[1] = math.nan
        watch(one)
    assert "t 0.25 to 0.5, mean ESS 5.25 of 8, mean energy 2.00 nats" in plain(console)


def test_a_screen_never_holds_more_than_fits():
    console = terminal(height=10)
    watch = Watch(decoded.decode_letters, 0, console, refresh_per_second=1e9)
    tall = [1] * 800 + [0] * 800  # twenty lines of eighty, the second half masked
    for tokens, expected in (([tall, tall], "·"), ([[1] * 80] * 9, "a")):
        with watch:
            screen = watch._screen(report(0, tokens))
            lines = screen.plain.split("\n")
            assert (
                len(lines) <= 9
                and max(map(len, lines)) <= 80
                and expected in screen.plain
                and lines[-1].startswith("step 1 of 3")
            )
    assert "·" in watch._screen(report(0, [tall])).plain.split("\n")[1]  # scrolled to where it is being decoded
    wide = report(1, [[1], [2]], energy=-123456.0, total=100000)
    assert watch._screen(wide).plain.split("\n")[-1].endswith("…")
    assert "and 7 more" in watch._screen(report(0, [[1] * 160] * 9)).plain


def test_what_tokens_say_does_not_reach_the_terminal():
    ids = list(range(1, len(decoded.AWKWARD) + 1))
    for console in (terminal(), pipe()):
        with Watch(decoded.decode_awkward, 0, console) as watch:
            watch(report(0, [ids]))
        out = console.file.getvalue()
        assert "\x1b[31m" not in out and "\x00" not in out and "\x9b" not in out
        assert "[red]" in out and "␛[31m" in out  # shown, and no markup
    show(trajectory(decoded.awkward(), 0, 0), decoded.decode_awkward, console := terminal())
    assert "\x1b[31m" not in console.file.getvalue() and "\x00" not in console.file.getvalue()


def test_an_interrupted_decode_leaves_what_there_is():
    console = terminal()
    watch = Watch(decoded.decode_letters, 0, console)

    def interrupted():
        with watch:
            watch(REPORTS[1])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert "c·gb\n" in console.file.getvalue() and "\x1b[?25h" in console.file.getvalue()


def test_a_finished_trajectory():
    console = Console(file=io.StringIO(), width=80, _environ={})
    show(trajectory(decoded.two(), 0, 0), decoded.decode_letters, console)
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["step", "t", "opened", "remasked", "ESS", "energy", "text"]
    assert lines[2:6] == [
        ["0", "c···"],
        ["1", "0.9", "2", "0", "1.00", "of", "8", "-12.25", "ca·b"],
        ["2", "0.6", "1", "1", "2.00", "of", "8", "-10.25", "c·gb"],
        ["3", "0.2", "1", "0", "cdgb"],
    ]
    assert "prompt" in console.file.getvalue() and "energy in nats" in console.file.getvalue()


def test_a_few_states_of_many():
    console = Console(file=io.StringIO(), width=80, _environ={})
    history = [[[1] * n + [0] * (40 - n)] for n in range(41)]
    one = trajectory(decoded.sample(history, [[0.2]] * 40), 0, 0)
    show(one, decoded.decode_letters, console, frames=5)
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.strip()]
    assert lines[0] == ["step", "t", "opened", "text"]  # no energy, no remasking: no columns
    assert [line[0] for line in lines[2:7]] == ["0", "10", "20", "30", "40"]
    assert [line[2] for line in lines[3:7]] == ["10"] * 4  # opened since the line above
    assert max(map(len, console.file.getvalue().splitlines())) <= 80
    show(trajectory(decoded.sample([[[1]], [[1]]], [[math.nan]]), 0, 0), decoded.decode_letters, console)


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="rows: expected"):
        Watch(decoded.decode_letters, 0, pipe(), rows=0)
    with pytest.raises(ValueError, match="refresh_per_second: expected"):
        Watch(decoded.decode_letters, 0, pipe(), refresh_per_second=0)
    with pytest.raises(ValueError, match="frames: expected"):
        show(trajectory(decoded.two(), 0, 0), decoded.decode_letters, pipe(), frames=1)
    for name in [m for m in sys.modules if m == "rich" or m.startswith("rich.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'edlm-torch\[view\]'"):
        Watch(decoded.decode_letters, 0)
    with pytest.raises(ImportError, match=r"edlm-torch\[view\]"):
        show(trajectory(decoded.two(), 0, 0), decoded.decode_letters)
