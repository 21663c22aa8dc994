"""Documents as ``edlm eval --json`` writes them, made by hand: of plausible models, and small ones."""

from __future__ import annotations

import json
import math

CHARACTERS = 4.3  # of a token
MACHINE = {"torch": "2.13.0", "device": "cpu", "threads": 2}


def estimate(mean, stderr=None):
    return {"mean": mean, "stderr": stderr}


def scaled(bits, stderr, characters=CHARACTERS):
    """An estimate in bits per character, in all units."""
    nats, error = bits * characters * math.log(2), None if stderr is None else stderr * characters * math.log(2)
    perplexity = math.exp(nats)
    return {
        "nats_per_token": estimate(nats, error),
        "bits_per_token": estimate(bits * characters, None if stderr is None else stderr * characters),
        "bits_per_character": estimate(bits, stderr),
        "perplexity": estimate(perplexity, None if error is None else perplexity * error),
    }


_DIRECTIONS = {
    "ar_nll": "exact",
    "nelbo": "upper bound",
    "paper_joint": "no bound",
    "finite_step_elbo": "no bound",  # as log Z goes in from below
    "exact": "exact",
    "lower": "below in expectation",
    "upper_asymptotic": "above for n large enough",
}


def likelihood_row(text, measure, bits, stderr=0.01, *, steps=None, n=None, log_Z=None, ess=None, **changes):
    return {
        "text": text,
        "measure": measure,
        "steps": steps,
        "num_candidates": n,
        "log_Z": log_Z,
        "direction": _DIRECTIONS[measure] if measure in _DIRECTIONS else _DIRECTIONS[log_Z],
        **scaled(bits, stderr),
        "ess": None if ess is None else estimate(ess, 0.1),
        "sequences": 512,
        "length": 128,
        "characters_per_token": CHARACTERS,
        "sequences_per_second": 12.5,
    } | changes


def texts_row(method, steps, judges, entropy, seconds=None, **changes):
    """``judges``: name -> (bits per character, stderr)."""
    judged = {}
    for name, (bits, error) in judges.items():
        units = scaled(bits, error)
        del units["nats_per_token"]
        judged[name] = {**units, "texts": 64, "skipped": 0}
    return {
        "method": method,
        "steps": steps,
        "num_texts": 64,
        "length": 128,
        "nfe": steps,
        "energy_nfe": None if steps is None else 0,
        "seconds": seconds,
        "judges": judged,
        "entropy": estimate(entropy, 0.02),
        "distinct": {"1": 0.31, "2": 0.74, "4": 0.98},
        "repetition": {"4": estimate(0.012, 0.002)},
        "self_bleu": estimate(0.215, 0.004),
        "mauve": None,
        "ess": None,
        "example": "She had been there for an hour.",
    } | changes


def document(kind, label, rows, **changes):
    return {
        "edlm eval": 1,
        "kind": kind,
        "label": label,
        "settings": {"length": 128, "seed": 0},
        "machine": MACHINE,
        "seconds": 12.3,
        "warnings": [],
        "rows": rows,
    } | changes


def real_text_row(judges=("smollm2", "ngram"), **changes):
    levels = {"smollm2": (1.12, 0.02), "ngram": (2.31, 0.01)}
    return texts_row("real text", None, {name: levels[name] for name in judges}, 6.02, nfe=None, energy_nfe=None, **changes)


def _ess(steps, n, peak):
    centres = [(i + 0.5) / 8 for i in range(8)]
    return [
        {
            "t": t,
            "mean": 1 + (n - 1) * (1 - peak * t * (1 - t) * 4),
            "stderr": 0.15,
            "count": 8 * steps,
            "num_candidates": float(n),
        }
        for t in centres
    ]


def decoding(label, *, gain, energy=None, slower=1.0, steps=(4, 8, 16, 32, 64, 128), real=True):
    """A model whose scores fall with steps; ``gain`` bits better at few steps, ``slower`` times as long."""
    rows = [real_text_row()] if real else []
    for i, count in enumerate(steps):
        base = 1.25 + 1.9 / count**0.5 - gain / (1 + i)
        seconds = slower * (0.4 + 0.055 * count)
        entropy = 6.1 - 0.05 * i - (0.01 if energy else 0.0)
        row = texts_row(label, count, {"smollm2": (base, 0.03), "ngram": (2.2 + 0.45 * base, 0.015)}, entropy, seconds)
        rows.append(
            row | {"energy_nfe": count // 2 if energy else 0, "ess": _ess(count, energy, 0.8 - 0.1 * i) if energy else None}
        )
    return document("decoding", label, rows)


def curve(label, points, stderr=None, **changes):
    """A document of texts, scored by a judge j: (steps, seconds of a text, bits, entropy) each."""
    rows = [texts_row(label, steps, {"j": (bits, stderr)}, entropy, 64 * seconds) for steps, seconds, bits, entropy in points]
    return document("decoding", label, rows) | changes


def bounds(label, text, exact, spread):
    rows = []
    for n in (1, 2, 4, 8, 16, 32, 64):
        ess = 1 + 0.3 * (n - 1) ** 0.8
        rows.append(likelihood_row(text, "joint_nll", exact - spread / n**0.5, steps=1, n=n, log_Z="lower", ess=ess))
        if n > 1:
            upper = exact + 0.6 * spread / n**0.5
            rows.append(likelihood_row(text, "joint_nll", upper, steps=1, n=n, log_Z="upper_asymptotic", ess=ess))
    return rows


def plausible():
    """name of a file -> document: a denoiser, an AR model, two energies; likelihoods and texts of each."""
    texts = ("bundled/test", "wikitext/test")
    nelbo = {text: likelihood_row(text, "nelbo", bits, 0.004) for text, bits in zip(texts, (1.6712, 1.9034), strict=True)}
    energy_rows = [*nelbo.values(), *bounds("EDLM-AR", texts[0], 1.55, 0.2), *bounds("EDLM-AR", texts[1], 1.8, 0.3)]
    energy_rows += [
        likelihood_row(text, "paper_joint", bits, n=8, log_Z="lower", ess=1.6)
        for text, bits in zip(texts, (1.50, 1.71), strict=True)
    ]
    energy_rows += [likelihood_row(texts[0], "finite_step_elbo", 1.61, steps=8, n=8, log_Z="lower", ess=3.1)]
    nce_rows = bounds("EDLM-NCE", texts[0], 1.6, 0.1)
    nce_rows += [likelihood_row(texts[0], "joint_nll", 1.6, 0.0, steps=1, log_Z="exact")]
    ar_texts = texts_row("AR", None, {"smollm2": (1.31, 0.03), "ngram": (2.45, 0.02)}, 5.98, 9.1, nfe=128)
    return {
        "mdlm.json": document("likelihood", "MDLM", list(nelbo.values())),
        "ar.json": document(
            "likelihood",
            "AR",
            [likelihood_row(text, "ar_nll", bits, 0.005) for text, bits in zip(texts, (1.512, 1.744), strict=True)],
        ),
        "edlm_ar.json": document("likelihood", "EDLM-AR", energy_rows, warnings=["the ESS of n is 1.6 of 8 draws"]),
        "edlm_nce.json": document("likelihood", "EDLM-NCE", nce_rows),
        "mdlm_texts.json": decoding("MDLM", gain=0.0),
        "edlm_ar_texts.json": decoding("EDLM-AR", gain=0.45, energy=8, slower=1.35),
        "edlm_nce_texts.json": decoding("EDLM-NCE", gain=0.2, energy=4, slower=1.2),
        "ar_texts.json": document("decoding", "AR", [real_text_row(), ar_texts]),
    }


def write(folder, documents):
    """Paths of the documents, in their order."""
    paths = []
    for name, plain in documents.items():
        paths.append(folder / name)
        paths[-1].write_text(plain if isinstance(plain, str) else json.dumps(plain), encoding="utf-8")
    return paths
