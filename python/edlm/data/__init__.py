"""From text to batches of tokens."""

from .datasets import WindowDataset, windows
from .packing import open_tokens, pack, replace_file
from .text import bundled_text, read_text, split
from .tokenizers import CharTokenizer, normalize, tokenizer_from

__all__ = [
    "CharTokenizer",
    "WindowDataset",
    "bundled_text",
    "normalize",
    "open_tokens",
    "pack",
    "read_text",
    "replace_file",
    "split",
    "tokenizer_from",
    "windows",
]
