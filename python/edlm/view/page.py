"""A decoded text as one HTML document: every state, what each step measured, and nothing that has to be fetched."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .pieces import Decode, Pieces, printable
from .trajectory import Trajectory, trajectory

if TYPE_CHECKING:
    from ..samplers import SampleOutput

_MASKED = -1  # among indices of pieces
# JSON inside <script>: with these nothing in it can end the element, and no older JavaScript trips over a line separator.
_ESCAPES = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def page(
    sample: SampleOutput,
    *,
    mask_token_id: int,
    decode: Decode,
    title: str = "Decoded text",
    settings: Mapping[str, Any] | None = None,
) -> str:
    """The HTML of a page that plays every sequence of ``sample`` step by step, and shows ESS, energy and log Z of each step.

    It starts at the last step; ``#sequence=1&step=3`` at the end of its address starts there instead, both counted from 0, step 0
    being the state before the first. Scripts, styles and data are inside, and the page's own policy forbids it to fetch anything.
    The texts are also there for browsers without JavaScript, in ``<pre>`` elements, the first one with the id ``text``.

    Args:
        sample: of ``edlm.generate(..., return_history=True)``; see ``edlm.view.trajectory`` for what of it is read.
        mask_token_id: the denoiser's.
        decode: the text of a list of token ids. It is asked for single tokens too, which may be parts of words or of characters.
        title: of the page. settings: shown as a table, name and ``str(value)``.

    Raises:
        ValueError: the sample has no history or no sequences; decode does not give a str.
    """
    if getattr(sample, "history", None) is not None and sample.history.shape[1] == 0:
        raise ValueError("sample: expected at least one sequence, got none")
    pieces = Pieces(decode)
    first = trajectory(sample, 0, mask_token_id)
    sequences = [first, *(trajectory(sample, b, mask_token_id) for b in range(1, sample.history.shape[1]))]
    ends = [sequence.end for sequence in sequences]
    data = _data(sequences, ends, pieces)
    texts = "\n".join(_plain(b, pieces.text(end, mask_token_id), len(ends)) for b, end in enumerate(ends))
    style, script = _asset("page.css"), _asset("page.js")
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        "style": style,
        "script": script,
        "title": html.escape(printable(title)),
        "settings": _settings(settings or {}),
        "options": "".join(f'<option value="{b}">{b}</option>' for b in range(len(sequences))),
        "choice": "" if len(sequences) > 1 else " hidden",
        "texts": texts,
        "data": json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(_ESCAPES),
    }
    out = []
    for i, part in enumerate(
        _asset("page.html").split("@@")
    ):  # every other part is a name: what is put in is not looked at again
        out.append(parts[part] if i % 2 else part)
    return "".join(out)


def write_page(
    path: str | Path,
    sample: SampleOutput,
    *,
    mask_token_id: int,
    decode: Decode,
    title: str = "Decoded text",
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write ``page(...)`` to ``path``, UTF-8. Readers of the path see the old file or the new one, never part of one.

    Raises:
        ValueError: the folder of ``path`` is not there; and what ``page`` raises.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path: expected a file in a folder that exists, got {str(path)!r}; make {str(path.parent)!r} first")
    if path.is_dir():
        raise ValueError(f"path: expected a file, got the folder {str(path)!r}; name a file in it, such as page.html")
    text = page(sample, mask_token_id=mask_token_id, decode=decode, title=title, settings=settings)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# --- what is put in ---------------------------------------------------------------------------------------------------------------


def _data(sequences: list[Trajectory], ends: list[list[int]], pieces: Pieces) -> dict[str, Any]:
    """What page.js reads: a table of pieces, and each sequence as its start and the changes of each step."""
    index: dict[int, int] = {}

    def place(token: int, mask: int) -> int:
        return _MASKED if token == mask else index.setdefault(token, len(index))

    packed = []
    for sequence, end in zip(sequences, ends, strict=True):
        mask = sequence.mask_token_id
        frames = [
            [
                _number(f.t),
                list(f.opened),
                [place(token, mask) for token in f.tokens],
                list(f.remasked),
                _number(f.ess),
                _number(f.log_Z),
                _number(f.energy),
                f.num_candidates,
            ]
            for f in sequence.frames
        ]
        start = [place(token, mask) for token in sequence.start]
        packed.append({"start": start, "frames": frames, "joins": pieces.joins(end, mask)})
    return {"ids": list(index), "pieces": [pieces[token] for token in index], "sequences": packed}


def _number(value: float) -> float | str | None:
    """Five digits; null for NaN; the infinities, which JSON has no numbers for, by their names."""
    if math.isnan(value):
        return None
    return float(f"{value:.5g}") if math.isfinite(value) else "Infinity" if value > 0 else "-Infinity"


def _plain(index: int, text: str, count: int) -> str:
    name = "text" if index == 0 else f"text-{index}"
    heading = f"<h3>Sequence {index}</h3>" if count > 1 else ""
    # A parser drops one newline after <pre>: this one, not the text's own.
    return f'<div class="plain">{heading}<pre id="{name}" lang="">\n{html.escape(text)}</pre></div>'


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{html.escape(printable(str(k)))}</th><td>{html.escape(printable(str(v)))}</td></tr>'
        for k, v in settings.items()
    )
    return f'<div class="settings"><table aria-label="Settings"><tbody>{rows}</tbody></table></div>'


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    """How a content security policy names an inline script or style: no other one runs, whatever a token says."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
