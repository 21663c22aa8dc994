"""What edlm eval has to say of a set of texts, from edlm.eval itself, and the folder in which it is asked."""

from __future__ import annotations

import pytest
import torch
from edlm.cli.judges import open_judge
from edlm.eval import distinct_n, generative_perplexity, repetition, self_bleu, unigram_entropy
from tiny_run import write_text
from untrained import save_models

JUDGE = ("--judge", "ngram:judge.txt", "--judge", "ngram:judge.txt:2")
DECODE = ("--num-texts", 7, "--length", 24, "--batch-size", 3, "--text", "text.txt", "--device", "cpu")


def write_models_and_texts(folder):
    save_models(folder)
    write_text(folder)
    write_text(folder, 500, "judge.txt", seed=1)


def plain(estimate):
    return {"mean": pytest.approx(estimate.mean), "stderr": pytest.approx(estimate.stderr)}


def assert_scores(row, texts, tokens):
    assert row["num_texts"] == len(texts)
    for name, spec in (("6-gram of judge.txt", "ngram:judge.txt"), ("2-gram of judge.txt", "ngram:judge.txt:2")):
        found = generative_perplexity(texts, open_judge(spec, torch.device("cpu")))
        for unit in ("perplexity", "bits_per_token", "bits_per_character"):
            assert row["judges"][name][unit] == plain(getattr(found, unit))
        assert (row["judges"][name]["texts"], row["judges"][name]["skipped"]) == (found.texts, found.skipped)
    assert row["entropy"] == plain(unigram_entropy(tokens)) and row["repetition"] == {"4": plain(repetition(tokens, 4))}
    assert row["distinct"] == {str(n): pytest.approx(distinct_n(tokens, n)) for n in (1, 2, 4)}
    pytest.importorskip("sacrebleu", reason="self-BLEU needs the extra metrics")
    assert row["self_bleu"] == plain(self_bleu(tokens))


class Featuring:
    """A judge with features, of which the texts are kept."""

    name, identity = "featuring", "of this test"

    def __init__(self):
        self.inner, self.seen = open_judge("ngram:judge.txt", torch.device("cpu")), []

    def score(self, texts):
        return self.inner.score(texts)

    def features(self, texts):
        self.seen.append(list(texts))
        return torch.stack([torch.tensor([float(len(text)), float(text.count("e"))]) for text in texts])
