"""TokenJudge against an enumerated joint and against logits by hand; what it cannot read. Deterministic."""

from __future__ import annotations

import json

import pytest
import torch
from edlm.data import CharTokenizer
from edlm.data.bpe import BPETokenizer
from edlm.eval import NGramModel
from edlm.eval.judges import Judge, TokenJudge
from edlm.models import CausalLM, CausalLMConfig
from exact import TabularCausalLM, TabularDenoiser, Universe

TEXTS = ["ab", "c", "abcabca", "bb", "cab"]


class Letters:
    """a, b, c and no other; the mask is 3."""

    mask_token_id, vocab_size = 3, 4

    def encode(self, text):
        return ["abc".index(c) for c in text]

    def decode(self, ids):
        return "".join("abc"[i] for i in ids)


@pytest.fixture
def causal():
    model = CausalLM(CausalLMConfig(vocab_size=3, bos_token_id=3, dim=16, num_layers=2, num_heads=2, dropout=0.5))
    torch.nn.init.normal_(model.linear.weight, std=0.5)
    return model


def by_hand(model, text):
    """Nats, from the logits of this text alone."""
    ids = torch.tensor([Letters().encode(text)])
    with torch.no_grad():
        return -float(torch.log_softmax(model(ids).double(), -1).gather(-1, ids[..., None]).sum())


def test_an_enumerated_joint():
    universe = Universe(3, 3)
    judge = TokenJudge(TabularCausalLM(universe, universe.q), Letters(), name="q", batch_size=5)
    texts = [Letters().decode(row) for row in universe.sequences.tolist()]
    scores = judge.score(texts)
    assert isinstance(judge, Judge)
    torch.testing.assert_close(scores.nats, -universe.q.log(), rtol=1e-6, atol=1e-6)
    assert scores.nats.dtype == torch.float64
    assert scores.tokens.tolist() == scores.characters.tolist() == [3] * 27
    assert scores.reasons == (None,) * 27
    assert scores.left_out is None


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_lengths_that_differ(causal, batch_size):
    expected = [by_hand(causal.eval(), text) for text in TEXTS]
    causal.train()
    scores = TokenJudge(causal, Letters(), name="ar", batch_size=batch_size).score(TEXTS)
    assert scores.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert scores.tokens.tolist() == scores.characters.tolist() == [len(text) for text in TEXTS]
    assert causal.training and causal.transformer.training
    assert not scores.nats.requires_grad


def test_pieces_begin_anew(causal):
    causal.eval()
    scores = TokenJudge(causal, Letters(), name="ar", batch_size=2, max_length=3).score(TEXTS)
    pieces = [[text[i : i + 3] for i in range(0, len(text), 3)] for text in TEXTS]
    assert scores.nats.tolist() == pytest.approx([sum(by_hand(causal, p) for p in parts) for parts in pieces], rel=1e-5)
    assert scores.tokens.tolist() == scores.characters.tolist() == [len(text) for text in TEXTS]
    assert (
        TokenJudge(
            CausalLM(CausalLMConfig(vocab_size=3, bos_token_id=3, dim=4, num_heads=1, max_length=9)), Letters(), name=""
        ).max_length
        == 9
    )


def test_padding_leaves_no_trace():
    class Blind:
        """Of every text it returns -1 a token, and NaN from the first padding on (token 0, which no text has)."""

        def log_probs(self, x0):
            return torch.where((x0 == 0).cumsum(1) > 0, torch.nan, -1.0)

    scores = TokenJudge(Blind(), Letters(), name="blind").score(["b", "bcbcb", "cc"])
    assert scores.nats.tolist() == [1, 5, 2]


def test_text8_is_normalised():
    tokenizer = CharTokenizer()
    judge = TokenJudge(NGramModel(tokenizer.encode("hello seven worlds " * 5), 27, order=3), tokenizer, name="3-gram")
    scores = judge.score(["Hello, 7!", "hello seven", "a"])
    assert scores.nats[0] == scores.nats[1]
    assert scores.characters.tolist() == scores.tokens.tolist() == [11, 11, 1]
    lost = judge.score(["", "  \n", "...", "café", "日本", "fine"])
    nothing = "nothing that the tokenizer keeps"
    assert lost.reasons == ("empty", nothing, nothing, "cannot be encoded: 'é'", "cannot be encoded: '日'", None)
    assert lost.nats[:5].tolist() == lost.tokens[:5].tolist() == lost.characters[:5].tolist() == [0] * 5
    assert lost.nats[5] > 0


def test_special_tokens_are_text():
    tokenizer = BPETokenizer.train(["end of text of text"] * 3, 262)
    model = CausalLM(CausalLMConfig(vocab_size=261, bos_token_id=0, dim=8, num_layers=1, num_heads=1))
    scores = TokenJudge(model, tokenizer, name="ar").score(["<|endoftext|>", "é 日", " "])
    assert scores.reasons == (None,) * 3
    assert scores.characters.tolist() == [13, 3, 1]
    assert 6 <= scores.tokens[0] <= 13


def test_unknown_tokens_are_not_scored():
    entries = {"[UNK]": 0, "a": 1, "b": 2, "ab": 3, "E": 4}
    document = {
        "added_tokens": [{"id": 4, "content": "E", "special": True} | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "BPE", "vocab": entries, "merges": ["a b"], "unk_token": "[UNK]"},
    }
    document["added_tokens"][0]["normalized"] = False
    tokenizer = BPETokenizer(json.dumps(document), end_of_text="E")
    judge = TokenJudge(NGramModel(torch.tensor([1, 2, 3, 1]), 5, order=2), tokenizer, name="2-gram")
    scores = judge.score(["ab a", "ab axb", ","])
    assert scores.reasons == (None, "cannot be encoded: 'x'", "cannot be encoded: ','")
    assert scores.tokens.tolist() == [2, 0, 0]


@pytest.mark.parametrize("unknown", [[0], []])
def test_whole_words(unknown):
    """A letter that is unknown alone is known inside a word; a word that is not known is not scored, or was dropped."""

    class Words:
        mask_token_id, vocab_size, words = 3, 4, ("?", "the", "cat")

        def encode(self, text):
            return [i for word in text.split() for i in ([self.words.index(word)] if word in self.words[1:] else unknown)]

        def decode(self, ids):
            return " ".join(self.words[i] for i in ids)

    judge = TokenJudge(NGramModel(torch.tensor([1, 2, 1, 2]), 3, order=2), Words(), name="words")
    scores = judge.score(["the cat", "the dog", "cat ,"])
    assert scores.reasons == (None, "cannot be encoded: 'd'", "cannot be encoded: ','" if unknown else None)
    assert scores.characters[0] == 7


def test_what_raises(causal):
    judge = TokenJudge(causal, Letters(), name="ar")
    assert judge.score(["ab", "abd"]).reasons == (None, "cannot be encoded: substring not found")
    assert judge.score([]).nats.shape == (0,)
    with pytest.raises(ValueError, match="texts: expected a list of texts, got one str"):
        judge.score("ab")
    with pytest.raises(ValueError, match="texts: expected str, got list at 1"):
        judge.score(["ab", [1]])
    with pytest.raises(ValueError, match="batch_size: expected an int >= 1, got 0"):
        TokenJudge(causal, Letters(), name="ar", batch_size=0)
    with pytest.raises(ValueError, match="max_length: expected an int >= 1, got 0"):
        TokenJudge(causal, Letters(), name="ar", max_length=0)
    with pytest.raises(ValueError, match=r"causal_lm: expected log_probs\(.*, got TabularDenoiser"):
        TokenJudge(TabularDenoiser(Universe(3, 3)), Letters(), name="denoiser")
    causal.log_probs = lambda x0: torch.zeros(len(x0))
    with pytest.raises(ValueError, match=r"log_probs: expected \[1, 2\]"):
        judge.score(["ab"])
