"""The trained models that come with the sources: read, scored and used, on text that none has seen (docs/trained_models.md)."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from edlm.data import CharTokenizer, open_text, windows
from edlm.diffusion import LogLinearSchedule, MaskedDiffusion, nce_batch, nce_loss
from edlm.eval import ar_nll, nelbo
from edlm.eval.documents import read_documents
from edlm.eval.report import page
from edlm.models import CausalLM, DiT, NCEEnergy
from edlm.samplers import generate

MODELS = Path(__file__).parent.parent / "examples" / "models"


@pytest.fixture(scope="module")
def x0():
    """The bundled text's test split: the last twentieth of the novels, which lies in no train split."""
    return windows(CharTokenizer().encode(" ".join(open_text("bundled").split("test"))), 128, 48)


def test_all_weights_together_stay_small():
    sizes = [path.stat().st_size for path in MODELS.rglob("*.safetensors")]
    assert len(sizes) == 3 and sum(sizes) <= 8_000_000


def test_bits_per_character(x0):
    """Both learnt English, and the autoregressive model more of it; 27 characters by chance would be 4.75 bits."""
    ar = ar_nll(CausalLM.from_pretrained(MODELS / "pd_ar"), x0).bits_per_character()
    bound = nelbo(DiT.from_pretrained(MODELS / "pd_mdlm"), x0, num_times=2).bits_per_character()
    assert 1.4 < ar.mean < 2.2
    assert ar.mean + 2 * ar.stderr < bound.mean < 3.2


def test_the_energy_tells_text_from_proposals(x0):
    """Far better than chance, at 5 standard errors; at E = 0 the loss would be 2 ln 2."""
    energy, denoiser = NCEEnergy.from_pretrained(MODELS / "pd_nce"), DiT.from_pretrained(MODELS / "pd_mdlm")
    diffusion = MaskedDiffusion(LogLinearSchedule(), denoiser.mask_token_id)
    batch = nce_batch(denoiser, x0, diffusion, num_negatives=1, seed=0, times=1 - torch.arange(len(x0)) / len(x0))
    with torch.no_grad():
        scores = energy(*batch)
    loss = nce_loss(scores[:, 0], scores[:, 1:])
    error = lambda values: float(values.std()) / math.sqrt(len(values))  # noqa: E731
    assert float(loss.accuracy.mean()) - 5 * error(loss.accuracy) > 0.5
    assert float(loss.nats.mean()) + 3 * error(loss.nats) < 2 * math.log(2)


def test_they_decode_together():
    energy, denoiser = NCEEnergy.from_pretrained(MODELS / "pd_nce"), DiT.from_pretrained(MODELS / "pd_mdlm")
    out = generate(denoiser, batch_size=2, length=32, steps=4, energy=energy, num_candidates=4, window=(0, 1))
    assert 1 <= float(out.ess.nanmean()) < 4 and int(out.tokens.max()) < denoiser.mask_token_id


@pytest.mark.parametrize("name", ["pd_ar", "pd_mdlm", "pd_nce"])
def test_their_curves_lie_beside_them(name):
    rows = [json.loads(line) for line in (MODELS / f"{name}.metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and any("valid_nce_loss" in row or "valid_bits" in row for row in rows)


def test_the_report_is_what_the_documents_make(monkeypatch):
    """docs/pd_report/report.md, to the letter; its pictures lie beside it."""
    root = MODELS.parent.parent
    monkeypatch.chdir(root)
    documents = read_documents(sorted(str(path.relative_to(root)) for path in (MODELS / "evaluation").glob("*.json")))
    report = root / "docs" / "pd_report"
    pictures = [path.name for path in report.glob("*.png")]
    assert (report / "report.md").read_text() == page(documents, baseline="MDLM", pictures=pictures)
    assert {"quality_vs_steps.png", "quality_vs_seconds.png", "quality_vs_entropy.png", "ess_vs_t.png", "bounds_vs_n.png"} <= set(
        pictures
    )
