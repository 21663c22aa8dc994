"""Which texts are decoded together. It depends on the arguments alone: not on how many processes share them, nor on what is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class TextBatches:
    """Texts 0 .. total - 1 in groups of ``batch_size``. Text n is of prompt n // num and has the seed ``seed * total + n``."""

    num: int
    batch_size: int
    seed: int
    length: int | None = None
    prompts: list[torch.Tensor] | None = None  # int64 [L_i], each of its own length
    padding: int | None = None  # where they differ; what is there no network sees

    @property
    def total(self) -> int:
        return self.num * (1 if self.prompts is None else len(self.prompts))

    def __len__(self) -> int:
        return -(-self.total // self.batch_size)

    def indices(self, batch: int) -> range:
        return range(batch * self.batch_size, min((batch + 1) * self.batch_size, self.total))

    def seed_of(self, index: int) -> int:
        return self.seed * self.total + index

    def arguments(self, batch: int) -> dict[str, Any]:
        """For the sampler."""
        indices = self.indices(batch)
        seed = self.seed_of(indices[0])  # the sampler counts on from it
        if self.prompts is None:
            return {"batch_size": len(indices), "length": self.length, "seed": seed}
        rows = [self.prompts[n // self.num] for n in indices]
        lengths = torch.tensor([len(row) for row in rows])
        if bool((lengths == lengths[0]).all()):
            return {"prompt": torch.stack(rows), "length": self.length, "seed": seed}
        prompt = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.padding)
        return {"prompt": prompt, "lengths": lengths, "pad_token_id": self.padding, "seed": seed}


def read_prompts(path: str, tokenizer: Any) -> tuple[list[str], list[torch.Tensor]]:
    """One prompt a line, as text and as ids; only the ends of lines are taken away."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"--prompt-file: {path}: expected a file of prompts, got: {error.strerror}; name one that is there"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt-file: {path}: expected UTF-8, got byte {error.object[error.start]:#04x} at {error.start}; save it as UTF-8"
        ) from None
    lines = text.replace("\r\n", "\n").split("\n")
    lines = lines[:-1] if lines[-1] == "" else lines
    if not lines:
        raise ValueError(f"--prompt-file: {path}: expected a prompt a line, got an empty file")
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            ids = prompt_ids(line, tokenizer)
            if not (ids == tokenizer.mask_token_id).any():
                shown = tokenizer.decode([tokenizer.mask_token_id])
                raise ValueError(f"prompt: expected {shown} wherever text is wanted, got {line!r}; there is nothing to generate")
        except ValueError as error:
            raise ValueError(f"--prompt-file: {path}, line {number}: {error}") from None
        prompts.append(ids)
    return lines, prompts


def prompt_ids(text: str, tokenizer: Any) -> torch.Tensor:
    return torch.from_numpy(tokenizer.encode_prompt(text).astype("int64"))
