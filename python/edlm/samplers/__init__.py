"""Decoding. ``generate`` is the loop; it takes anybody's network and imports none of ours."""

from .generate import SampleOutput, generate

__all__ = ["SampleOutput", "generate"]
