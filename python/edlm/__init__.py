"""edlm: energy-based diffusion language models on fused C++ kernels.

``edlm.ops`` holds the primitives, ``edlm.samplers.generate`` the decode loop, ``edlm.models`` networks, ``edlm.train`` a trainer,
``edlm.eval`` estimators, ``edlm.view`` shows how a text came about. Importing edlm imports none of them and creates no CUDA context;
``edlm.generate`` and the rooms are loaded at first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_ROOMS = ("checkpoint", "config", "data", "diffusion", "eval", "models", "ops", "protocols", "samplers", "train", "view")

__all__ = ["SampleOutput", "__version__", "generate", *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in ("generate", "SampleOutput"):
        return getattr(importlib.import_module("edlm.samplers"), name)
    if name in _ROOMS:
        return importlib.import_module(f"edlm.{name}")
    raise AttributeError(f"module 'edlm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
