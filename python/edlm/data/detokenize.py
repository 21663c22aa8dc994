"""Benchmarks' spaced-out tokens to running text, each in its own way: what a model of ordinary text is tested on.

They follow the practice of zero-shot perplexities (GPT-2; SEDD, arXiv 2310.16834; MDLM, arXiv 2406.07524): spaces that a benchmark put
around punctuation go, its placeholders become something that a text would have. The rules are our own, so that the last digit of
a published perplexity may differ.
"""

from __future__ import annotations

import re

Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> Rules:
    return tuple((re.compile(pattern), by) for pattern, by in pairs)


_WIKITEXT = _rules(
    (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000, well @-@ known
    (r" ([,.:;?!])(?=\s|$)", r"\1"),
    (r"\( ?([^()]*?) ?\)", r"(\1)"),
    (r"\[ ?([^\[\]]*?) ?\]", r"[\1]"),
    (r"\{ ?([^{}]*?) ?\}", r"{\1}"),
    (r'" ?([^"\n]*?) ?"', r'"\1"'),
    (r" '(?=(?:s|t|d|m|re|ve|ll)\b)", "'"),  # it 's
    (r"(?<=s) '(?=\s|$)", "'"),  # the players ' own
    (r"(?<==) (?==)", ""),  # = = Early life = =
    (r" ° ", "°"),
    (r" *\n *", "\n"),
)
_PTB = _rules(
    (r" (?='s\b|n't\b)", ""),
    (r"(?<=s) '(?= )", "'"),
    (r"\\/", "/"),
    (r"(?<= )N(?= |$)|^N(?= )", "1"),  # every number was replaced by N
    (r"([$#]) (?=1)", r"\1"),
    (r"<unk>", "?"),
    (r" *\n *", "\n"),
)
_LM1B = _rules(
    (r"\b(https?) ?: / / ", r"\1://"),
    (r" '(?=\w)", "'"),
    (r"(?<=\w) \.(?= |$)", "."),
    (r" ([?!])(?= |$)", r"\1"),
    (r" ([,:;])(?= )", r"\1"),
    (r" / ", "/"),
    (r'" ([^"]+) "', r'"\1"'),
    (r"' ([^']+) '", r"'\1'"),
    (r"\( ([^()]+) \)", r"(\1)"),
    (r"\[ ([^\[\]]+) \]", r"[\1]"),
    (r"([$£]) ", r"\1"),
)
_QUOTES = str.maketrans({"“": '"', "”": '"'})


def _apply(rules: Rules, text: str) -> str:
    for pattern, by in rules:
        text = pattern.sub(by, text)
    return text


def wikitext(text: str) -> str:
    """WikiText: ``@-@``, ``@,@`` and ``@.@`` without their marks; punctuation, brackets and quotes closed up; headings as ``==``."""
    return _apply(_WIKITEXT, text)


def ptb(text: str) -> str:
    """Penn Treebank: ``do n't`` to ``don't``, ``\\/`` to ``/``, N (a number) to 1, ``<unk>`` to ``?``."""
    return _apply(_PTB, text)


def lm1b(text: str) -> str:
    """One Billion Words: punctuation, quotes, brackets, currencies and addresses closed up."""
    return _apply(_LM1B, text)


def ag_news(text: str) -> str:
    """AG News: its few spaced-out places, as in One Billion Words."""
    return lm1b(text)


def lambada(text: str) -> str:
    """LAMBADA: straight quotes, and a passage that begins on a line of its own, as GPT-2 was tested."""
    return "\n" + text.translate(_QUOTES).strip()


def scientific_papers(text: str) -> str:
    """The arXiv and PubMed papers: as WikiText, then as One Billion Words."""
    return lm1b(wikitext(text))
