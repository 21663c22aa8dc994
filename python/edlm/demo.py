"""``edlm demo``: train a denoiser and an autoregressive model on real text, decode with and without the energy, let a third judge."""

from __future__ import annotations

import math
import time
from pathlib import Path

from .data import CharTokenizer, bundled_text, split, windows
from .eval import Estimate, NGramModel, ar_nll, distinct_n, unigram_entropy
from .models import ARResidualEnergy, CausalLM, DiT
from .samplers import SampleOutput, generate
from .train import DataSpec, ModelSpec, OptimSpec, TrainConfig, train

WINDOW = 128  # characters of a training window
LENGTH = 64  # characters of a decoded text
STEPS = (8, 32)
CANDIDATES = 16


def run_config(kind: str, steps: int) -> TrainConfig:
    """Both models have the same shape and see batches of 32 windows of 128 characters."""
    return TrainConfig(
        model=ModelSpec(kind=kind, preset="tiny"),
        data=DataSpec(text="bundled", length=WINDOW),
        optim=OptimSpec(lr=3e-3, warmup_steps=50, decay="cosine", ema_decay=0.99),
        steps=steps,
        valid_every=100,
        valid_windows=64,
        checkpoint_every=100,
        keep_checkpoints=1,
    )


def demo(out: str | Path, *, denoiser_steps: int = 700, ar_steps: int = 400, num_samples: int = 96, seed: int = 0) -> bool:
    """Run it all, print it all. True where EDLM beat MDLM by more than the noise at every number of steps."""
    if num_samples < 2:
        raise ValueError(f"num_samples: expected at least 2 texts, for there to be a standard error, got {num_samples}")
    # Both runs' configurations, before minutes go into the first.
    configs = {kind: run_config(kind, steps) for kind, steps in (("dit", denoiser_steps), ("causal_lm", ar_steps))}
    out, begin = Path(out), time.perf_counter()
    print("Text: Pride and Prejudice, Emma, Persuasion (Jane Austen), as lower-case letters and spaces.")
    print(f"1. Training a denoiser for {denoiser_steps} steps and an autoregressive model for {ar_steps}, into {out}/.")
    print("   (A folder with finished models is used as it is; Ctrl-C saves, and the same command goes on.)")
    denoiser = DiT.from_pretrained(train(configs["dit"], out / "denoiser", name="denoiser"))
    causal = CausalLM.from_pretrained(train(configs["causal_lm"], out / "autoregressive", name="autoregressive"))
    energy = ARResidualEnergy(causal, mask_token_id=denoiser.mask_token_id)

    tokenizer, text = CharTokenizer(), split(bundled_text())
    held_out = windows(tokenizer.encode(text.valid + text.test), LENGTH)
    # Odd windows train the judge, even ones show what it says of real text. No model has seen either.
    judge = NGramModel(held_out[1::2], vocab_size=tokenizer.vocab_size - 1)
    real, real_entropy = _bits(ar_nll(judge, held_out[0::2])), unigram_entropy(held_out[0::2])

    print(
        f"\n2. Decoding {num_samples} texts of {LENGTH} characters: MDLM draws from the denoiser; EDLM draws {CANDIDATES} candidates"
    )
    print("   a step and picks one by the energy -log p_AR + log mu, in every step (window 0 to 1).")
    print("   The judge is a 6-gram model of held-out text, unknown to both. Lower is better; +- is one standard error.\n")
    print(f"{'':22}{'judge, bits/char':>20}{'entropy, bits':>16}{'distinct 4-grams':>18}{'ESS':>8}{'seconds':>9}{'NFE':>6}")
    print(f"{'real text':22}{_pm(real):>20}{_pm(real_entropy):>16}{distinct_n(held_out[0 : 2 * num_samples : 2], 4):>18.2f}")
    texts, verdicts = [], []
    for steps in STEPS:
        scores = []
        for name, model in (("MDLM", None), ("EDLM", energy)):
            start = time.perf_counter()
            sample = generate(
                denoiser,
                batch_size=num_samples,
                length=LENGTH,
                steps=steps,
                energy=model,
                num_candidates=CANDIDATES if model else None,
                window=(0.0, 1.0),
                seed=seed,
            )
            seconds = time.perf_counter() - start
            scores.append(_bits(ar_nll(judge, sample.tokens)))
            _row(f"{name}, {steps} steps", scores[-1], sample, seconds)
            texts.append((f"{name}, {steps} steps", tokenizer.decode(sample.tokens[0])))
        verdicts.append(_verdict(steps, *scores))

    print()
    for sentence, _ in verdicts:
        print(sentence)
    print("\n3. One sample of each (the same seed):")
    for name, sample_text in texts:
        print(f"   {name:16}|{sample_text}|")
    print(f"\n{time.perf_counter() - begin:.0f} s in all. Go on with the models: edlm sample {out / 'denoiser' / 'model'} \\")
    print(
        f"    --energy {out / 'autoregressive' / 'model'} --steps 16 --window 0 1 --prompt 'she was ____________________ happy'"
    )
    return all(better for _, better in verdicts)


def _bits(estimate: Estimate) -> Estimate:
    return estimate.bits_per_character()


def _pm(estimate: Estimate) -> str:
    return f"{estimate.mean:.3f} +- {estimate.stderr:.3f}"


def _row(name: str, score: Estimate, sample: SampleOutput, seconds: float) -> None:
    used = sample.ess[~sample.ess.isnan()]
    ess = f"{float(used.mean()):.1f}" if used.numel() else "-"
    print(
        f"{name:22}{_pm(score):>20}{_pm(unigram_entropy(sample.tokens)):>16}{distinct_n(sample.tokens, 4):>18.2f}{ess:>8}"
        f"{seconds:>9.1f}{sample.nfe + sample.energy_nfe:>6}"
    )


def _verdict(steps: int, mdlm: Estimate, edlm: Estimate) -> tuple[str, bool]:
    """Better by more than the noise: by more than two standard errors of the difference."""
    gain, noise = mdlm.mean - edlm.mean, math.hypot(mdlm.stderr, edlm.stderr)
    text = f"{steps:>3} steps: EDLM is {abs(gain):.3f} +- {noise:.3f} bits/char {'better' if gain > 0 else 'worse'} than MDLM"
    if gain > 2 * noise:
        return text + ".", True
    return text + ": that is NOT better by more than the noise (two standard errors).", False
