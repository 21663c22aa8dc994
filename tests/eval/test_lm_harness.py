"""The adapter for lm-evaluation-harness against enumeration, and its tasks run on documents made here. No network.

Monte Carlo tests fix their seeds and allow 4.5 standard errors: a correct program fails each comparison with probability 7e-6.
"""

from __future__ import annotations

import itertools
import math
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from edlm.data import CharTokenizer
from edlm.eval import NGramModel
from edlm.models import CausalLM, CausalLMConfig, DiT, DiTConfig
from exact import SplitDenoiser, TabularCausalLM, TabularDenoiser, Universe

lm_eval = pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

from edlm.eval.lm_harness import HarnessLM  # noqa: E402

UNIVERSE = Universe(num_tokens=3, length=3, seed=0)


class Letters:
    """a, b, c are 0, 1, 2; white space is nothing; "ab" in front of more is one token, 3, where pairs are on."""

    vocab_size = 4

    def __init__(self, pairs: bool = False) -> None:
        self.pairs, self.mask_token_id = pairs, 4 if pairs else 3

    def encode(self, text: str) -> list[int]:
        return ["abcP".index(c) for c in "".join((text.replace("ab", "P") if self.pairs else text).split())]

    def decode(self, ids: list[int]) -> str:
        return "".join("abcP"[i] for i in ids)


def requests(*args: tuple[str, ...]) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=a) for a in args]


def texts(n: int) -> list[str]:
    return ["".join(p) for p in itertools.product("abc", repeat=n)]


def causal(max_length: int | None = None, vocab_size: int = 27) -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(
        CausalLMConfig(vocab_size=vocab_size, bos_token_id=27, dim=32, num_layers=1, num_heads=2, max_length=max_length)
    )
    torch.nn.init.normal_(model.linear.weight, std=0.5)
    return model


def dit(max_length: int | None = None) -> DiT:
    torch.manual_seed(0)
    model = DiT(DiTConfig(vocab_size=28, mask_token_id=27, dim=32, num_layers=1, num_heads=2, max_length=max_length))
    torch.nn.init.normal_(model.linear.weight, std=0.5)
    torch.nn.init.constant_(model.linear.bias[27:], 50.0)  # the mask's column means nothing
    return model


def ids(text: str) -> torch.Tensor:
    return torch.tensor(CharTokenizer().encode(text).astype(np.int64))[None]


@pytest.mark.filterwarnings("ignore:model. offers no extend")
def test_autoregressive_against_enumeration() -> None:
    p = UNIVERSE.autoregressive(0.5)
    lm = HarnessLM(TabularCausalLM(UNIVERSE, p), Letters(), batch_size=4)
    for given in (0, 1, 2):
        pairs = [(text[:given], text[given:]) for text in texts(3)]
        prefix = [sum(float(p[j]) for j, other in enumerate(texts(3)) if other[:given] == text[:given]) for text in texts(3)]
        got = lm.loglikelihood(requests(*pairs))
        assert [nats for nats, _ in got] == pytest.approx((p / torch.tensor(prefix)).log().tolist(), rel=1e-5)
        assert not any(greedy for _, greedy in got)
    assert lm.loglikelihood_rolling(requests(*((text,) for text in texts(3)))) == pytest.approx(p.log().tolist(), rel=1e-5)


def repeated(denoiser: object, pairs: list[tuple[str, str]], times: int = 100) -> tuple[np.ndarray, np.ndarray]:
    runs = np.array(
        [
            [nats for nats, _ in HarnessLM(denoiser, Letters(), num_times=64, seed=1000 * s).loglikelihood(requests(*pairs))]
            for s in range(times)
        ]
    )
    return runs.mean(0), runs.std(0, ddof=1) / math.sqrt(times)


def test_denoiser_is_a_bound_with_the_context_observed() -> None:
    """Two scored tokens behind "a": the bound of each, by hand, and their average, minus the conditional entropy.

    Nine comparisons: a correct program fails with probability 6e-5.
    """
    pairs = [("a", text) for text in texts(2)]
    mean, stderr = repeated(TabularDenoiser(UNIVERSE), pairs)
    q = UNIVERSE.posterior((0, 3, 3))[:9].numpy()
    expected = []
    for x, y in itertools.product(range(3), repeat=2):
        both, first, second = (UNIVERSE.marginals(state).log() for state in ((0, 3, 3), (0, 3, y), (0, x, 3)))
        expected.append(float(both[1, x] + both[2, y] + first[1, x] + second[2, y]) / 2)  # n = 1 and n = 2 equally often
    assert (np.abs(mean - expected) < 4.5 * stderr).all()
    assert stderr.max() < 0.03
    # Of a perfect denoiser, no gap on average.
    assert q @ np.array(expected) == pytest.approx(float((q * np.log(q)).sum()), rel=1e-6)


def test_denoiser_with_one_scored_token_is_exact() -> None:
    lm = HarnessLM(TabularDenoiser(UNIVERSE), Letters(), num_times=2)
    for text in texts(2):
        state = (*(["abc".index(c) for c in text]), 3)
        got = lm.loglikelihood(requests(*((text, c) for c in "abc")))
        assert [nats for nats, _ in got] == pytest.approx(UNIVERSE.marginals(state)[2].log().tolist(), rel=1e-5)
        assert [greedy for _, greedy in got] == [i == int(UNIVERSE.marginals(state)[2].argmax()) for i in range(3)]


@pytest.mark.parametrize("halves", [False, True])
def test_greedy_of_a_denoiser_is_one_step(halves: bool) -> None:
    denoiser = TabularDenoiser(UNIVERSE)
    lm = HarnessLM(SplitDenoiser(denoiser) if halves else denoiser, Letters(), num_times=1)
    for given in (0, 1):
        for context in texts(given):
            state = (*("abc".index(c) for c in context), *[3] * (3 - given))
            best = UNIVERSE.marginals(state).argmax(1).tolist()[given:]
            got = lm.loglikelihood(requests(*((context, c) for c in texts(3 - given))))
            assert [Letters().encode(text) == best for text in texts(3 - given)] == [greedy for _, greedy in got]


def test_greedy_of_an_autoregressive_model() -> None:
    model = causal().eval()
    lm = HarnessLM(model, CharTokenizer(), batch_size=3)
    context, written = "we saw", ""
    for _ in range(4):
        following = torch.cat([ids(context + written), torch.zeros(1, 1, dtype=torch.int64)], 1)
        written += CharTokenizer().decode([int(model(following)[0, -1].argmax())])
    assert " " not in written  # or the tokenizer's own spaces get in the way: choose another seed
    other = written[:-1] + ("a" if written[-1] != "a" else "b")
    model.train()  # dropout is to be off all the same
    got = lm.loglikelihood(requests((context, written), (context, other), (context, written[:2])))
    assert model.training
    model.eval()
    assert [greedy for _, greedy in got] == [True, False, True]
    scores = model.log_probs(ids(context + written))[0].detach()
    assert got[0][0] == pytest.approx(float(scores[len(context) :].sum()), rel=1e-4)
    assert got[2][0] == pytest.approx(float(scores[len(context) : len(context) + 2].sum()), rel=1e-4)


def test_a_request_does_not_depend_on_the_others() -> None:
    pairs = [("we saw", " a dog"), ("we saw", " a cat"), ("", "nobody knew"), ("she was", " glad of it"), ("of", " him")]
    for model in (causal(), dit()):
        model.train()  # with dropout
        lm = HarnessLM(model, CharTokenizer(), num_times=4, seed=3)
        together = lm.loglikelihood(requests(*pairs))
        assert model.training
        backwards = HarnessLM(model, CharTokenizer(), num_times=4, seed=3, batch_size=3).loglikelihood(requests(*pairs[::-1]))
        alone = [lm.loglikelihood(requests(pair))[0] for pair in pairs]
        for others in (backwards[::-1], alone):
            assert [nats for nats, _ in others] == pytest.approx([nats for nats, _ in together], rel=1e-5)
            assert [greedy for _, greedy in others] == [greedy for _, greedy in together]
    one, other = (
        HarnessLM(dit(), CharTokenizer(), num_times=4, seed=seed).loglikelihood(requests(pairs[0]))[0] for seed in (3, 4)
    )
    assert one[0] == pytest.approx(together[0][0], rel=1e-5)
    assert one[0] != pytest.approx(other[0], rel=1e-3)


def test_choices_of_one_question_share_their_masks() -> None:
    """Of a denoiser that only counts masks, the estimates of two choices of one length are the same, and another question's differ."""

    class Counting:
        mask_token_id, vocab_size = 27, 28

        def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            p = torch.exp(-(0.1 + t * (xt == 27)[:, ::2].sum(1)))[:, None, None].expand(*xt.shape, 1)
            return torch.cat([p.log().expand(-1, -1, 26), ((1 - p) / 2).log().expand(-1, -1, 2)], 2)

    got = HarnessLM(Counting(), CharTokenizer(), num_times=1).loglikelihood(
        requests(("we saw", "dogs"), ("we saw", "cats"), ("we was", "cats"))
    )
    assert got[0][0] == got[1][0] != got[2][0]


def test_where_the_continuation_begins() -> None:
    model = causal()
    lm = HarnessLM(model, CharTokenizer())
    scores = model.eval().log_probs(ids("a dog barks"))[0].detach()
    one, two, three = (
        nats for nats, _ in lm.loglikelihood(requests(("a dog", " barks"), ("a dog ", "barks"), ("A dog!\n", "barks?")))
    )
    assert one == pytest.approx(float(scores[5:].sum()), rel=1e-4)  # the space is the continuation's
    assert two == one
    assert three == one  # normalised

    class Raw(CharTokenizer):
        encode = CharTokenizer.encode_prompt  # which keeps white space as it is

    two, three = (nats for nats, _ in HarnessLM(model, Raw()).loglikelihood(requests(("a dog ", "barks"), ("", "a dog barks"))))
    assert two == one
    assert three == pytest.approx(float(scores.sum()), rel=1e-4)
    everything = lm.loglikelihood(requests(("  ", "a dog barks")))[0][0]
    assert everything == pytest.approx(float(scores.sum()), rel=1e-4)
    # "ab" is one token: behind the context "a" (one token) nothing is left of "ab", and "c" of "abc".
    spanning = HarnessLM(causal(vocab_size=4), Letters(pairs=True))
    by_hand = spanning.model.eval().log_probs(torch.tensor([[3, 2]]))[0, 1].detach()
    assert spanning.loglikelihood(requests(("a", "bc")))[0][0] == pytest.approx(float(by_hand), rel=1e-4)
    with pytest.raises(
        ValueError, match="continuation: expected text with a token of its own behind the context, got 'b' behind 'a'"
    ):
        spanning.loglikelihood(requests(("a", "b")))


def test_long_texts() -> None:
    model = causal(max_length=6)
    lm = HarnessLM(model, CharTokenizer())
    scores = model.eval().log_probs(ids("og bar"))[0].detach()
    assert lm.loglikelihood(requests(("a long dog", " bar")))[0][0] == pytest.approx(float(scores[2:].sum()), rel=1e-4)
    with pytest.raises(ValueError, match="continuation: expected at most max_length = 6 tokens, got 7"):
        lm.loglikelihood(requests(("a", " barks")) + requests(("a", " barked")))
    windows = [float(model.log_probs(ids(w)).sum().detach()) for w in ("abcdef", "ghijkl", "mn")]
    got = lm.loglikelihood_rolling(requests(("abcdefghijklmn",), ("abcdef",), ("?!",), ("mn",)))
    assert got == pytest.approx([sum(windows), windows[0], 0.0, windows[2]], rel=1e-4)
    denoiser = HarnessLM(dit(max_length=6), CharTokenizer(), num_times=3)
    got = denoiser.loglikelihood_rolling(requests(("abcdefghijklmn",), ("abcdef",), ("ghijkl",), ("mn",)))
    assert got[0] == pytest.approx(sum(got[1:]), rel=1e-5)
    cut, short = denoiser.loglikelihood(requests(("a long dog", " bar"), ("og", " bar")))
    assert cut == short
    assert cut != denoiser.loglikelihood(requests(("xx", " bar")))[0]


def test_errors() -> None:
    with pytest.raises(NotImplementedError, match="likelihood tasks alone"):
        HarnessLM(dit(), CharTokenizer()).generate_until([])
    with pytest.raises(ValueError, match="model: expected log_probs"):
        HarnessLM(lambda xt, t: xt, CharTokenizer())
    with pytest.raises(ValueError, match="tokenizer: expected the denoiser's mask_token_id 27, got 3"):
        HarnessLM(dit(), Letters())
    with pytest.raises(ValueError, match="got '!' behind 'a dog'"):
        HarnessLM(dit(), CharTokenizer()).loglikelihood(requests(("a dog", "!")))
    with pytest.raises(ValueError, match="got '' behind 'a dog'; the request's continuation is empty"):
        HarnessLM(dit(), CharTokenizer()).loglikelihood(requests(("a dog", "")))
    with pytest.raises(ValueError, match="num_times: expected an int >= 1, got 0"):
        HarnessLM(dit(), CharTokenizer(), num_times=0).loglikelihood(requests(("a", "b")))
    with pytest.warns(UserWarning, match="offers no extend and head"):
        HarnessLM(NGramModel(np.arange(27), 27, order=2), CharTokenizer())


def task(name: str, output_type: str, docs: list[dict], **fields: object):
    import datasets
    from lm_eval.api.task import ConfigurableTask

    data = datasets.Dataset.from_list(docs)
    config = {
        "task": name,
        "output_type": output_type,
        "test_split": "test",
        "custom_dataset": lambda **_: {"test": data},
        **fields,
    }
    return ConfigurableTask(config=config)


@pytest.mark.parametrize("make", [dit, causal], ids=["denoiser", "autoregressive"])
def test_tasks_of_the_harness(make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"a connection to {args[-1]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    from lm_eval.tasks import TaskManager

    words = ("we saw", "she was", "nobody", "of all the", "they")
    choices = ["dog", "glad of it", "a house", "xx"]
    docs = [
        {"question": word, "choices": choices, "answer": i % 4, "page": f"{word} came in, 3 times"}
        for i, word in enumerate(words)
    ]
    lm = HarnessLM(make(), CharTokenizer(), num_times=8)
    question = task(
        "local_choice",
        "multiple_choice",
        docs,
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
    )
    pages = task("local_pages", "loglikelihood_rolling", docs, doc_to_text="", doc_to_target="{{page}}")
    results = lm_eval.simple_evaluate(
        model=lm, tasks=[question, pages], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )["results"]
    scores = np.array([[nats for nats, _ in lm.loglikelihood(requests(*((w, " " + c) for c in choices)))] for w in words])
    answers = np.arange(len(words)) % 4
    assert results["local_choice"]["acc,none"] == pytest.approx(np.mean(scores.argmax(1) == answers))
    per_letter = scores / [len(c) for c in choices]
    assert results["local_choice"]["acc_norm,none"] == pytest.approx(np.mean(per_letter.argmax(1) == answers))
    assert len({*scores.argmax(1)} | {*per_letter.argmax(1)}) > 1  # not one choice whatever the question and the norm
    nats = sum(lm.loglikelihood_rolling(requests(*((doc["page"],) for doc in docs))))
    size = sum(len(doc["page"]) for doc in docs)
    assert results["local_pages"]["bits_per_byte,none"] == pytest.approx(-nats / size / math.log(2), rel=1e-6)
