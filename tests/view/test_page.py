"""The page: what it embeds, that nothing a token says gets out of its place, and what a browser makes of it."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import decoded
import pytest
import torch
from edlm.view import page, trajectory, write_page
from edlm.view.pieces import Pieces, printable


def letters(sample=None, **settings) -> str:
    sample = sample if sample is not None else decoded.two()
    return page(sample, mask_token_id=0, decode=decoded.decode_letters, **settings)


def awkward_page() -> str:
    return page(
        decoded.awkward(),
        mask_token_id=0,
        decode=decoded.decode_awkward,
        title="</title><b>&amp;\x00",
        settings={"<i>": "</td>&", "none": None, "pair": (0.8, 1.0), "empty": ""},
    )


class Document(HTMLParser):
    """Elements with their attributes, and the text of those that are asked for by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.stack: list[str | None] = []
        self.texts: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input"):
            self.stack.append(dict(attrs).get("id"))

    def handle_endtag(self, tag):
        self.stack.pop()

    def handle_data(self, data):
        for name in self.stack:
            if name is not None:
                self.texts[name] = self.texts.get(name, "") + data

    def pre(self, name: str) -> str:
        """The text of a <pre>, without the newline that browsers drop there."""
        assert self.texts[name][0] == "\n"
        return self.texts[name][1:]

    @property
    def data(self) -> dict:
        return json.loads(self.texts["data"])


def test_the_texts_are_there_without_a_script():
    document = Document(letters())
    assert document.pre("text") == "cdgb" and document.pre("text-1") == "fgeh"


def test_a_first_newline_of_the_text_survives():
    sample = decoded.sample([[[0, 0]], [[1, 2]]], [[1.0]])
    document = page(sample, mask_token_id=0, decode=lambda ids: "".join("_\nx"[i] for i in ids))
    assert Document(document).pre("text") == "\nx"


def test_the_data_are_the_trajectory():
    data = Document(letters()).data
    tokens = [data["ids"].index(i) for i in (1, 2)]
    assert data["pieces"][tokens[0]] == "a"
    first, second = data["sequences"]
    assert first["start"][1:] == [-1, -1, -1] and data["ids"][first["start"][0]] == 3
    assert first["frames"][0] == [0.9, [1, 3], tokens, [], 1.0, -1.0, -12.25, 8]
    assert first["frames"][1][3] == [1]
    assert first["frames"][2][4:] == [None, None, None, 0]  # NaN is no JSON
    assert len(second["frames"]) == 2


def test_infinite_energies_are_kept():
    sample = decoded.two()
    sample.energy[0, 0], sample.energy[1, 0] = math.inf, -math.inf
    frames = Document(letters(sample)).data["sequences"][0]["frames"]
    assert [frames[0][6], frames[1][6]] == ["Infinity", "-Infinity"]


def test_no_token_gets_out_of_its_place():
    text = awkward_page()
    document = Document(text)
    plain = Document(letters())
    # The same elements in the same order as a page of plain letters, but for the settings: nothing was injected.
    shape = [tag for tag, _ in document.elements if tag not in ("div", "table", "tbody", "tr", "th", "td", "option")]
    assert shape == [tag for tag, _ in plain.elements if tag not in ("div", "table", "tbody", "tr", "th", "td", "option")]
    assert text.count("</script>") == 2 and text.count("<script") == 2
    data = text[text.index('id="data">') : text.index("</script>")].removeprefix('id="data">')
    assert not set(data) & set("<>&\u2028\u2029\x00")
    pieces = Pieces(decoded.decode_awkward)
    assert dict(zip(document.data["ids"], document.data["pieces"], strict=True)) == {
        i: pieces[i] for i in range(1, len(decoded.AWKWARD) + 1)
    }
    assert document.pre("text") == printable("".join(decoded.AWKWARD))
    assert document.pre("text-1") == printable("".join(decoded.AWKWARD[::-1]))
    assert "\x00" not in text and "\r" not in text and "\x1b" not in text
    text.encode()  # no lone surrogate
    assert "<title>&lt;/title&gt;&lt;b&gt;&amp;amp;\u2400</title>" in text
    assert "&lt;i&gt;</th><td>&lt;/td&gt;&amp;</td>" in text and "<td>None</td>" in text and "<td>(0.8, 1.0)</td>" in text


def test_nothing_is_fetched():
    text = awkward_page()
    addresses = [
        value for _, attributes in Document(text).elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert addresses == ["data:,"]
    outside = re.sub(r"http://www\.w3\.org/2000/svg", "", text)  # a name, not an address
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp", outside)
    assert "default-src 'none'" in text and "unsafe" not in text


def test_masks_that_are_left_at_the_end():
    document = Document(letters(decoded.sample([[[0, 0, 0]], [[1, 0, 0]]], [[1.0]])))
    assert document.pre("text") == "a▁▁"


def test_errors():
    sample = decoded.two()
    sample.history = None
    with pytest.raises(ValueError, match="return_history=True"):
        letters(sample)
    sample.history = torch.zeros(1, 0, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least one sequence"):
        letters(sample)


def test_writing(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    write_page(path, decoded.two(), mask_token_id=0, decode=decoded.decode_letters, title="A title")
    assert path.read_bytes() == letters(title="A title").encode()
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match=r"path: expected a file in a folder that exists.*make '.*absent' first"):
        write_page(tmp_path / "absent" / "page.html", decoded.two(), mask_token_id=0, decode=decoded.decode_letters)
    with pytest.raises(ValueError, match="path: expected a file, got the folder"):
        write_page(tmp_path, decoded.two(), mask_token_id=0, decode=decoded.decode_letters)

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_page(path, decoded.two(), mask_token_id=0, decode=decoded.decode_letters, title="Another")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"] and "A title" in path.read_text()


@pytest.mark.parametrize(("remasked", "limit"), [(0, 1.2e6), (16, 3.0e6)])
def test_a_large_page_stays_small(remasked, limit):
    text = page(decoded.large(remasked=remasked), mask_token_id=0, decode=lambda ids: "".join(f" w{i}" for i in ids))
    assert len(text.encode()) < limit


# --- in a browser -----------------------------------------------------------------------------------------------------------------

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
in_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on the path")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000", "--enable-logging=stderr", "--log-level=0",
]  # fmt: skip


class Rendered:
    """What the page's script made of it."""

    def __init__(self, dom: str) -> None:
        self.root = re.search(r"<html[^>]*>", dom)[0]
        box = re.search(r'<div id="tokens"[^>]*>(.*?)</div>', dom, re.DOTALL)[1]
        spans = re.findall(r"<span([^>]*)>([^<]*)</span>", box)
        assert "".join(f"<span{a}>{t}</span>" for a, t in spans) == box
        self.classes = [re.search(r'class="([^"]*)"', a)[1] for a, _ in spans]
        self.texts = [html.unescape(t) for _, t in spans]
        self.status = html.unescape(re.search(r'<p id="status"[^>]*>(.*?)</p>', dom)[1])
        self.charts = re.findall(r"<h2>(.*?)</h2>", dom)
        self.dom = dom


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")

    def look(text: str, fragment: str = "", script: str = "") -> Rendered:
        path = folder / "page.html"
        # What a test adds runs after the page's own script; the page's policy would forbid it.
        path.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text) + f"<script>{script}</script>" if script else text)
        command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri() + fragment]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        rendered = Rendered(done.stdout)
        assert 'data-ready="true"' in rendered.root and "data-error" not in rendered.root, rendered.root
        return rendered

    return look


@in_a_browser
def test_the_page_starts_at_the_end(browse):
    seen = browse(letters(title="A title", settings={"steps": 3}))
    assert seen.texts == list("cdgb")
    assert seen.classes == ["prompt", "open now", "open", "open"]
    assert seen.status == "step 3 of 3, t = 0.2, opened 1"
    assert seen.charts == [
        "Masked positions",
        "Effective sample size",
        "Energy of the candidate taken",
        "log Z, from the mean weight",
    ]
    assert re.search(r'<pre id="text"[^>]*>cdgb</pre>', seen.dom)


@in_a_browser
@pytest.mark.parametrize(
    ("fragment", "texts", "classes", "status"),
    [
        (
            "#step=0",
            ["c", "", "", ""],
            ["prompt", "masked", "masked", "masked"],
            "start, before step 1 of 3, 3 of 4 positions masked",
        ),
        (
            "#sequence=0&step=2",
            ["c", "", "g", "b"],
            ["prompt", "masked lost", "open now", "open"],
            "step 2 of 3, t = 0.6, opened 1, masked again 1, ESS 2.00 of 8, energy −10.25 nats, log Z −3 nats",
        ),
        (
            "#sequence=1&step=1",
            ["", "", "e", ""],
            ["masked", "masked", "open now", "masked"],
            "step 1 of 2, t = 1, opened 1, ESS 1.50 of 8, energy −11.25 nats, log Z −2 nats",
        ),
        ("#sequence=1&step=99", list("fgeh"), ["open now", "open now", "open", "open now"], None),  # clamped
        ("#sequence=7&step=x", list("fgeh"), ["open now", "open now", "open", "open now"], None),
    ],
)
def test_an_address_names_a_state(browse, fragment, texts, classes, status):
    seen = browse(letters(), fragment)
    assert seen.texts == texts and seen.classes == classes
    assert status is None or seen.status == status


@in_a_browser
def test_every_state_of_an_awkward_text(browse):
    sample, text = decoded.awkward(), awkward_page()
    pieces = Pieces(decoded.decode_awkward)
    assert browse(text).texts == [pieces[i] for i in range(1, len(decoded.AWKWARD) + 1)]
    states = list(trajectory(sample, 1, 0).states())
    for step in (0, 1, len(states) // 2, len(states) - 1):
        seen = browse(text, f"#sequence=1&step={step}")
        assert seen.texts == [pieces[i] if i else "" for i in states[step]]
    assert seen.classes[decoded.AWKWARD[::-1].index("\n")].endswith(" newline")
    assert seen.classes[decoded.AWKWARD[::-1].index("")].endswith(" empty")
    assert seen.classes[decoded.AWKWARD[::-1].index("\u202e")].endswith(" turning")
    shown = re.search(r'<pre id="text-1"[^>]*>(.*?)</pre>', seen.dom, re.DOTALL)[1]
    assert html.unescape(shown) == "".join(seen.texts) == printable("".join(decoded.AWKWARD[::-1]))


@in_a_browser
def test_characters_of_several_tokens_are_whole_once_they_are_there(browse):
    tokens = [i + 1 for i in "é😀!".encode()]
    sample = decoded.sample([[[0] * 7], [[*tokens[:3], 0, *tokens[4:]]], [tokens]], [[1.0], [0.5]])
    text = page(sample, mask_token_id=0, decode=lambda ids: bytes(i - 1 for i in ids).decode(errors="replace"))
    assert browse(text).texts == ["é", "", "😀", "", "", "", "!"]
    seen = browse(text, "#step=1")
    assert seen.texts == ["é", "", "�", "", "�", "�", "!"] and seen.classes[1] == "open now" and seen.classes[3] == "masked"


@in_a_browser
def test_a_text_without_energies_or_without_steps(browse):
    sample = decoded.two()
    for name in ("ess", "log_Z", "energy"):
        getattr(sample, name).fill_(math.nan)
    seen = browse(letters(sample))
    assert seen.charts == ["Masked positions"] and "No energy was used" in seen.dom
    seen = browse(letters(decoded.sample([[[1, 2]], [[1, 2]]], [[math.nan]])))
    assert seen.texts == ["a", "b"] and seen.classes == ["prompt", "prompt"]
    sample = decoded.two()
    sample.energy[0, 0] = math.inf
    assert "energy ∞ nats" in browse(letters(sample), "#step=1").status


@in_a_browser
def test_playing_and_moving(browse):
    press = "const press = (key) => document.body.dispatchEvent(new KeyboardEvent('keydown', {key, bubbles: true}));"
    assert browse(letters(), script=press + "press('ArrowLeft'); press('ArrowLeft');").status.startswith("step 1 of 3")
    assert browse(letters(), "#step=0", press + "press('ArrowRight');").status.startswith("step 1 of 3")
    click = "document.getElementById('{}').click();"
    assert browse(letters(), script=click.format("previous")).status.startswith("step 2 of 3")
    playing = browse(letters(), script=click.format("play"))  # from the end: once more from the start, to the end
    assert (
        playing.status.startswith("step 3 of 3")
        and ">Play</button>" in playing.dom
        and "#sequence=0&amp;step=3" not in playing.dom
    )
    record = "const seen = []; new MutationObserver(() => seen.push(document.getElementById('status').textContent))"
    record += ".observe(document.getElementById('status'), {childList: true}); press(' ');"
    record += "setTimeout(() => { document.documentElement.dataset.seen = seen.join('|'); }, 4000);"
    seen = html.unescape(re.search(r'data-seen="([^"]*)"', browse(letters(), script=press + record).root)[1])
    assert re.findall(r"step \d of 3", seen)[:4] == ["step 1 of 3", "step 1 of 3", "step 2 of 3", "step 3 of 3"]
    chosen = "const s = document.getElementById('sequence'); s.value = '1'; s.dispatchEvent(new Event('change'));"
    assert browse(letters(), script=chosen).texts == list("fgeh")


@in_a_browser
def test_an_error_of_the_script_would_be_seen(browse):
    text = page(decoded.two(), mask_token_id=0, decode=decoded.decode_letters)
    with pytest.raises(AssertionError):
        browse(text.replace('"sequences":', '"sequence":'))
