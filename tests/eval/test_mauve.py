"""MAUVE against its definition, on clusters that k-means finds. The draws' seeds are fixed."""

from __future__ import annotations

import pytest
import torch
from edlm.eval.mauve import mauve

pytestmark = pytest.mark.filterwarnings("ignore:mauve. .* texts are few")


def clusters(n: int, shares: list[float], seed: int) -> torch.Tensor:
    """[n, 16]: tight clusters on different axes, in these shares."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(len(shares)).repeat_interleave(torch.tensor([round(n * share) for share in shares]))
    return torch.eye(16)[which] + 0.01 * torch.randn(len(which), 16, generator=generator)


@pytest.fixture(autouse=True)
def _installed() -> None:
    pytest.importorskip("mauve", reason="the extra metrics is not installed")


def area(p: list[float], q: list[float]) -> float:
    """The area under (exp(-5 KL(Q | R)), exp(-5 KL(P | R))), from x = 0, where y = 1, to the point where Q = R."""
    w = torch.linspace(0, 1, 100_001, dtype=torch.float64)[1:-1, None]
    p, q = torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64)
    r = w * p + (1 - w) * q
    x, y = ((-5 * torch.xlogy(law, law / r).nansum(1)).exp() for law in (q, p))
    return float(torch.trapezoid(y.flip(0), x.flip(0)) + x.min() * y.max())


@pytest.mark.parametrize(
    ("p", "q"),
    [([0.5, 0.5, 0], [0.5, 0, 0.5]), ([0.4, 0.4, 0.2], [0.4, 0.4, 0.2]), ([0.4, 0.4, 0.2], [0.2, 0.6, 0.2])],
)
def test_the_area_by_hand(p: list[float], q: list[float]) -> None:
    """30 texts a side are three buckets, and the three clusters are found: the area of their own histograms."""
    got = mauve(clusters(30, p, 0), clusters(30, q, 1), seed=0)
    assert got == pytest.approx(area(p, q), abs=0.01)
    assert (got == 1) == (p == q)
    assert mauve(clusters(30, p, 0).double(), clusters(60, q, 2), seed=0) == pytest.approx(got, abs=1e-6)  # only shares count
    assert mauve(clusters(30, p, 0), clusters(30, q, 1), seed=0) == got


def test_the_ends() -> None:
    p = clusters(40, [0.5, 0.5], 0)
    assert 0.8 < mauve(p, clusters(40, [0.5, 0.5], 1), seed=0) <= 1  # two of the four buckets split a cluster at random
    assert 0 < mauve(p, clusters(40, [0, 0, 0.5, 0.5], 1), seed=0) < 0.01


@pytest.mark.parametrize("features", [clusters(20, [0.5, 0.5], 0), torch.eye(4).repeat(8, 1), torch.ones(32, 4)])
@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # no variance at all
def test_a_set_is_itself(features: torch.Tensor) -> None:
    """Histograms that are equal to the last bit too, of which the curve is one point."""
    assert mauve(features, features.clone(), seed=1) == 1.0


def test_few_texts_are_warned_of(recwarn: pytest.WarningsRecorder) -> None:
    many, few = clusters(100, [0.5, 0.5], 0), clusters(98, [0.5, 0.5], 1)
    for sets in ((few, many), (many, few)):
        with pytest.warns(
            UserWarning, match=r"mauve: 98 texts are few: .* close to 1 whatever the texts; take at least 100"
        ) as found:
            mauve(*sets, seed=0)
        assert found[0].filename == __file__
    mauve(many, many, seed=0)
    assert not recwarn


def test_errors() -> None:
    p = clusters(20, [1.0], 0)
    with pytest.raises(ValueError, match=r"features_p: expected at least 20 texts .*, got 19"):
        mauve(p[1:], p, seed=0)
    with pytest.raises(ValueError, match=r"features_q: expected floating \[N, D\], one row a text, got torch.int64 \[20, 16\]"):
        mauve(p, p.long(), seed=0)
    with pytest.raises(ValueError, match=r"expected the same D >= 1, of one model, got 16 and 15"):
        mauve(p, p[:, 1:], seed=0)
    with pytest.raises(ValueError, match="features_p: expected finite numbers"):
        mauve(p.masked_fill(p > 1, torch.nan), p, seed=0)
    with pytest.raises(ValueError, match="seed: expected an int"):
        mauve(p, p, seed=-1)
