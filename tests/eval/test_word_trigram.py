"""The word trigram judge on a model of four words, by hand, and on pocketsphinx's own. Deterministic."""

from __future__ import annotations

import math
import random

import pytest
from edlm.eval.generative import generative_perplexity
from edlm.eval.word_trigram import WordTrigramJudge

pytest.importorskip("pocketsphinx", reason="pocketsphinx is not installed")

# log10 of probabilities, and of back-off weights.
ARPA = """\\data\\
ngram 1=5
ngram 2=3
ngram 3=1

\\1-grams:
-1.0 </s>
-99 <s> -0.25
-0.5 cat -0.125
-0.75 don't -0.5
-0.375 the -0.625

\\2-grams:
-0.25 <s> the -0.0625
-0.5 the cat -0.1875
-0.125 cat the

\\3-grams:
-0.0625 <s> the cat

\\end\\
"""
# "quantised" sums: pocketsphinx keeps logs as integers to the base 1.0001, and 16 bits of each number of its trie
TOLERANCE = {"abs": 2e-2}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "tiny.arpa"
    path.write_text(ARPA)
    return WordTrigramJudge(path, name="tiny")


@pytest.mark.parametrize(
    ("text", "log10", "tokens", "characters", "left_out"),
    [
        ("the cat", -0.25 - 0.0625, 2, 7, 0),
        ("  The, CAT! ", -0.25 - 0.0625, 2, 10, 0),  # what stands before a word is its own; what comes last is not read
        ("cat don’t", (-0.25 - 0.5) + (-0.125 - 0.75), 2, 9, 0),
        ("the the", -0.25 + (-0.0625 - 0.625 - 0.375), 2, 7, 0),
        ("the dog the", -0.25 - 0.375, 2, 7, 1),  # behind an unknown word nothing is known
        ("cat 4 the_cat", -0.75, 1, 3, 2),
    ],
)
def test_by_hand(judge, text, log10, tokens, characters, left_out):
    scores = judge.score([text])
    assert float(scores.nats) == pytest.approx(-log10 * math.log(10), **TOLERANCE)
    assert [int(x) for x in (scores.tokens, scores.characters, scores.left_out)] == [tokens, characters, left_out]
    assert scores.reasons == (None,)


def test_what_has_no_words(judge):
    scores = judge.score(["", " ", "!?", "dog", "é 日本", "<s> </s>", "cat"])
    unknown = "no word that the judge knows"
    assert scores.reasons == ("empty", "no word in it", "no word in it", unknown, unknown, unknown, None)
    assert scores.nats[:6].tolist() == [0] * 6
    assert scores.left_out.tolist() == [0] * 7
    assert judge.score([]).nats.shape == (0,)
    with pytest.raises(ValueError, match="got one str"):
        judge.score("cat")


def test_texts_do_not_run_into_each_other(judge):
    both = judge.score(["the", "cat"])
    assert both.nats.tolist() == [float(judge.score([text]).nats) for text in ("the", "cat")]


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="path: expected a file with a language model, got"):
        WordTrigramJudge(tmp_path / "no.arpa")
    (tmp_path / "text.arpa").write_text("the cat")
    with pytest.raises(ValueError, match="path: expected a language model that pocketsphinx reads"):
        WordTrigramJudge(tmp_path / "text.arpa")


def test_english():
    judge = WordTrigramJudge()
    text = (
        "it is a truth universally acknowledged that a single man in possession of a good fortune must be in want of a wife and "
        "however little known the feelings or views of such a man may be on his first entering a neighbourhood"
    )
    words = text.split()
    shuffled = random.Random(0).sample(words, len(words))
    real = generative_perplexity([text], judge)
    worse = generative_perplexity([" ".join(shuffled)], judge)
    assert 50 < real.perplexity.mean < worse.perplexity.mean / 3
    assert real.bits_per_character.mean < worse.bits_per_character.mean
    assert real.left_out < 0.1
