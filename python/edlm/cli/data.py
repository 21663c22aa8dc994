"""``edlm data``: text to token folders, the public-domain corpus, a tokenizer of one's own."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

HELP = "turn text into token folders, look at them, fetch a public-domain corpus, train a tokenizer"
EXAMPLES = """edlm data build bundled --tokenizer text8 --out data/austen
edlm data build books/ --tokenizer tokenizer.json --out data/books --workers 8
edlm data build openwebtext --tokenizer gpt2/ --out data/openwebtext --splits train valid
edlm data info data/books
edlm data fetch --out data/public_domain   # 34 MB of English prose, downloaded and verified
edlm data tokenizer books/ --vocab-size 8192 --out tokenizer.json
A SOURCE is "bundled", a text file, a folder of text files (train.*, valid.*, test.* are its splits), or a name such as openwebtext."""

_PART = 1 << 28  # characters of a file at a time, where a tokenizer lets it be cut


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="build | info | fetch | tokenizer")

    build = commands.add_parser("build", help="tokenise a text into OUT/train, OUT/valid and OUT/test")
    build.add_argument("source", metavar="SOURCE", help='"bundled", a text file, a folder of text files, or the name of a corpus')
    build.add_argument(
        "--tokenizer",
        required=True,
        metavar="text8|PATH",
        help="text8, a tokenizer.json, or a folder with vocab.json and merges.txt",
    )
    build.add_argument("--out", required=True, help="folder of the token folders; those that are there and up to date stay")
    build.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    build.add_argument("--shard-tokens", type=int, default=1 << 28, help="tokens of a file (default: %(default)s)")
    build.add_argument(
        "--splits", nargs="+", choices=("train", "valid", "test"), default=["train", "valid", "test"], help="(default: all three)"
    )
    build.add_argument("--quiet", action="store_true", help="no progress bar")

    info = commands.add_parser("info", help="what a token folder, or a folder of them, holds; every file is verified")
    info.add_argument("folder", metavar="FOLDER", help="what `edlm data build` wrote, or one of its splits")

    fetch = commands.add_parser("fetch", help="download and clean a corpus of public-domain English prose")
    fetch.add_argument("--out", required=True, help="folder of train.txt.xz, valid.txt.xz and test.txt.xz")
    fetch.add_argument("--cache", help="folder where the downloads are kept, and looked for first")
    fetch.add_argument(
        "--mirror", nargs=2, action="append", default=[], metavar=("PREFIX", "REPLACEMENT"), help="fetch PREFIX... from elsewhere"
    )

    tokenizer = commands.add_parser("tokenizer", help="train a byte-level BPE on a text's train split")
    tokenizer.add_argument("source", metavar="SOURCE", help="as for build")
    tokenizer.add_argument("--vocab-size", type=int, required=True, help="entries, the end of text and the mask included")
    tokenizer.add_argument("--out", required=True, help="the tokenizer.json to write")


def run(options: argparse.Namespace) -> int:
    command = {"build": _build, "info": _info, "fetch": _fetch, "tokenizer": _tokenizer}[options.data_command]
    try:
        return command(options)
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        raise ValueError(str(error)) from None  # an extra that is missing is no fault of the program


def _build(options: argparse.Namespace) -> int:
    from ..data import open_text, open_tokenizer, pack

    out = _folder(options.out)
    tokenizer, corpus, rows = open_tokenizer(options.tokenizer), open_text(options.source), []
    part = _PART if hasattr(tokenizer, "separator_id") else None
    for split in dict.fromkeys(options.splits):
        begin = time.perf_counter()
        tokens = pack(
            corpus.split(split, part=part),
            tokenizer,
            out / split,
            source=f"{corpus.identity}/{split}",
            workers=options.workers,
            shard_tokens=options.shard_tokens,
            progress=not options.quiet and sys.stderr.isatty(),
        )
        seconds = time.perf_counter() - begin
        rows.append([split, *_counts(tokens.manifest), f"{tokens.manifest['count'] / seconds:,.0f}"])
    _table(["split", "documents", "characters", "tokens", "tokens/s"], rows)
    return 0


def _info(options: argparse.Namespace) -> int:
    from ..data import open_tokens

    folder = Path(options.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: expected a token folder, or a folder of them, got no such folder")
    folders = [folder] if (folder / "manifest.json").exists() else [folder / name for name in ("train", "valid", "test")]
    folders = [one for one in folders if one.exists()]
    if not folders:
        raise ValueError(
            f"{folder}: expected a token folder, or train, valid, test in it, got neither; make it by edlm data build"
        )
    rows = []
    for one in folders:
        tokens = open_tokens(one)
        made_from = tokens.manifest["made_from"]
        rows.append(
            [
                one.name,
                *_counts(tokens.manifest),
                tokens.dtype.name,
                str(len(tokens.manifest["shards"])),
                str(made_from["vocab_size"]),
                made_from["tokenizer"],
                tokens.fingerprint,
            ]
        )
    _table(["split", "documents", "characters", "tokens", "type", "shards", "vocabulary", "tokenizer", "fingerprint"], rows)
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from ..data import public_domain

    cache = None if options.cache is None else Path(options.cache)
    out = public_domain.build(_folder(options.out), cache=cache, mirrors=dict(options.mirror), progress=True)
    print(f"fetched: {out}; go on with: edlm data build {out} --tokenizer text8 --out TOKENS")
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from ..data import BPETokenizer, open_text

    out = Path(options.out)
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"--out: expected the name of a file in a folder that is there, got {out}")
    tokenizer = BPETokenizer.train(open_text(options.source).split("train"), options.vocab_size)
    try:
        tokenizer.save(out)
    except OSError as error:
        raise OSError(
            error.errno,
            f"--out: {out} could not be written: {error.strerror or error}; nothing of it is kept: free some space, or choose "
            "another place",
        ) from error
    print(f"trained: {out} ({tokenizer.vocab_size} entries with the mask)")
    return 0


def _folder(out: str) -> Path:
    """``--out``, where it can be a folder."""
    there = next((path for path in (Path(out), *Path(out).parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise ValueError(f"--out: expected a folder, or a new name for one, got {out}, where {there} is a file; choose another")
    return Path(out)


def _counts(manifest: dict[str, int]) -> list[str]:
    return [f"{manifest[key]:,}" for key in ("documents", "characters", "count")]


def _table(header: list[str], rows: list[list[str]]) -> None:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))))
