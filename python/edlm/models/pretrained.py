"""save_pretrained and from_pretrained: a network, its configuration and its tokenizer's description in one checkpoint folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from .. import checkpoint
from ..config import from_dict, to_dict


class Pretrained:
    """A mixin for networks with a ``config`` dataclass; ``kind`` names them on disk.

    ``tokenizer_description`` is what was stored beside the weights, None for a new network.
    """

    kind: ClassVar[str]
    config_class: ClassVar[type]
    tokenizer_description: dict[str, Any] | None = None

    def save_pretrained(
        self,
        path: str | Path,
        *,
        tokenizer: Mapping[str, Any] | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write weights, configuration and the tokenizer's description (plain values) to a folder, atomically.

        Args:
            tokenizer: its description; the one that came with the network, ``tokenizer_description``, if left out.
            weights: written instead of the network's own, by the names of ``state_dict``: an EMA, for example.
            dtype: on the disk: bfloat16 takes half of float32, and is read back into float32 networks. As they are if None.

        Raises:
            ValueError: ``weights`` that this network could not read back; else as ``edlm.checkpoint.save``.
        """
        state = self.state_dict() if weights is None else weights
        ours, theirs = ({(n, tuple(w.shape)) for n, w in x.items()} for x in (self.state_dict(), state))
        if ours != theirs:
            raise ValueError(
                f"weights: expected the names and shapes of state_dict(), got a difference at {min(ours ^ theirs)[0]}"
            )
        described = self.tokenizer_description if tokenizer is None else dict(tokenizer)
        meta = {"config": to_dict(self.config), "tokenizer": described}
        if dtype is not None:
            state = {name: weight.to(dtype) for name, weight in state.items()}
        checkpoint.save(path, kind=self.kind, meta=meta, tensors={"model": state})

    @classmethod
    def from_pretrained(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """The network that ``save_pretrained`` wrote, in eval mode, on ``device``; ``.tokenizer_description`` is what was stored.

        Raises:
            FileNotFoundError, ValueError: as ``edlm.checkpoint.load``; a checkpoint of another kind of model; weights that do not fit.
        """
        stored = checkpoint.load(path, kind=cls.kind)
        model = cls(from_dict(stored.meta.get("config"), cls.config_class, source=str(path)))
        try:
            model.load_state_dict(stored.tensors.get("model", {}))
        except RuntimeError as error:
            raise ValueError(f"{path}: expected the weights of its own configuration, got others: {error}") from None
        model.tokenizer_description = stored.meta.get("tokenizer")
        return model.to(device).eval()
