"""Training: ``train(config, out)``."""

from .configuration import DataSpec, DiffusionSpec, ModelSpec, OptimSpec, TrainConfig
from .trainer import Interrupted, train

__all__ = ["DataSpec", "DiffusionSpec", "Interrupted", "ModelSpec", "OptimSpec", "TrainConfig", "train"]
