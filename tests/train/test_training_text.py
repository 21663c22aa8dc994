"""What a run reads: its tokens, their damage, and the tokenizer that they belong to."""

from __future__ import annotations

import json
import random

import pytest
import torch
from edlm.data import CharTokenizer, open_text, open_tokens, pack
from edlm.train import train
from edlm.train.distributed import World
from edlm.train.training_text import TrainingText
from tiny_run import WORDS, assert_same_weights, tiny_config, write_text

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path)


@pytest.fixture
def tokens(tmp_path, text):
    """As ``edlm data build`` leaves them."""
    corpus = open_text(str(text))
    for name in ("train", "valid", "test"):
        pack(
            corpus.split(name), CharTokenizer(), tmp_path / "tokens" / name, source=f"{corpus.identity}/{name}", shard_tokens=4000
        )
    return tmp_path / "tokens"


def test_text_and_tokens_are_the_same_run(tmp_path, text, tokens):
    from_text = train(tiny_config("dit", text), tmp_path / "a", progress=False)
    from_tokens = train(tiny_config("dit", text, data={"tokens": str(tokens)}), tmp_path / "b", progress=False)
    assert_same_weights(from_text, from_tokens)
    assert not (tmp_path / "b" / "tokens").exists()


def missing(folder):
    (folder / "00001.bin").unlink()


def truncated(folder):
    file = folder / "00001.bin"
    file.write_bytes(file.read_bytes()[:-7])


def flipped(folder):
    file = folder / "00000.bin"
    raw = bytearray(file.read_bytes())
    raw[100] ^= 1
    file.write_bytes(bytes(raw))


def another_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][0]["count"] -= 1
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (missing, r"00001\.bin: expected a shard of .* tokens, got no such file"),
        (truncated, r"00001\.bin: corrupt shard: expected .* bytes"),
        (flipped, r"00000\.bin: corrupt shard: it does not match its checksum"),
        (another_manifest, r"manifest\.json: corrupt manifest"),
    ],
)
def test_damaged_tokens_are_refused_and_those_of_a_text_made_anew(tmp_path, text, tokens, damage, message):
    damage(tokens / "train")
    config = tiny_config("dit", text, data={"tokens": str(tokens)}, steps=2)
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.json").exists()
    # The run's own are its to make.
    first = TrainingText.open(tiny_config("dit", text), tmp_path / "own", ALONE)
    if damage is not missing and damage is not truncated:  # they are one shard here
        damage(tmp_path / "own" / "train")
        again = TrainingText.open(tiny_config("dit", text), tmp_path / "own", ALONE)
        assert again.fingerprint == first.fingerprint
        open_tokens(tmp_path / "own" / "train")


def test_tokens_of_another_tokenizer(tmp_path, text, tokens):
    pytest.importorskip("tokenizers", reason="a BPE needs the package tokenizers")
    from edlm.data import BPETokenizer

    BPETokenizer.train(open_text(str(text)).split("train"), 300).save(tmp_path / "bpe.json")
    config = tiny_config("dit", text, data={"tokens": str(tokens), "tokenizer": str(tmp_path / "bpe.json")})
    with pytest.raises(
        ValueError, match=r"data\.tokenizer: expected the one that made .*train \(fingerprint [0-9a-f]{16}\), got"
    ):
        train(config, tmp_path / "run", progress=False)


@pytest.mark.parametrize("blocks", ["plain", "bos_eos"])
def test_bits_of_a_bpe_are_of_characters(tmp_path, blocks, capsys):
    """Many short documents, whose ends are tokens and no characters; `edlm eval` of the same windows says the same."""
    pytest.importorskip("tokenizers", reason="a BPE needs the package tokenizers")
    from edlm.cli import main
    from edlm.data import BPETokenizer
    from edlm.models import CausalLM

    luck, folder = random.Random(0), tmp_path / "texts"
    for name in ("train", "valid", "test"):
        folder.mkdir(exist_ok=True)
        words = [" ".join(luck.choices(WORDS, k=6)) for _ in range(200 if name == "train" else 60)]
        (folder / f"{name}.txt").write_text("\n".join(words))
    BPETokenizer.train(open_text(str(folder)).split("train"), 300).save(tmp_path / "bpe.json")
    data = {"tokenizer": str(tmp_path / "bpe.json"), "blocks": blocks, "length": 12}
    config = tiny_config("causal_lm", folder, data=data, steps=4, valid_every=4, valid_windows=6)
    opened = TrainingText.open(config, tmp_path / "tokens", ALONE)
    batch, tokenizer = opened.dataset.batch(0), opened.tokenizer
    framed = (batch[:, 0] == tokenizer.bos_token_id).all() and (batch[:, -1] == tokenizer.eos_token_id).all()
    assert bool(framed) == (blocks == "bos_eos")
    text = (folder / "valid.txt").read_text()
    share = 10 / 12 if blocks == "bos_eos" else 1.0
    assert opened.characters_per_token == pytest.approx(share * len(text) / (len(tokenizer.encode(text)) + 1))
    model = train(config, tmp_path / "run", progress=False)
    assert CausalLM.from_pretrained(model).tokenizer_description == tokenizer.description()
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    arguments = [
        "eval",
        str(model),
        "--text",
        str(folder),
        "--split",
        "valid",
        "--length",
        "12",
        "--windows",
        "6",
        "--blocks",
        blocks,
    ]
    assert main([*arguments, "--json", "--device", "cpu"]) == 0
    row = json.loads(capsys.readouterr().out)["rows"][0]
    assert row["nats_per_token"]["mean"] == pytest.approx(last["valid_loss"], rel=1e-6)
    assert row["bits_per_character"]["mean"] == pytest.approx(last["valid_bits"], rel=1e-6)


def test_text8_has_no_end_of_text(tmp_path, text):
    with pytest.raises(ValueError, match=r"data\.blocks: expected a tokenizer with an end of text for 'bos_eos', got 'text8'"):
        train(tiny_config("dit", text, data={"blocks": "bos_eos"}), tmp_path / "run", progress=False)
