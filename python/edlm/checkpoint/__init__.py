"""Folders of tensors that are whole or not there."""

from .native import Checkpoint, clean, kind_of, load, save

__all__ = ["Checkpoint", "clean", "kind_of", "load", "save"]
