"""Everything in examples/ works, and so do the commands of docs/training.md: files load, commands parse, programs run."""

from __future__ import annotations

import functools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edlm.cli import build_parser, main
from edlm.config import load, to_dict
from edlm.models import NCEEnergy
from edlm.train import TrainConfig
from edlm.train.distributed import World
from edlm.train.objectives import objective_for
from edlm.train.trainer import _micro_batches
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parent.parent
EXAMPLES, GUIDE = ROOT / "examples", ROOT / "docs" / "training.md"
CONFIGS = sorted((EXAMPLES / "configs").glob("*.toml"))
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
# Denoiser, autoregressive model, NCE energy: what is trained together.
TRIPLES = {
    "tiny": ("tiny_dit", "tiny_causal", "tiny_nce"),
    "hours": ("hours_mdlm", "hours_ar", "hours_nce"),
    "gpu": ("gpu_mdlm", "gpu_ar", "gpu_nce"),
    "text8": ("text8_mdlm_small", "text8_ar_small", "text8_nce_small"),
    "owt": ("owt_mdlm_small", "owt_ar_small", "owt_nce_small"),
}
# Xu et al., arXiv 2410.21357, appendix: what all three models of an experiment have in common.
PUBLISHED = {
    "text8": {
        "num_layers": 12,
        "dim": 768,
        "num_heads": 12,
        "cond_dim": 128,
        "dropout": 0.05,
        "vocab_size": 28,
        "data.text": "text8",
        "data.tokenizer": "text8",
        "data.length": 256,
        "data.blocks": "plain",
        "batch_size": 512,
        "diffusion.schedule": "log_linear",
        "optim.lr": 3e-4,
        "optim.betas": [0.9, 0.999],
        "optim.weight_decay": 0.0,
        "optim.warmup_steps": 2000,
        "optim.decay": "cosine",
        "optim.grad_clip": 1.0,
        "optim.ema_decay": 0.9999,
    },
    "owt": {
        "num_layers": 12,
        "dim": 768,
        "num_heads": 12,
        "cond_dim": 128,
        "dropout": 0.1,
        "vocab_size": 50258,
        "data.tokens": "data/openwebtext",
        "data.tokenizer": "gpt2",
        "data.length": 1024,
        "data.blocks": "bos_eos",
        "batch_size": 512,
        "diffusion.schedule": "log_linear",
        "optim.lr": 3e-4,
        "optim.betas": [0.9, 0.999],
        "optim.weight_decay": 0.0,
        "optim.warmup_steps": 2500,
        "optim.decay": "constant",
        "optim.grad_clip": 1.0,
        "optim.ema_decay": 0.9999,
        "system.precision": "bfloat16",
    },
}
STEPS = {"dit": 1_000_000, "causal_lm": 1_000_000, "nce_energy": 10_000}


def config_of(name, *overrides):
    return load(EXAMPLES / "configs" / f"{name}.toml", TrainConfig, overrides)


def vocabulary(config):
    return 28 if config.data.tokenizer == "text8" else 50258


@functools.cache
def on_meta(config):
    """(model, proposal or None) of the configuration's own sizes, without memory: an NCE energy's are those of its proposal's run."""
    ids = {"vocab_size": vocabulary(config), "mask_token_id": vocabulary(config) - 1, "bos_token_id": vocabulary(config) - 2}
    with torch.device("meta"):
        if config.model.kind != "nce_energy":
            return config.model.build(**ids), None
        proposal = runs()[str(Path(config.nce.proposal).parent)].model.build(**ids)
        return config.model.build_energy(proposal), proposal


def commented(path):
    return commands("\n".join(line.removeprefix("# ") for line in path.read_text().splitlines() if line.startswith("# ")))


def commands(text):
    """Words of the lines that start edlm or torchrun, continued lines as one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("edlm ", "torchrun "))]


edlm_parser = functools.cache(build_parser)


def parsed(words):
    """What edlm's parser makes of a command, under torchrun or not; SystemExit if it is none."""
    if words[0] == "torchrun":
        options = get_args_parser().parse_args(words[1:])
        assert options.module and options.training_script == "edlm"
        words = ["edlm", *options.training_script_args]
    return edlm_parser().parse_args(words[1:])


@functools.cache
def runs():
    """Folder -> configuration of every training command in a file that is about that very file."""
    found = {}
    for path in CONFIGS:
        for options in map(parsed, commented(path)):
            if hasattr(options, "overrides") and Path(options.config).name == path.name:
                found[options.out] = load(path, TrainConfig, options.overrides)
    return found


def test_there_are_some():
    assert {f"{name}.toml" for triple in TRIPLES.values() for name in triple} <= {p.name for p in CONFIGS} and PROGRAMS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_configurations_load_and_build(path):
    config = load(path, TrainConfig)
    words = set(path.stem.split("_"))
    kind = "dit" if words & {"dit", "mdlm"} else "nce_energy" if "nce" in words else "causal_lm"
    assert config.model.kind == kind
    small = dict(vocab_size=28, mask_token_id=27, bos_token_id=27)
    if kind == "nce_energy":
        proposal = config_of("tiny_dit", "model.num_layers=1").model.build(**small)
        model = config.model.build_energy(proposal)
    else:
        model = load(path, TrainConfig, ["model.num_layers=1"]).model.build(**small)
    assert model.kind == kind and next(model.parameters()).device.type == "cpu"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_commands_in_comments_work(path):
    """Each parses; every file is trained by one of its own commands; files that they name are there, and take the overrides."""
    trained = []
    for options in map(parsed, commented(path)):
        if hasattr(options, "overrides"):
            trained.append(Path(options.config))
            assert trained[-1].parent == Path("examples/configs")
            load(ROOT / options.config, TrainConfig, options.overrides)
    assert Path("examples/configs") / path.name in trained


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_a_proposal_is_what_another_file_s_command_writes(path):
    config = load(path, TrainConfig)
    if config.nce is None:
        return
    made = {f"{out}/model": other for out, other in runs().items()}
    assert config.nce.proposal in made
    other = made[config.nce.proposal]
    assert other.model.kind == "dit"
    assert (other.data, other.diffusion, other.batch_size) == (config.data, config.diffusion, config.batch_size)


@pytest.mark.parametrize("name", TRIPLES)
def test_what_goes_together_is_trained_on_the_same(name):
    """Same text, windows, noise and batch: what one learns can be the other's energy. The two that learn text have one optimiser."""
    dit, causal, nce = map(config_of, TRIPLES[name])
    for other in (causal, nce):
        assert (dit.data, dit.diffusion, dit.batch_size, dit.seed) == (other.data, other.diffusion, other.batch_size, other.seed)
        assert dit.system.precision == other.system.precision
    assert (dit.optim, dit.steps, dit.model.preset) == (causal.optim, causal.steps, causal.model.preset)
    if name in PUBLISHED:
        assert nce.optim == dit.optim
    else:  # fewer steps, at a lower rate
        same = ("decay", "ema_decay", "betas", "weight_decay", "grad_clip")
        assert all(getattr(nce.optim, key) == getattr(dit.optim, key) for key in same) and nce.optim.lr < dit.optim.lr
    assert nce.steps < dit.steps


@pytest.mark.parametrize("name", [n for family in PUBLISHED for n in TRIPLES[family]])
def test_published_numbers(name):
    config, family = config_of(name), name.split("_")[0]
    model, _ = on_meta(config)
    plain = to_dict(config)
    found = {key: getattr(model.config, key) for key in ("num_layers", "dim", "num_heads", "dropout", "vocab_size")}
    found["vocab_size"] += config.model.kind == "causal_lm"  # which does not count the mask
    found["cond_dim"] = getattr(model.config, "cond_dim", 128)
    for key, value in PUBLISHED[family].items():
        section, _, inner = key.rpartition(".")
        got = found[key] if key in found else (plain[section] if section else plain)[inner]
        assert got == value, key
    assert config.steps == STEPS[config.model.kind]
    assert len(model.transformer.blocks) == 12 and not getattr(model.config, "time_conditioning", False)
    assert {p.shape for p in model.transformer.blocks[0].attn_qkv.parameters()} == {(3 * 768, 768)}
    if config.model.kind != "nce_energy":  # untied
        assert model.linear.weight is not model.vocab_embed.weight
        assert "linear.weight" in dict(model.named_parameters()) and "vocab_embed.weight" in dict(model.named_parameters())
    assert (config.diffusion.eps, config.diffusion.t_min) == (1e-3, 1e-3)


@pytest.mark.parametrize("name", [n for family in PUBLISHED for n in TRIPLES[family]])
def test_published_runs_share_their_batches_among_processes(name):
    """1, 2, 4 and 8 of them: each has the same number of whole micro-batches, and every row is in one."""
    config = config_of(name)
    assert config.system.compile and config.system.parallel == "ddp" and config.valid_windows % 8 == 0
    for size in (1, 2, 4, 8):
        parts = [_micro_batches(config, World(rank, size, torch.device("cpu"))) for rank in range(size)]
        assert [row for part in parts for rows in part for row in rows] == list(range(512))
        assert len({len(part) for part in parts}) == 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_checkpoints_are_validated(path):
    """The best one is found by the validation of its own step."""
    config = load(path, TrainConfig)
    assert config.checkpoint_every % config.valid_every == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_the_cost_in_the_comment_is_what_the_trainer_counts(path):
    """To the digits that are printed."""
    stated = re.search(
        r"^# Cost, counted and not measured: (\S+) FLOP; at (.*), (\S+) (minutes|hours) (.*?)\.(?: |$)", path.read_text(), re.M
    )
    if stated is None:
        assert path.stem not in {n for family in ("hours", "gpu", "text8", "owt") for n in TRIPLES[family]}
        return
    flops, rate, time, unit, _ = stated.groups()
    config = load(path, TrainConfig)
    model, proposal = on_meta(config)
    objective = objective_for(config, model, vocabulary(config) - 1, proposal)
    counted = objective.flops_per_token(config.data.length) * config.data.length * config.batch_size * config.steps
    assert f"{counted:.1e}".replace("e+", "e") == flops
    speed = {"60 GFLOP/s a core": 2 * 60e9, "35 % of an H100's dense bfloat16 peak": 0.35 * 989.5e12}[rate]
    exact = counted / speed / {"minutes": 60, "hours": 3600}[unit]
    assert abs(exact - float(time)) <= (0.05 if "." in time else 0.5) * 1.001, exact


# --- from the text to a sample ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """tiny_dit and tiny_nce by their own commands, in a folder of their own, with fewer and smaller of everything."""
    folder, before = tmp_path_factory.mktemp("examples"), torch.get_num_threads()
    fewer = ["steps=6", "batch_size=4", "data.length=16", "valid_windows=4", "valid_every=3", "log_every=1", "checkpoint_every=3"]
    fewer += ["optim.warmup_steps=2", "logging.samples=1", "logging.sample_steps=4"]
    smaller = ["model.dim=16", "model.num_layers=1", "model.num_heads=2", "model.cond_dim=8"]
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in commented(EXAMPLES / "configs" / "tiny_nce.toml")[:2]:
            assert words[:2] == ["edlm", "train"]
            sets = fewer + (smaller if "tiny_dit" in words[2] else [])
            options = [word for key in sets for word in ("--set", key)]
            assert main(["train", str(ROOT / words[2]), *words[3:], *options, "--quiet", "--device", "cpu"]) == 0
        yield folder
    torch.set_num_threads(before)


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_denoiser_then_its_energy(trained):
    lines = lines_of(trained / "runs" / "nce")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["nce_loss"] == pytest.approx(2 * 0.6931472, abs=1e-5)  # an energy starts as 0
    energy = NCEEnergy.from_pretrained(trained / "runs" / "nce" / "model")
    assert (energy.config.dim, energy.config.num_layers) == (16, 1)
    assert energy.mlp[2].weight.abs().max() > 0  # and has left it


def test_the_energy_takes_part_in_sampling(trained, capsys):
    words = commented(EXAMPLES / "configs" / "tiny_nce.toml")[2]
    assert words[:2] == ["edlm", "sample"] and "--energy" in words
    assert main([*words[1:], "--num", "2", "--length", "16", "--steps", "4", "--device", "cpu", "--json"]) == 0
    sample = json.loads(capsys.readouterr().out)
    assert sample["energy_nfe"] > 0 and [len(text) for text in sample["texts"]] == [16, 16]


# --- docs/training.md -------------------------------------------------------------------------------------------------------------


def test_the_guide_names_every_key_of_the_metrics(trained):
    rows = re.findall(r"^\| (`[^|]*) \| ", GUIDE.read_text().partition("## 8.")[2].partition("## 9.")[0], re.M)
    named = [key for row in rows for key in re.findall(r"`(\w+)`", row)]
    written = {key for run in ("denoiser", "nce") for line in lines_of(trained / "runs" / run) for key in line}
    assert len(named) == len(set(named)) and set(named) == written


def test_commands_of_the_guide_parse():
    found = [words for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.S) for words in commands(block)]
    for words in found:
        options = parsed(words)
        if hasattr(options, "overrides"):
            load(ROOT / options.config, TrainConfig, options.overrides)
    assert len(found) >= 15 and {"torchrun", "edlm"} == {words[0] for words in found}


@pytest.mark.parametrize("page", ["README.md", "docs/evaluation.md", "docs/trained_models.md"])
def test_commands_of_other_pages_parse(page):
    """With the shell's variables put in, and files of their own: what one command writes, the next one does not write again."""
    found, written = [], []
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S):
        for name, value in re.findall(r'\b([A-Z])="?([^";\n]*)"?', block):
            block = re.sub(rf"\${name}\b", value, block)
        for words in commands(block):
            options = parsed(words)
            found.append(words)
            written.append(getattr(options, "json", None))
            if getattr(options, "resume", False):
                written.pop()
    assert len(found) >= 8
    files = [name for name in written if isinstance(name, str) and name != "-"]
    assert len(set(files)) == len(files)


def test_the_guide_names_files_that_are_there():
    text = GUIDE.read_text()
    table = text.partition("| files in `examples/configs` |")[2].partition("\n\n")[0]
    named = [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == [path.stem for path in CONFIGS]
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (GUIDE.parent / target).exists(), target


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.name)
def test_programs_run(path, tmp_path):
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
