"""The text8 tokenizer: what it spells out, what it drops, and what a prompt may hold."""

from __future__ import annotations

import numpy as np
import pytest
from edlm.data import CharTokenizer, bundled_text, fingerprint, normalize, open_tokenizer, tokenizer_from
from edlm.protocols import Tokenizer
from fake_tokenizers import FakeTokenizer
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def tokenizer():
    return CharTokenizer()


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Hello, World!", "hello world"),
        ("  two\n\n words\t", "two words"),
        ("in 1984", "in one nine eight four"),
        ("a0b", "a zero b"),
        ("0123456789", "zero one two three four five six seven eight nine"),
        ("don't", "don t"),
        ("naïve café — œuvre", "na ve caf uvre"),
        ("x²٣x", "x x"),  # other scripts' digits are no digits here
        ("a_b", "a b"),  # the mask's symbol is no text
        ("", ""),
        ("...", ""),
    ],
)
def test_normalize(text, normal):
    assert normalize(text) == normal
    assert normalize(normal) == normal


def test_ids_are_a_to_z_and_then_the_space(tokenizer):
    ids = tokenizer.encode("abc xyz")
    assert ids.dtype == np.uint8
    assert ids.tolist() == [0, 1, 2, 26, 23, 24, 25]
    assert tokenizer.encode("").tolist() == []
    assert tokenizer.encode("漢字").tolist() == []


def test_round_trip(tokenizer):
    text = "the quick brown fox jumps over the lazy dog"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    real = bundled_text()[:20_000]
    assert tokenizer.decode(tokenizer.encode(real)) == normalize(real)


def test_encode_never_returns_the_mask(tokenizer):
    everything = "".join(map(chr, range(0x3000))) + "_" * 10
    ids = tokenizer.encode(everything)
    assert len(ids) > 0
    assert (ids != tokenizer.mask_token_id).all() and ids.max() < tokenizer.vocab_size


def test_decode_shows_the_mask(tokenizer):
    assert tokenizer.decode([7, 27, 26, 8]) == "h_ i"
    assert tokenizer.decode([]) == ""
    with pytest.raises(ValueError, match=r"ids: expected 0 \.\. 27, got 28"):
        tokenizer.decode([0, 28])
    with pytest.raises(ValueError, match="got -1"):
        tokenizer.decode([-1])


def test_a_prompt_keeps_every_character(tokenizer):
    ids = tokenizer.encode_prompt("It  is _ ")
    assert ids.tolist() == [8, 19, 26, 26, 8, 18, 26, 27, 26]
    assert tokenizer.decode(ids) == "it  is _ "
    assert tokenizer.encode_prompt("").tolist() == []


@pytest.mark.parametrize(("prompt", "shown", "position"), [("it's _", '"\'"', 2), ("4 _", "'4'", 0), ("_\n", r"'\n'", 1)])
def test_a_prompt_with_anything_else_is_refused(tokenizer, prompt, shown, position):
    with pytest.raises(ValueError, match="prompt: expected a-z, spaces and _") as caught:
        tokenizer.encode_prompt(prompt)
    assert str(caught.value).endswith(f"got {shown} at position {position}")


def test_description_makes_it_again(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(tokenizer_from(tokenizer.description()), CharTokenizer)
    with pytest.raises(ValueError, match="saved without one"):
        tokenizer_from(None)
    with pytest.raises(ValueError, match="expected the kind 'text8' or 'bpe', got 'gpt2'"):
        tokenizer_from({"kind": "gpt2"})
    with pytest.raises(ValueError, match="got None"):
        tokenizer_from({})


def test_bos_is_no_token_of_text(tokenizer):
    assert tokenizer.bos_token_id == tokenizer.mask_token_id == tokenizer.vocab_size - 1


@given(a=st.text(), b=st.text(), white=st.sampled_from([" ", "\n", "\t ", "\u00a0", "\u2028"]))
def test_a_text_may_be_cut_at_white_space(a, b, white):
    """What ``separator_id`` promises: final sigmas, dotted capitals and digits included."""
    tokenizer = CharTokenizer()
    apart = [tokenizer.encode(part).tolist() for part in (a, b)]
    joined = [*apart[0], tokenizer.separator_id, *apart[1]] if all(apart) else apart[0] + apart[1]
    assert tokenizer.encode(a + white + b).tolist() == joined


def test_fingerprints():
    assert fingerprint(CharTokenizer()) == fingerprint(CharTokenizer()) == "ce9acc54d622a9d2"

    class Silent(FakeTokenizer):
        description = property()  # hasattr says no

    tokenizers = [
        FakeTokenizer(300),
        FakeTokenizer(301),
        FakeTokenizer(300, merges="b"),
        Silent(300),
        Silent(301),
        CharTokenizer(),
    ]
    assert len({fingerprint(tokenizer) for tokenizer in tokenizers}) == 6


def test_opening_by_name(tmp_path):
    assert isinstance(open_tokenizer("text8"), CharTokenizer)
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer: expected 'text8', a tokenizer\.json or a folder with one, got .*gpt5"
    ):
        open_tokenizer("gpt5")
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vocab\.json \(or encoder\.json\) and merges\.txt \(or vocab\.bpe\), got vocab\.json"):
        open_tokenizer(tmp_path)
