"""``edlm eval``: likelihood of texts under a model; quality and diversity of what it writes, decoded on the spot or read from files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .judges import NAMES
from .models import device_named, model_folder
from .sample_options import add_decoding, count_or_auto

if TYPE_CHECKING:
    from ..train.distributed import World
    from .eval_files import Samples
    from .eval_likelihood import Likelihood
    from .eval_texts import Decoding

    Work = Likelihood | Decoding | Samples

HELP = "the likelihood of texts under a trained model, or the quality and diversity of the texts that it writes"
EXAMPLES = """edlm eval runs/denoiser/model           # NELBO: an upper bound of the negative log-likelihood
edlm eval runs/ar/model                 # exact negative log-likelihood
edlm eval runs/denoiser/model --text book.txt --json
edlm eval runs/denoiser/model --text data/public_domain --split valid --length 256
edlm eval runs/denoiser/model --text bundled wikitext103 book.txt               # zero-shot: a column a text
edlm eval runs/denoiser/model --energy runs/ar/model --steps 1 8 64             # bounds with the energy, by name
edlm eval runs/denoiser/model --energy runs/nce/model --measures joint_nll --num-candidates 16 64 256 1024
edlm eval runs/denoiser/model --windows 5000 --json nelbo.json --resume         # completes it after an interruption
torchrun --standalone --nproc-per-node 2 -m edlm eval runs/denoiser/model --windows 5000 --json nelbo.json
edlm eval runs/denoiser/model --energy runs/ar/model --window 0 1 --decode 8 16 32 --judge ngram:bundled --judge smollm2
edlm eval runs/ar/model --decode --judge ngram:bundled                          # from left to right: no number of steps
edlm eval texts.jsonl more.txt --judge pocketsphinx                             # of edlm sample --out, or a text a line
A folder is a model, a file holds texts. --num-candidates: in --decode, K as in edlm sample; else the draws n behind an estimate
of log Z, each n with rows of its own. --json FILE: the document, the same values for any number of processes with so many --threads;
it has its name once it is complete, and FILE.part holds until then what is done."""

MODES = {"likelihood": "the likelihood of texts", "decoding": "--decode", "samples": "files of texts"}
_ALWAYS = ("paths", "seed", "device", "threads", "label", "json", "resume", "batch_size", "text")
_OWN = {
    "likelihood": {
        *("split", "blocks", "length", "windows", "measures", "steps", "num_candidates", "num_times", "unit"),
        *("energy", "carry_over"),
    },
    "decoding": {*("decode", "num_texts", "judge", "mauve", "split", "length"), *("energy", "carry_over")},  # and the sampler's
    "samples": {"judge", "mauve"},
}
_DEFAULTS = {"split": "test", "blocks": "plain", "windows": 512, "unit": "bits/character", "num_texts": 64}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    # What is not given stays None: what the other modes have is refused by name.
    parser.add_argument(
        "paths", nargs="+", metavar="MODEL|FILE", help="folder of a trained model; or files of texts (.jsonl, .txt)"
    )
    what = parser.add_argument_group("which text")
    what.add_argument(
        "--text",
        nargs="+",
        metavar="TEXT",
        help='files, each read whole; or, for one split, "bundled" (the default), folders, corpora. With --decode one, whose odd '
        "windows are the real text to compare with; with files of texts one such file",
    )
    what.add_argument("--split", choices=("valid", "test", "train"), help="(default: test)")
    what.add_argument("--blocks", choices=("plain", "bos_eos"), help="as the model was trained, data.blocks (default: plain)")
    what.add_argument("--length", type=int, help="tokens of a window, or of a text (default: 128, or the model's most)")
    what.add_argument("--windows", type=int, help="at most so many of a text, spread over it (default: 512)")
    likelihood = parser.add_argument_group("likelihood")
    likelihood.add_argument(
        "--measures",
        nargs="+",
        choices=("nelbo", "ar_nll", "joint_nll", "finite_step_elbo", "sampler_elbo", "paper_joint"),
        help="(default: ar_nll of an autoregressive model; nelbo; with --energy the others too); finite_step_elbo and sampler_elbo "
        "come together, from the same draws",
    )
    likelihood.add_argument(
        "--steps", type=int, nargs="+", metavar="T", help="also the NELBO of T steps; the ELBO with the energy at T (default: 8)"
    )
    likelihood.add_argument("--num-times", type=int, metavar="k", help="draws of t a sequence (default: 1)")
    likelihood.add_argument("--unit", choices=("nats/token", "bits/token", "bits/character", "perplexity"), help="of the table")
    texts = parser.add_argument_group("texts")
    texts.add_argument("--decode", type=int, nargs="*", metavar="T", help="decode texts in T steps each, and score them")
    texts.add_argument("--num-texts", type=int, metavar="N", help="how many (default: 64)")
    texts.add_argument("--judge", action="append", metavar="SPEC", help=f"who scores texts: {NAMES}; may be repeated")
    texts.add_argument("--mauve", action="store_true", help="MAUVE against the real text, by a judge that has features")
    _, energy = add_decoding(parser, ", with --decode")
    energy.add_argument(
        "--num-candidates",
        type=count_or_auto,
        nargs="+",
        metavar="n",
        help="draws for log Z (default: joint_nll 256, others 16); with --decode one K, or auto (default: 8)",
    )
    where = parser.add_argument_group("how, and where to")
    where.add_argument("--batch-size", type=int, help="sequences measured, or texts decoded, at a time (default: 32)")
    where.add_argument(
        "--seed",
        type=int,
        default=0,
        help="sequence, or text, n of N uses seed * N + n: two seeds share no draw (default: %(default)s)",
    )
    where.add_argument("--label", help="of the model, in tables and documents (default: from the folders' names)")
    where.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the JSON document; without FILE, print it")
    where.add_argument("--resume", action="store_true", help="complete the document that the same command has begun")
    where.add_argument("--device", help="cpu, cuda, cuda:1 (default: CUDA where there is one)")
    where.add_argument("--threads", type=int, help="CPU threads of a process, on which last bits depend (default: torch's)")


def run(options: argparse.Namespace) -> int:
    from .decoder import errors_by_flags

    options.prompt_file = None  # of edlm sample, whose words for the sampler's arguments are used
    with errors_by_flags(options):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    from ..train.distributed import joined
    from .sample import set_threads

    mode = _mode(options)
    _check(options, mode)
    with joined(device_named(options.device)) as world:
        if world.size > 1 and options.json in (None, "-"):
            if world.rank > 0:
                return 2
            raise ValueError(f"--json: expected a file where {world.size} processes share the work, got none; give --json FILE")
        if options.threads is not None:
            set_threads(options.threads)
        work = _work(options, mode, world)
        if options.json in (None, "-"):
            records = [record for number in _shown(work, range(len(work.batches)), world) for record in work.records(number)]
            _print(options, _document(options, work, world, records, _settings(options, work, world)))
            return 0
        return _to_file(options, work, world)


def _mode(options: argparse.Namespace) -> str:
    from .eval_files import FILES

    paths = options.paths
    files = [path for path in paths if Path(path).is_file() or (not Path(path).exists() and path.endswith(FILES))]
    if not files:
        if len(paths) > 1:
            raise ValueError(f"expected the folder of one model, got {' '.join(paths)}; evaluate one after the other")
        return "likelihood" if options.decode is None else "decoding"
    if len(files) < len(paths):
        folder = next(path for path in paths if path not in files)
        raise ValueError(f"expected a model's folder or files of texts, got both: {folder} and {files[0]}; evaluate them apart")
    for path in files:
        if not path.endswith(FILES):
            raise ValueError(f"{path}: expected a model's folder, or texts in a file that ends in {' or '.join(FILES)}")
        if not Path(path).is_file():
            raise ValueError(f"{path}: expected a file of texts, got no such file")
    return "samples"


def _check(options: argparse.Namespace, mode: str) -> None:
    """Options of other modes, and numbers; what was left out gets its value."""
    from .decoder import CORRECTION, ORDER, SHARED, check, flag
    from .sample import check_counts

    own = _OWN | {"decoding": _OWN["decoding"] | {*ORDER, *CORRECTION, *SHARED} - {"steps"}}
    given = {name for name, value in vars(options).items() if value is not None and value is not False}
    for name in sorted(given - {"command", "run", *_ALWAYS, *own[mode]}):
        others = " or ".join(MODES[other] for other in MODES if name in own[other])
        raise ValueError(f"{flag(name)}: it is for {others}, got it with {MODES[mode]}; leave it out")
    check_counts(options, ("batch_size", "threads", "num_texts", "num_times"))
    _check_use(options, mode)
    for name in own[mode] & _DEFAULTS.keys():
        if getattr(options, name) is None:
            setattr(options, name, _DEFAULTS[name])
    if mode == "likelihood":
        length = 128 if options.length is None else options.length
        if length < 1 or options.windows < 1:
            raise ValueError(f"--length, --windows: expected numbers >= 1, got {length}, {options.windows}")
        check(options)
    elif not options.judge:
        raise ValueError(f"--judge: expected who is to score the texts, got none; give one or more of {NAMES}")
    if mode != "samples":
        options.batch_size = options.batch_size or 32
        options.model, options.text = options.paths[0], options.text or ["bundled"]
        if mode == "decoding" and len(options.text) > 1:
            raise ValueError(f"--text: expected one text to compare with, got {' '.join(options.text)}; choose one")
    if options.resume and options.json in (None, "-"):
        raise ValueError("--resume: it is for a file, got none; give --json FILE as well, or leave it out")
    if options.json is not None and Path(options.json).is_dir():  # that of "" is this one
        raise ValueError(
            f"--json: expected the name of a file, got {options.json or 'an empty name'}; name one, such as eval.json"
        )


def _check_use(options: argparse.Namespace, mode: str) -> None:
    """Options that would be ignored beside others."""
    from .eval_likelihood import is_file

    if options.split is not None and all(map(is_file, options.text or ["bundled"])):
        raise ValueError(f"--split: files are read whole, got {' '.join(options.text)} alone; leave it out")
    if options.label is not None and mode == "samples" and len(options.paths) > 1:
        raise ValueError(f"--label: several files are called by their names, got {len(options.paths)}; leave it out")
    if options.unit is not None and options.json == "-":
        raise ValueError("--unit: it is of the table, got --json without FILE, which has all units and no table; leave it out")


def _work(options: argparse.Namespace, mode: str, world: World) -> Work:
    if mode == "likelihood":
        from .eval_likelihood import Likelihood

        return Likelihood(options, world.device)
    if mode == "samples":
        from .eval_files import Samples

        return Samples(options, world.device, _label(options))
    from .eval_texts import Decoding

    return Decoding(options, world.device, _label(options))


def _label(options: argparse.Namespace) -> str:
    if options.label is not None:
        return options.label
    if not hasattr(options, "model"):
        return ", ".join(Path(path).stem for path in options.paths)

    def name(path: str) -> str:
        folder = Path(path).resolve()
        return folder.parent.name if folder.name == "model" else folder.name

    energy = f" + {name(options.energy)}" if options.energy else ""
    return name(options.model) + energy + (" (carry-over)" if options.carry_over else "")


def _settings(options: argparse.Namespace, work: Work, world: World) -> dict[str, Any]:
    """Everything that a value in the document depends on, by the names of the options."""
    import torch

    from .decoder import flag
    from .eval_document import machine
    from .sample import contents

    shared = ("seed", "split", "blocks", "windows", "batch_size", "label")
    named = {flag(name): getattr(options, name) for name in shared if getattr(options, name) is not None}
    if options.threads is not None and world.device.type == "cpu":
        named["--threads"] = options.threads
    if work.kind != "samples":
        named["model"] = contents(options.model)
        if options.energy:
            named |= {"--energy": contents(options.energy), "--carry-over": options.carry_over}
    named |= work.settings | {"--device": world.device.type, "edlm": __version__, "torch": torch.__version__}
    if work.kind == "decoding":  # seconds are those of a machine, and of who else computes there; the label is in the rows
        named |= {"--label": _label(options), "--device": machine(world)["device"], "processes": world.size}
    return named


def _document(
    options: argparse.Namespace, work: Work, world: World, records: list[dict[str, Any]], settings: dict[str, Any]
) -> dict[str, Any]:
    from .eval_document import machine

    paths = {} if work.kind == "samples" else {"model": model_folder(options.model), "energy": options.energy}
    head = {"edlm eval": 1, "records": work.total, "kind": work.kind, "label": _label(options), **paths}
    body = work.document(records)
    if work.kind == "decoding" and world.size > 1 and world.device.type == "cpu":
        body["warnings"].append("seconds: rows were timed while other processes computed; with one process they are its own")
    return head | {"settings": settings, "machine": machine(world), **body}


def _print(options: argparse.Namespace, document: dict[str, Any]) -> None:
    from .eval_document import show

    if options.json == "-":
        print(json.dumps(document, allow_nan=False))
    else:
        print(show(document, options.unit))


def _shown(work: Work, numbers: Iterable[int], world: World) -> Iterable[int]:
    """The numbers of batches, with a bar where somebody looks on."""
    from tqdm import tqdm

    unit = "chunk" if work.kind == "likelihood" else "row"
    return tqdm(numbers, desc="eval", unit=unit, disable=world.rank > 0 or not sys.stderr.isatty(), leave=False)


def _to_file(options: argparse.Namespace, work: Work, world: World) -> int:
    import torch

    from .record_file import DOCUMENT, RecordFile, fill
    from .sample import set_threads

    free = {} if options.threads is not None or world.device.type != "cpu" else {"--threads": torch.get_num_threads()}
    with RecordFile(options.json, work.total, kind=DOCUMENT) as file:

        def begin() -> tuple[list[int], int | None, list[dict[str, Any]]]:
            """The batches that are missing, the threads, and the records that all of them need."""
            if not file.begin(_settings(options, work, world), options.resume, free):
                return [], None, []
            if "--threads" in file.settings:
                set_threads(file.settings["--threads"])
            todo = file.missing(enumerate(work.batches))
            try:
                with file.part(0, world.size) as part:
                    for number in [number for number in todo if number < work.first]:
                        part.append(work.records(number))
            except BaseException:
                file.abandon()
                raise
            shared = [json.loads(line) for line in file.lines(range(work.first))]
            return [number for number in todo if number >= work.first], file.settings.get("--threads"), shared

        try:
            todo, threads, shared = world.first(begin)
        except (ValueError, OSError):
            if world.rank == 0:
                raise
            return 2  # the first process says why
        if threads is not None:
            set_threads(threads)
        work.know(shared)

        def measure(mine: list[int]) -> None:
            with file.part(world.rank, world.size) as part:
                for number in _shown(work, mine, world):
                    part.append(work.records(number))

        if todo:
            fill(file, world, todo, measure)
        if world.rank == 0:
            unfinished = file.folder.is_dir()
            if unfinished:
                file.finish(lambda lines, whole: whole.write(_encoded(options, work, world, lines, file.settings)))
            _print(options, json.loads(file.path.read_text(encoding="utf-8")))
            print(f"{'written' if unfinished else 'complete already'}: {options.json}")
    return 0


def _encoded(options: argparse.Namespace, work: Work, world: World, lines: Iterable[bytes], settings: dict[str, Any]) -> bytes:
    document = _document(options, work, world, [json.loads(line) for line in lines], settings)
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()
