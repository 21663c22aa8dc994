"""Tokenizers that are no more than their ids: character c becomes c * stride, so that large ids take no large text."""

from __future__ import annotations

import os
import signal


class FakeTokenizer:
    """Without ``eos_token_id`` and ``separator_id``: documents follow one another."""

    def __init__(self, vocab_size, stride=1, merges="a"):
        self.vocab_size, self.mask_token_id, self.stride, self.merges = vocab_size, vocab_size - 1, stride, merges
        self.calls = 0

    def encode(self, text):
        self.calls += 1
        return [ord(c) * self.stride for c in text]

    def decode(self, ids):
        return "".join(chr(i // self.stride) for i in ids)

    def description(self):
        return {"merges": self.merges}


class EndingTokenizer(FakeTokenizer):
    """With an end of text, 0."""

    eos_token_id = 0


class DyingTokenizer(FakeTokenizer):
    """Its process is killed, as by a system without memory."""

    def encode(self, text):
        os.kill(os.getpid(), signal.SIGKILL)
