"""From spaced-out tokens to running text: one table a benchmark."""

from __future__ import annotations

import pytest
from edlm.data import detokenize

TABLES = {
    "wikitext": [
        (" = Robert Boulter = \n", " = Robert Boulter =\n"),
        (" = = Early life = = \n", " == Early life ==\n"),
        (
            "a well @-@ known player of 1 @,@ 500 metres in 3 @.@ 5 minutes .",
            "a well-known player of 1,500 metres in 3.5 minutes.",
        ),
        ('He said : " no , never ! " ; why ? \n And', 'He said: "no, never!"; why?\nAnd'),
        ("it ( the first ) [ sic ] { x } ends", "it (the first) [sic] {x} ends"),
        ("it 's the players ' own , he 'd say 'sblood", "it's the players' own, he'd say 'sblood"),
        ("at 5 ° C", "at 5°C"),
        ("a U.S. state. No change, here", "a U.S. state. No change, here"),
        ("", ""),
    ],
    "ptb": [
        ("mr. <unk> is n't chairman", "mr. ? isn't chairman"),
        ("they do n't say it 's N N N", "they don't say it's 1 1 1"),
        ("up $ N billion or # N", "up $1 billion or #1"),
        ("the workers ' pay", "the workers' pay"),
        ("and\\/or NASA N", "and/or NASA 1"),
        ("N years \n later", "1 years\nlater"),
    ],
    "lm1b": [
        ('He said , " Go home ! " and left .', 'He said, "Go home!" and left.'),
        ("It 's the team 's $ 5 ( or £ 3 ) : fine ; really ?", "It's the team's $5 (or £3): fine; really?"),
        ("see http : / / example.org or https : / / x", "see http://example.org or https://x"),
        ("and / or [ sic ]", "and/or [sic]"),
        ("the ' quoted ' word", "the 'quoted' word"),
        ("One . Two .", "One. Two."),
    ],
    "ag_news": [
        ("Shares rose , he said .", "Shares rose, he said."),
        ("Wall St. Bears Claw Back Into the Black (Reuters)", "Wall St. Bears Claw Back Into the Black (Reuters)"),
    ],
    "lambada": [("“ no , ” he said , ‘ never ’ \n", '\n" no , " he said , ‘ never ’'), ("plain", "\nplain")],
    "scientific_papers": [
        ("we show ( see fig . [ fig1 ] ) that @xmath0 is large .", "we show (see fig. [fig1]) that @xmath0 is large."),
        ("well @-@ known , http : / / arxiv.org \n next", "well-known, http://arxiv.org\nnext"),
    ],
}


@pytest.mark.parametrize(("name", "text", "expected"), [(name, *row) for name, table in TABLES.items() for row in table])
def test_tables(name, text, expected):
    assert getattr(detokenize, name)(text) == expected


@pytest.mark.parametrize("name", ["wikitext", "ptb", "lm1b", "scientific_papers"])
def test_running_text_stays(name):
    text = "It isn't \"known\" (yet), they'd say; 3.5 of 1,000 [sic]: why?\nNo. End!"
    assert getattr(detokenize, name)(text) == text
