"""Decoding. ``generate`` is the loop; it takes anybody's network and imports none of ours."""

from .autoregressive import NextToken, sample_autoregressive
from .generate import generate
from .sample_output import SampleOutput, StepReport
from .smc import Particles

__all__ = ["NextToken", "Particles", "SampleOutput", "StepReport", "generate", "sample_autoregressive"]
