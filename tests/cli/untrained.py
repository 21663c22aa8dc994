"""Models that nobody trained, in a folder: random, but with something to say."""

from __future__ import annotations

import torch
from edlm.data import CharTokenizer
from edlm.data.bpe import BPETokenizer
from edlm.models import CausalLM, CausalLMConfig, DiT, DiTConfig
from tiny_run import WORDS

SIZES = {"dim": 16, "num_layers": 1, "num_heads": 2}


def save_models(folder):
    """Folders of that name: dit, other, short (of 5 tokens) and ar, all text8; bpe and bpe_ar."""
    torch.manual_seed(0)
    described = CharTokenizer().description()
    save_dit(folder / "dit", 28, described)
    save_dit(folder / "other", 28, described)
    save_dit(folder / "short", 28, described, max_length=5)
    save_ar(folder / "ar", 27, described)
    tokenizer = BPETokenizer.train([" ".join(WORDS) * 20], 280)
    save_dit(folder / "bpe", tokenizer.vocab_size, tokenizer.description())
    save_ar(folder / "bpe_ar", tokenizer.vocab_size - 1, tokenizer.description())


def save_dit(path, vocab_size, tokenizer, **more):
    model = DiT(DiTConfig(vocab_size=vocab_size, mask_token_id=vocab_size - 1, cond_dim=8, **SIZES, **more))
    torch.nn.init.normal_(model.linear.weight, std=0.7)  # it starts at 0
    model.save_pretrained(path, tokenizer=tokenizer)


def save_ar(path, vocab_size, tokenizer):
    model = CausalLM(CausalLMConfig(vocab_size=vocab_size, bos_token_id=vocab_size, **SIZES))
    torch.nn.init.normal_(model.linear.weight, std=0.2)
    model.save_pretrained(path, tokenizer=tokenizer)
