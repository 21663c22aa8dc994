"""From text to batches of tokens."""

from .bpe import BPETokenizer
from .datasets import WindowDataset, windows
from .packing import pack
from .shards import Tokens, open_tokens, replace_file
from .text import Corpus, bundled_text, documents, open_text, read_text, split
from .tokenizers import CharTokenizer, fingerprint, normalize, open_tokenizer, tokenizer_from

__all__ = [
    "BPETokenizer",
    "CharTokenizer",
    "Corpus",
    "Tokens",
    "WindowDataset",
    "bundled_text",
    "documents",
    "fingerprint",
    "normalize",
    "open_text",
    "open_tokenizer",
    "open_tokens",
    "pack",
    "read_text",
    "replace_file",
    "split",
    "tokenizer_from",
    "windows",
]
