"""What a trajectory says of a batch's history: each sequence's own steps, remasking, lengths; and the text of single tokens."""

from __future__ import annotations

import math

import decoded
import edlm
import pytest
import torch
from edlm.view import trajectory
from edlm.view.pieces import Pieces, printable


def test_every_step_of_a_sequence_with_a_prompt_and_remasking():
    one = trajectory(decoded.two(), 0, decoded.MASK)
    assert one.start == (3, 0, 0, 0) and one.prompt == [0]
    assert [(f.opened, f.tokens, f.remasked) for f in one.frames] == [((1, 3), (1, 2), ()), ((2,), (7,), (1,)), ((1,), (4,), ())]
    assert [f.t for f in one.frames] == [0.9, 0.6, 0.2]
    assert [f.num_candidates for f in one.frames] == [8, 8, 0]
    assert [f.ess for f in one.frames[:2]] == [1.0, 2.0] and [f.energy for f in one.frames[:2]] == [-12.25, -10.25]
    assert [f.log_Z for f in one.frames[:2]] == [-1.0, -3.0]
    assert all(math.isnan(x) for x in (one.frames[2].ess, one.frames[2].energy, one.frames[2].log_Z))
    assert one.end == [3, 4, 7, 2]
    assert one.opened_at == [0, 3, 2, 1]
    assert list(one.states()) == decoded.two().history[:, 0].tolist()


def test_steps_in_which_a_sequence_had_no_part_are_none_of_its_steps():
    one = trajectory(decoded.two(), 1, decoded.MASK)
    assert [f.t for f in one.frames] == [1.0, 0.5]
    assert [f.ess for f in one.frames] == [1.5, 3.5]  # its own column
    assert one.opened_at == [2, 2, 1, 2] and one.end == [6, 7, 5, 8]


def test_a_token_that_changes_in_place_opens_again():
    one = trajectory(decoded.sample([[[0, 2]], [[1, 2]], [[3, 0]]], [[0.9], [0.5]]), 0, 0)
    assert one.frames[1].opened == (0,) and one.frames[1].tokens == (3,) and one.frames[1].remasked == (1,)
    assert one.opened_at == [2, -1]  # -1: masked at the end, although it was a prompt's


def test_what_lies_beyond_a_sequence_is_not_part_of_it():
    sample = decoded.two()
    sample.lengths = torch.tensor([4, 3])
    assert trajectory(sample, 1, 0).end == [6, 7, 5] and len(trajectory(sample, 1, 0).start) == 3
    assert trajectory(sample, 0, 0).end == [3, 4, 7, 2]


def test_of_other_loops_less_may_be_known():
    sample = decoded.two()
    for name in ("lengths", "energy", "num_candidates", "ess", "log_Z"):
        delattr(sample, name)
    frame = trajectory(sample, 0, 0).frames[0]
    assert math.isnan(frame.energy) and math.isnan(frame.ess) and math.isnan(frame.log_Z) and frame.num_candidates == 0


def test_a_sequence_without_steps():
    one = trajectory(decoded.sample([[[1, 2]], [[1, 2]]], [[math.nan]]), 0, 0)
    assert one.frames == () and one.end == [1, 2] and one.opened_at == [0, 0]


def test_errors_say_what_to_do():
    sample = decoded.two()
    with pytest.raises(ValueError, match=r"index: expected a sequence of the sample, 0 \.\. 1, got 2"):
        trajectory(sample, 2, 0)
    for wrong in (-1, True, 1.0):
        with pytest.raises(ValueError, match="index"):
            trajectory(sample, wrong, 0)
    sample.history = None
    with pytest.raises(ValueError, match="return_history=True"):
        trajectory(sample, 0, 0)


class Uniform:
    mask_token_id, vocab_size = 0, 8

    def __call__(self, xt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*xt.shape, self.vocab_size)


def test_a_trajectory_of_the_decode_loop_ends_at_its_tokens():
    prompt = torch.zeros(3, 12, dtype=torch.int64)
    prompt[1, :4] = 5
    sample = edlm.generate(
        Uniform(), prompt=prompt, steps=6, energy=lambda x0, xt, t, log_p: x0.sum(-1).float(), return_history=True
    )
    for b in range(3):
        one = trajectory(sample, b, 0)
        assert one.end == sample.tokens[b].tolist()
        assert one.prompt == ([0, 1, 2, 3] if b == 1 else [])
        assert sum(len(f.opened) for f in one.frames) == (8 if b == 1 else 12)
        assert all(f.t > s.t for f, s in zip(one.frames, one.frames[1:], strict=False))


# --- pieces -----------------------------------------------------------------------------------------------------------------------


def test_control_characters_become_visible():
    assert printable("a\x00\x1b[0m\r\n\t\x7f") == "a\u2400\u241b[0m\u240d\n\t\u2421"
    assert printable("\x9b\ud800") == "\ufffd\ufffd"


def test_a_piece_keeps_the_space_that_decoders_drop_before_a_first_word():
    words = {1: "\u2581the", 2: "\u2581cat", 3: "s"}
    pieces = Pieces(lambda ids: "".join(words[i] for i in ids).replace("\u2581", " ").removeprefix(" "))
    assert [pieces[i] for i in (1, 2, 3)] == [" the", " cat", "s"]


def test_a_decoder_of_bytes_is_refused():
    with pytest.raises(ValueError, match=r"decode: expected the text .* got bytes"):
        Pieces(lambda ids: b"a")[1]


def decode_bytes(ids: list[int]) -> str:
    return bytes(i - 1 for i in ids).decode("utf-8", errors="replace")


def test_characters_of_several_tokens_are_put_together():
    tokens = [i + 1 for i in "aé😀b".encode()]
    pieces = Pieces(decode_bytes)
    assert pieces[tokens[1]] == "\ufffd"
    assert pieces.joins(tokens, 0) == [(1, 2, "é"), (3, 4, "😀")]
    assert pieces.joins([*tokens[:4], 0, *tokens[5:]], 0) == [(1, 2, "é")]  # not across a mask


def test_masks_that_are_left_are_holes_and_never_decoded():
    assert Pieces(decoded.decode_letters).text([0, 1, 2, 0, 0, 3], 0) == "▁ab▁▁c"
    assert Pieces(decoded.decode_letters).text([], 0) == ""
