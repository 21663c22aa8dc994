"""A word trigram model as a judge: fast, and of another kind than any network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .judges import Scores, check_texts

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_START = "<s>"


class WordTrigramJudge:
    """An ARPA-style word trigram model read by pocketsphinx; by default its own English one, of some 20000 words.

    Its token is the word: letters and digits, apostrophes inside, in lower case; punctuation is not read, and sentences are not
    told apart. ``<s>`` stands in front of a text, so that the first word is scored; nothing is scored behind it. There is no limit of
    length. Words that the model does not know are left out, and the words behind them are scored without them: text of which
    much is unknown looks better than it is, so ``Scores.left_out`` counts them. A scored word covers its own characters and those
    between it and the word before.

    Args:
        path: a language model that pocketsphinx reads (ARPA or binary); None: the English one that comes with it.
        name: as tables show it.

    Raises:
        ImportError: pocketsphinx is not installed. ValueError: no such file, or no language model.
    """

    def __init__(self, path: str | Path | None = None, *, name: str = "word trigram") -> None:
        try:
            import pocketsphinx
        except ImportError:
            raise ImportError("the word trigram judge needs the package pocketsphinx: pip install pocketsphinx") from None
        path = Path(pocketsphinx.get_model_path("en-us/en-us.lm.bin") if path is None else path)
        if not path.is_file():
            raise ValueError(f"path: expected a file with a language model, got {path}, which is none")
        self.name, self._logs = name, pocketsphinx.LogMath()
        try:
            self._model = pocketsphinx.NGramModel(pocketsphinx.Config(lm=None), self._logs, str(path))
        except ValueError:
            raise ValueError(
                f"path: expected a language model that pocketsphinx reads (ARPA or binary), got {path}, which is none"
            ) from None

    def score(self, texts: Sequence[str]) -> Scores:
        """Scores of N texts, in words. Raises ValueError for what is no list of texts."""
        check_texts(texts)
        rows = [self._score(text) for text in texts]
        nats = torch.tensor([row[0] for row in rows], dtype=torch.float64)
        tokens, characters, left_out = (torch.tensor([row[k] for row in rows], dtype=torch.int64) for k in (1, 2, 3))
        return Scores(nats, tokens, characters, tuple(row[4] for row in rows), left_out)

    def _score(self, text: str) -> tuple[float, int, int, int, str | None]:
        """Nats, words scored, their characters, words left out, and the reason why there are none."""
        nats, scored, characters, end, before = 0.0, 0, 0, 0, [_START]  # the last word first
        words = [*_WORD.finditer(text)]
        for match in words:
            word = match[0].lower().replace("’", "'")
            log_prob = self._model.prob([word, *before])
            if log_prob > self._logs.get_zero():
                nats -= self._logs.log_to_ln(log_prob)
                scored, characters = scored + 1, characters + match.end() - end
            end, before = match.end(), [word, before[0]]
        if scored:
            return nats, scored, characters, len(words) - scored, None
        reason = "no word that the judge knows" if words else "no word in it" if text else "empty"
        return 0.0, 0, 0, 0, reason
