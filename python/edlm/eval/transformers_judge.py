"""A Hugging Face causal language model, from a local folder or a GGUF file, as a judge; and its features, for MAUVE."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from ..ops import gather_log_probs, linear_log_probs
from ..samplers.evaluating import evaluating
from .judges import Encoded, LostCharacters, Scores, check_count, check_texts, score_encoded

_LOGITS_BYTES = 256 << 20  # of float32, in one call, where a model's logits cannot be had row by row
_END_OF_TEXT = "<|endoftext|>"


class TransformersJudge:
    """A model and its tokenizer, of the library transformers.

    In front of a text stands the tokenizer's BOS; else its EOS, else ``<|endoftext|>``, as GPT-2 is commonly used: then every token is
    scored. Where it has none of them, the first token of each piece is read and not scored, and its characters are not counted. A
    context is ``max_position_embeddings`` of the configuration, the token in front included; the last token of a piece is scored
    and never read.

    Special tokens that a text spells are read as text. A text is not scored where the tokenizer raises, makes a special token of
    anything ("unknown" is one), or drops a letter or digit. One that normalises (to lower case, say) scores what it makes of a text;
    ``characters`` are those of the text.

    Log-probabilities are float32 whatever the dtype of the weights, from the last hidden states and the output layer, a chunk of logits
    at a time. A model that does more to its logits (caps or scales them) is asked for them all: then a call has as few texts as 256 MB
    of logits allow, at least one.

    Args:
        model: an ``AutoModelForCausalLM``, on its device. It is put into eval mode for each call.
        tokenizer: its fast tokenizer. name: as tables show it. batch_size: texts, or pieces, in one call.

    Raises:
        ValueError: a tokenizer that is not a fast one (it cannot tell which characters a token covers); counts below 1.
    """

    def __init__(self, model: Any, tokenizer: Any, *, name: str, batch_size: int = 8) -> None:
        check_count("batch_size", batch_size)
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"tokenizer: expected a fast one (tokenizer.json), got {type(tokenizer).__name__}; convert it first")
        self.model, self.tokenizer, self.name, self.batch_size = model, tokenizer, name, batch_size
        vocabulary = tokenizer.get_vocab()
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, vocabulary.get(_END_OF_TEXT))
        self.first_token_id: int | None = next((i for i in candidates if i is not None), None)
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self._special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.int64)
        self._lost = LostCharacters(lambda text: self._tokenize(text)["input_ids"])
        with torch.no_grad(), evaluating(model):
            self._output_layer = self._linear_head()

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """From a folder that ``save_pretrained`` of model and tokenizer wrote: config.json, safetensors, tokenizer.json.

        Args:
            name: the folder's name if None. device: the CPU if None. dtype: of the weights.

        Raises:
            ValueError: no such folder, or none with such a model. ImportError: transformers is not installed.
        """
        folder = Path(path)
        if not (folder / "config.json").is_file():
            what = "a folder without config.json" if folder.is_dir() else "no folder of that name"
            raise ValueError(f"path: expected the folder of a causal language model of transformers, got {path}: {what}")
        return cls._load(folder, {}, {"use_safetensors": True}, name or folder.resolve().name, device, batch_size, dtype)

    @classmethod
    def from_gguf(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        device: torch.device | str | None = None,
        batch_size: int = 8,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """From a GGUF file, which is dequantised as it is loaded: the judge is as large as its ``dtype`` makes it.

        Args and what is raised: as ``from_folder``; the packages gguf and accelerate are needed as well.
        """
        file = Path(path)
        if not file.is_file() or file.suffix != ".gguf":
            raise ValueError(f"path: expected a .gguf file, got {path}{'' if file.exists() else ', which does not exist'}")
        _need("transformers", "gguf", "accelerate")
        return cls._load(file.parent, {"gguf_file": file.name}, {}, name or file.stem, device, batch_size, dtype)

    @classmethod
    def _load(
        cls,
        folder: Path,
        source: dict[str, Any],
        only_model: dict[str, Any],
        name: str,
        device: torch.device | str | None,
        batch_size: int,
        dtype: torch.dtype,
    ) -> Self:
        _need("transformers")
        import transformers as library

        local = source | {"local_files_only": True, "trust_remote_code": False}
        try:
            with _bars_for_a_terminal():
                tokenizer = library.AutoTokenizer.from_pretrained(folder, **local)
                model = library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **local, **only_model)
        except (OSError, ValueError, KeyError) as error:  # what the library raises for files that are missing or strange
            where = folder / source.get("gguf_file", "")
            raise ValueError(
                f"path: expected a causal language model with its tokenizer, got {where}, which does not load: {error}"
            ) from error
        return cls(model.to(device or "cpu").eval(), tokenizer, name=name, batch_size=batch_size)

    def score(self, texts: Sequence[str]) -> Scores:
        """Scores of N texts. Raises ValueError for what is no list of texts."""
        check_texts(texts)
        front = self.first_token_id is not None
        encoded = [self._encode(text) for text in texts]
        piece = None if self.context is None else self.context + (not front)
        batch_size = self.batch_size
        if self._output_layer is None:
            longest = max((len(text.ids) for text in encoded if isinstance(text, Encoded)), default=1)
            row = 4 * self.model.config.get_text_config().vocab_size * min(longest, piece or longest)
            batch_size = max(1, min(batch_size, _LOGITS_BYTES // row))
        with torch.no_grad(), evaluating(self.model):
            return score_encoded(
                encoded,
                lambda ids, real: self._log_probs(ids.to(self.model.device), real),
                batch_size=batch_size,
                piece=piece,
                skip=int(not front),
            )

    def features(self, texts: Sequence[str]) -> torch.Tensor:
        """float32 [N, D] on the CPU: the last layer's hidden state at each text's last token, behind the token that stands in front.

        Of a text longer than the context, the end is read.

        Raises:
            ValueError: a text that the judge cannot read, the empty one included; ``score`` tells of all which they are.
        """
        check_texts(texts)
        rows = []
        for i, text in enumerate(texts):
            encoded = self._encode(text)
            if isinstance(encoded, str):
                raise ValueError(f"texts: expected texts that {self.name} can read, got texts[{i}], {encoded}; leave it out")
            room = None if self.context is None else self.context - (self.first_token_id is not None)
            rows.append(encoded.ids if room is None else encoded.ids[-room:])
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = torch.empty(len(rows), self.model.config.get_text_config().hidden_size)
        with torch.no_grad(), evaluating(self.model):
            for begin in range(0, len(order), self.batch_size):
                index = order[begin : begin + self.batch_size]
                ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in index], batch_first=True)
                real = torch.arange(ids.shape[1]) < torch.tensor([len(rows[i]) for i in index])[:, None]
                inputs, mask = self._behind_front(ids.to(self.model.device), real)
                last = (mask.sum(1) - 1)[:, None, None]
                hidden = self._hidden(inputs, mask)
                found[index] = hidden.take_along_dim(last, 1)[:, 0].float().cpu()
        return found

    def _log_probs(self, ids: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """float32 [B, L]; 0 in the first column where nothing stands in front."""
        inputs, mask = self._behind_front(ids, real)
        inputs, mask = inputs[:, :-1], mask[:, :-1]
        targets = ids[:, -inputs.shape[1] :]
        if self._output_layer is None:
            logits = self.model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
            scored = gather_log_probs(logits, targets)
        else:
            hidden, layer = self._hidden(inputs, mask), self._output_layer
            scored = linear_log_probs(hidden.flatten(0, 1), layer.weight, targets.flatten(), layer.bias).view(targets.shape)
        return torch.nn.functional.pad(scored, (ids.shape[1] - scored.shape[1], 0))

    def _behind_front(self, ids: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and attention mask, int64, of what the model reads."""
        mask = real.to(ids)
        if self.first_token_id is None:
            return ids, mask
        return tuple(torch.nn.functional.pad(x, (1, 0), value=v) for x, v in ((ids, self.first_token_id), (mask, 1)))

    def _hidden(self, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model.base_model(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state

    def _linear_head(self) -> torch.nn.Linear | None:
        """The output layer, if the model's logits are it and nothing else: to the last bit, on a short text."""
        layer = self.model.get_output_embeddings()
        if not isinstance(layer, torch.nn.Linear) or self.model.base_model is self.model:
            return None
        inputs = torch.arange(min(4, layer.out_features), device=layer.weight.device)[None]
        mask = torch.ones_like(inputs)
        logits = self.model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
        return layer if torch.equal(layer(self._hidden(inputs, mask)), logits) else None

    def _tokenize(self, text: str) -> dict[str, Any]:
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )

    def _encode(self, text: str) -> Encoded | str:
        if not text:
            return "empty"
        try:
            found, lost = self._tokenize(text), self._lost(text)
        except Exception as error:  # the library's own errors are plain Exceptions
            return f"cannot be encoded: {error}"
        ids = torch.tensor(found["input_ids"], dtype=torch.int64)
        begin, end = torch.tensor(found["offset_mapping"], dtype=torch.int64).view(-1, 2).unbind(1)
        special = torch.isin(ids, self._special).nonzero().flatten().tolist()
        if special:
            return f"cannot be encoded: {text[begin[special[0]] : end[special[0]]]!r}"
        if lost is not None:
            return f"cannot be encoded: {lost!r}"
        if len(ids) == 0:
            return "nothing that the tokenizer keeps"
        # A character of several tokens is its last one's; white space that offsets leave out is the token's behind it.
        borders = torch.cat([begin.new_zeros(1), torch.minimum(begin[1:], end[:-1]), torch.tensor([len(text)])])
        return Encoded(ids, borders.diff())


@contextlib.contextmanager
def _bars_for_a_terminal() -> Iterator[None]:
    """The library's progress bars, which would fill a log, are off unless somebody looks on."""
    from transformers import modeling_gguf_pytorch_utils as gguf  # its bar heeds no setting
    from transformers.utils import logging

    if sys.stderr.isatty():
        yield
        return
    enabled, bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = bar
        if enabled:
            logging.enable_progress_bar()


def _need(*packages: str) -> None:
    if any(importlib.util.find_spec(package) is None for package in packages):
        raise ImportError(f"this judge needs the packages {', '.join(packages)}: pip install 'edlm-torch[judges]'")
