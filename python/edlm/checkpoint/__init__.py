"""Folders of tensors that are whole or not there."""

from .native import Checkpoint, clean, kind_of, load, meta_of, save, verify
from .sharded import load_sharded, save_sharded

__all__ = ["Checkpoint", "clean", "kind_of", "load", "load_sharded", "meta_of", "save", "save_sharded", "verify"]
