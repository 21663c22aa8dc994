"""``edlm report``: documents of ``edlm eval`` become one page with tables and plots."""

from __future__ import annotations

import argparse
import secrets
import shutil
from pathlib import Path

HELP = "turn documents of edlm eval into one Markdown page with tables and plots"
EXAMPLES = """edlm report mdlm.json edlm.json --out report       # report/report.md, with pictures beside it
edlm report *.json --out report --unit perplexity --baseline MDLM
edlm report *.json --out report --no-plots         # without matplotlib
Plots take matplotlib: pip install 'edlm-torch[plot]'."""

# As edlm.eval has them, which is imported only when a report is made: torch comes with it.
_UNITS = ("bits_per_character", "bits_per_token", "nats_per_token", "perplexity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("documents", nargs="+", metavar="FILE", help="what edlm eval --json wrote")
    parser.add_argument("--out", required=True, help="folder of the page, which must not be there, or be empty")
    parser.add_argument("--unit", choices=_UNITS, default=_UNITS[0], help="of the likelihood table (default: %(default)s)")
    parser.add_argument(
        "--baseline", metavar="LABEL", help="model whose speed the others are compared with (default: the one without an energy)"
    )
    parser.add_argument(
        "--entropy-tolerance",
        type=float,
        default=0.05,
        metavar="BITS",
        help="no speeds are compared where entropies differ by more (default: %(default)s)",
    )
    parser.add_argument("--no-plots", action="store_true", help="tables alone")


def run(options: argparse.Namespace) -> int:
    from ..eval.documents import read_documents
    from ..eval.report import page

    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir()) or out.samefile(Path.cwd())):
        raise ValueError(
            f"--out: expected a new or an empty folder, got {out}, which is there; remove it, or choose another name"
        )
    documents = read_documents(options.documents)
    pictures: dict[str, bytes] = {}
    if not options.no_plots:
        from ..eval.plots import draw

        pictures = draw(documents)
    text = page(
        documents,
        unit=options.unit,
        baseline=options.baseline,
        entropy_tolerance=options.entropy_tolerance,
        pictures=list(pictures),
    )
    _write(out, {"report.md": text.encode(), **pictures})
    print(out / "report.md")
    return 0


def _write(out: Path, files: dict[str, bytes]) -> None:
    """The folder whole, or none of it."""
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        for name, raw in files.items():
            (partial / name).write_bytes(raw)
        if out.exists():
            out.rmdir()  # it was empty; where it no longer is, this fails
        partial.rename(out)
    except OSError as error:
        raise OSError(error.errno, f"--out: {out} cannot be written: {error.strerror or error}; choose another name") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
