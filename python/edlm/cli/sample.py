"""``edlm sample``: texts from a trained model, on the terminal, or into a file that any number of processes fill."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from .models import device_named, model_folder
from .sample_options import add_arguments as add_arguments  # a part of every command's file

if TYPE_CHECKING:
    import torch

    from ..samplers import SampleOutput
    from ..train.distributed import World
    from .decoder import Decoder
    from .record_file import RecordFile
    from .tally import Tally
    from .text_batches import TextBatches

HELP = "decode text from a trained model, with or without an energy"
EXAMPLES = """edlm sample runs/denoiser/model --num 2 --length 128 --steps 32
edlm sample runs/denoiser/model --energy runs/ar/model --window 0 1 --num-candidates 16
edlm sample runs/denoiser/model --energy runs/ar/model --num-candidates auto --window auto
edlm sample runs/denoiser/model --energy runs/ar/model --window 0 1 --num-particles 4
edlm sample runs/denoiser/model --prompt "it is a truth ____________ acknowledged"
edlm sample runs/denoiser/model --length 1000 --block-length 64 --context-length 128
edlm sample runs/denoiser/model --html replay.html --watch
edlm sample runs/ar/model --num 2                          # an autoregressive model, from left to right
edlm sample runs/denoiser/model --num 5000 --out texts.jsonl
edlm sample runs/denoiser/model --num 5000 --out texts.jsonl --resume      # after an interruption, or before one
torchrun --standalone --nproc-per-node 2 -m edlm sample runs/denoiser/model --num-texts 5000 --out texts.jsonl
In a prompt _ is a character to be filled in; where the model reads a BPE, [MASK] is a token.
Low energy is good; ESS says how many of the K candidates count.
--out: one JSON record a line. The file is the same, bit by bit, for any number of processes with so many --threads, and however
often it was interrupted; it has its name once it is complete, and FILE.part holds the texts until then. torchrun takes
--num for one of its own options: --num-texts is the same."""


def run(options: argparse.Namespace) -> int:
    from .decoder import check, errors_by_flags

    check(options)
    _check_places(options)
    with errors_by_flags(options):
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    from ..train.distributed import joined
    from .decoder import open_decoder

    with joined(device_named(options.device)) as world:
        if world.size > 1 and options.out is None:
            if world.rank > 0:
                return 2
            raise ValueError(
                f"--out: expected a file where {world.size} processes share the work, got none; give --out FILE.jsonl"
            )
        if options.threads is not None:
            set_threads(options.threads)
        decoder = open_decoder(options, world.device)
        batches, prompts = _batches(options, decoder)
        if options.out is not None:
            return _to_file(options, decoder, batches, prompts, world)
        return _to_terminal(options, decoder, batches)


def _check_places(options: argparse.Namespace) -> None:
    check_counts(options, ("num", "batch_size", "threads"))
    if options.resume and options.out is None:
        raise ValueError("--resume: it is for a file, got none; give --out FILE.jsonl as well, or leave it out")
    if options.history and not options.json:
        raise ValueError("--history: it is a part of what --json prints, got no --json; give it as well, or leave it out")
    for name in ("json", "html", "watch"):
        if getattr(options, name) not in (None, False) and options.out is not None:
            raise ValueError(f"--{name}: it shows what is decoded here and now, got --out as well; leave one of them out")
    for name, example in (("html", "replay.html"), ("out", "texts.jsonl")):
        value = getattr(options, name)
        if value is not None and Path(value).is_dir():  # that of "" is this one
            what = f"the folder {value}" if value else "an empty name"
            raise ValueError(f"--{name}: expected the name of a file, got {what}; name a file, such as {Path(value) / example}")
    if options.html is not None and not Path(options.html).parent.is_dir():
        raise ValueError(f"--html: expected a file in a folder that exists, got {options.html}; make {Path(options.html).parent}")
    if options.watch and (options.json or not sys.stdout.isatty()):
        raise ValueError("--watch: expected a terminal on standard output, got JSON, a file or a pipe; leave it out")
    if options.prompt_file is not None and options.length is not None:
        raise ValueError(f"--length: the prompts of a file say how long they are, got {options.length}; leave it out")


def check_counts(options: argparse.Namespace, names: Iterable[str]) -> None:
    """Numbers of things, among them of threads."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected a number >= 1, got {value}")
    most = 4 * (os.cpu_count() or 1)
    if options.threads is not None and options.threads > most:
        raise ValueError(
            f"--threads: expected a number in 1 .. {most}, four for each of the {most // 4} CPUs, got {options.threads}; take fewer"
        )


def set_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def _batches(options: argparse.Namespace, decoder: Decoder) -> tuple[TextBatches, list[str] | None]:
    """And the prompts of a file as they are written there."""
    from .text_batches import TextBatches, prompt_ids, read_prompts

    shared = {"batch_size": options.batch_size, "seed": options.seed}
    if options.prompt_file is not None:
        lines, ids = read_prompts(options.prompt_file, decoder.tokenizer)
        num = 1 if options.num is None else options.num
        return TextBatches(num=num, prompts=ids, padding=decoder.mask_token_id, **shared), lines
    num = 4 if options.num is None else options.num
    if options.prompt is not None:
        ids = [prompt_ids(options.prompt, decoder.tokenizer)]
        return TextBatches(num=num, prompts=ids, length=options.length, **shared), None
    most = None if options.block_length else getattr(decoder.network, "max_length", None)
    length = min(128, most or 128) if options.length is None else options.length
    return TextBatches(num=num, length=length, **shared), None


def _texts(sample: SampleOutput, decoder: Decoder) -> list[str]:
    from .sample_json import own_tokens

    return [decoder.tokenizer.decode(tokens) for tokens in own_tokens(sample)]


# --- on the terminal --------------------------------------------------------------------------------------------------------------


def _to_terminal(options: argparse.Namespace, decoder: Decoder, batches: TextBatches) -> int:
    from .sample_json import document, together

    show = sys.stderr.isatty() and not options.json and not options.watch
    kept, tally = [], _tally(decoder)
    with _bar(batches.total, show and len(batches) > 1) as advance, _watch(options, decoder, batches) as watch:
        for number in range(len(batches)):
            history = options.history or (options.html is not None and number == 0)
            more: dict[str, Any] = {"return_history": history, "progress": show and len(batches) == 1}
            with watch() as on_step:
                sample = decoder(**batches.arguments(number), on_step=on_step, **more)
            tally.add(sample)
            if options.json or (options.html is not None and number == 0):
                kept.append(sample)
            if not options.json:
                for text in _texts(sample, decoder):
                    print(text, flush=len(batches) > 1)
            advance(len(batches.indices(number)))
    if options.html is not None:
        _page(options, decoder, batches, kept[0])
    if options.json:
        whole = together(kept, decoder.mask_token_id)
        seeds = [batches.seed_of(n) for n in range(batches.total)]
        print(json.dumps(document(whole, _texts(whole, decoder), seeds), allow_nan=False))
    else:
        print(tally, file=sys.stderr)
    return 0


def _tally(decoder: Decoder) -> Tally:
    from .tally import Tally

    return Tally("model" if decoder.causal else "denoiser")


@contextlib.contextmanager
def _bar(total: int, show: bool) -> Iterator[Callable[[int], object]]:
    from tqdm import tqdm

    with tqdm(total=total, desc="sample", unit="text", disable=not show) as bar:
        yield bar.update


@contextlib.contextmanager
def _watch(options: argparse.Namespace, decoder: Decoder, batches: TextBatches) -> Iterator[Callable[[], Any]]:
    """What gives, for each batch, a context with its ``on_step``."""
    if not options.watch:
        yield contextlib.nullcontext
        return
    from ..view import Watch

    # It leaves nothing: its last state is not always what is returned. Shown are as many of a batch as fit.
    watch = Watch(decoder.tokenizer.decode, decoder.mask_token_id, rows=len(batches.indices(0)), leave=False)
    yield lambda: watch


def _page(options: argparse.Namespace, decoder: Decoder, batches: TextBatches, sample: SampleOutput) -> None:
    from ..view import write_page
    from .decoder import given

    settings = {"model": options.model, "energy": options.energy, "carry_over": options.carry_over or None}
    settings |= {"prompt": options.prompt, "prompt_file": options.prompt_file, "length": batches.length, "stop": options.stop}
    settings |= {"seed": options.seed, "steps": decoder.options.get("steps"), **given(options)}
    shown = {name: value for name, value in settings.items() if value is not None}
    decode = decoder.tokenizer.decode
    write_page(options.html, sample, mask_token_id=decoder.mask_token_id, decode=decode, title="edlm sample", settings=shown)
    print(f"# written: {options.html}", file=sys.stderr)


# --- into a file ------------------------------------------------------------------------------------------------------------------


def _to_file(options: argparse.Namespace, decoder: Decoder, batches: TextBatches, prompts: list[str] | None, world: World) -> int:
    import torch

    from .record_file import RecordFile, fill

    free = {} if options.threads is not None or world.device.type != "cpu" else {"--threads": torch.get_num_threads()}
    with RecordFile(options.out, batches.total, {"model": options.model, "energy": options.energy}) as file:

        def begin() -> tuple[list[int], int | None]:
            if not file.begin(_settings(options, world.device), options.resume, free):
                return [], None
            return file.missing((k, batches.indices(k)) for k in range(len(batches))), file.settings.get("--threads")

        try:
            todo, threads = world.first(begin)
        except (ValueError, OSError):
            if world.rank == 0:
                raise
            return 2  # the first process says why
        if threads is not None:
            set_threads(threads)
        tally = fill(file, world, todo, lambda mine: _fill(file, decoder, batches, prompts, world, mine))
        if world.rank == 0:
            unfinished = file.folder.is_dir()
            if unfinished:
                file.finish()
            if todo:
                print(f"{tally}{' (the first process)' if world.size > 1 else ''}", file=sys.stderr)
            print(f"{'written' if unfinished else 'complete already'}: {options.out}, {batches.total} texts")
    return 0


def _fill(
    file: RecordFile, decoder: Decoder, batches: TextBatches, prompts: list[str] | None, world: World, mine: list[int]
) -> Tally:
    """Decode the batches ``mine``, and append each to this process's part."""
    from .sample_json import records

    tally = _tally(decoder)
    if not mine:
        return tally
    count = sum(len(batches.indices(k)) for k in mine)
    show = world.rank == 0 and sys.stderr.isatty()
    with file.part(world.rank, world.size) as part, _bar(count, show) as advance:
        for k in mine:
            indices = batches.indices(k)
            sample = decoder(**batches.arguments(k))
            seeds, texts = [batches.seed_of(n) for n in indices], _texts(sample, decoder)
            lines = records(sample, indices=indices, seeds=seeds, texts=texts, corrected=decoder.corrected)
            if prompts is not None:
                lines = [line | {"prompt": prompts[line["index"] // batches.num]} for line in lines]
            part.append(lines)
            tally.add(sample)
            advance(len(indices))
    return tally


def _settings(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything that a record depends on, by the names of the options."""
    import torch

    from .decoder import flag, given

    num = options.num or (4 if options.prompt_file is None else 1)
    plain = {"num": num, "batch_size": options.batch_size, "seed": options.seed, "length": options.length}
    plain |= {"prompt": options.prompt, "stop": options.stop, "carry_over": options.carry_over or None, **given(options)}
    named = {flag(name): value for name, value in plain.items() if value is not None}
    if options.threads is not None and device.type == "cpu":
        named["--threads"] = options.threads
    if options.prompt_file is not None:
        named["--prompt-file"] = "sha256 " + hashlib.sha256(Path(options.prompt_file).read_bytes()).hexdigest()
    named["model"] = contents(options.model)
    if options.energy:
        named["--energy"] = contents(options.energy)
    return named | {"--device": device.type, "edlm": __version__, "torch": torch.__version__}


def contents(path: str) -> str:
    """A model by what its manifest says of it: sizes, names, and checksums of its weights."""
    from .. import checkpoint

    folder, _ = checkpoint.verify(model_folder(path))
    return "sha256 " + hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()
