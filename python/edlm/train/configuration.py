"""What a run is made of: the tables of a training TOML, each a dataclass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from ..models import CausalLM, CausalLMConfig, DiT, DiTConfig, NCEEnergy, preset


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """[model]. ``preset`` gives the sizes; a size that is set replaces the preset's.

    An ``nce_energy`` has the sizes of the denoiser that it starts from, so it takes none but ``dropout``.
    """

    kind: Literal["dit", "causal_lm", "nce_energy"]
    preset: str | None = None  # tiny
    dim: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    dropout: float | None = None
    cond_dim: int = 128  # dit
    time_conditioning: bool = False  # dit
    pooling: Literal["sum", "mean"] = "sum"  # nce_energy

    def __post_init__(self) -> None:
        if self.preset is not None:
            preset(self.preset)
        for name in ("dim", "num_layers", "num_heads", "cond_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout}")

    def build(self, *, vocab_size: int, mask_token_id: int, bos_token_id: int, max_length: int | None = None) -> DiT | CausalLM:
        """An untrained network from torch's global generator. ``vocab_size`` counts the mask, which is the last id."""
        sizes = preset(self.preset or "tiny")
        sizes |= {name: getattr(self, name) for name in sizes if getattr(self, name) is not None}
        if self.kind == "dit":
            return DiT(
                DiTConfig(
                    vocab_size=vocab_size,
                    mask_token_id=mask_token_id,
                    cond_dim=self.cond_dim,
                    time_conditioning=self.time_conditioning,
                    max_length=max_length,
                    **sizes,
                )
            )
        return CausalLM(CausalLMConfig(vocab_size=vocab_size - 1, bos_token_id=bos_token_id, max_length=max_length, **sizes))

    def build_energy(self, proposal: DiT) -> NCEEnergy:
        """The energy that starts as a copy of the proposal, and as 0."""
        return NCEEnergy.from_denoiser(proposal, pooling=self.pooling, dropout=self.dropout)


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """[data].

    ``text``: "bundled", a UTF-8 file (.txt, .xz, .gz: split 90 / 5 / 5 in order), a folder (of train.*, valid.*, test.*, or of any text
    files) or the name of a dataset (``edlm.data.CORPORA``). ``tokens``: instead, a folder that ``edlm data build`` made.
    ``tokenizer``: "text8", or where a BPE lies (a tokenizer.json, or a folder with GPT-2's two files).
    ``blocks``: "plain" windows, or "bos_eos": length - 2 tokens between BOS and EOS.
    """

    text: str = "bundled"
    tokens: str | None = None
    tokenizer: str = "text8"
    length: int = 128
    blocks: Literal["plain", "bos_eos"] = "plain"
    workers: int = 1

    def __post_init__(self) -> None:
        if self.length < (1 if self.blocks == "plain" else 3):
            raise ValueError(f"length: expected a number >= 1 (3 with BOS and EOS), got {self.length}")
        if self.workers < 1:
            raise ValueError(f"workers: expected a number >= 1, got {self.workers}")


@dataclass(frozen=True, kw_only=True)
class DiffusionSpec:
    """[diffusion], for a dit and for NCE. ``t_min`` bounds the weight 1/t of the loss; the part below it is not trained on."""

    schedule: Literal["log_linear", "cosine", "linear", "geometric"] = "log_linear"
    eps: float = 1e-3
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        for name in ("eps", "t_min"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}; 1e-3 is usual")


@dataclass(frozen=True, kw_only=True)
class NceSpec:
    """[nce]: noise contrastive estimation against a frozen ``proposal``, the folder of a trained denoiser.

    An ``nce_energy`` starts from the proposal's weights. A ``causal_lm`` starts from ``start``, the folder of a trained one, and its
    residual energy is what is trained (``carry_over`` as in ``ARResidualEnergy``).
    """

    proposal: str
    start: str | None = None
    num_negatives: int = 1
    carry_over: bool = False

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives: expected a number >= 1, got {self.num_negatives}")


@dataclass(frozen=True, kw_only=True)
class SystemSpec:
    """[system]: how a run computes. None of it changes what is computed but for rounding; of dropout, ``micro_batch_size`` and
    ``compile`` change which units are dropped.

    ``micro_batch_size``: rows that go through the network at once; the gradients of a batch are added up, and processes share its
    micro-batches. Dropout masks belong to a micro-batch, so with one size they are the same for any number of processes. None is the
    batch divided by the processes.
    ``precision``: "bfloat16" is autocast: weights, losses and sums stay float32. ``parallel``: "ddp" copies the model, "fsdp" shards it
    (FSDP2); checkpoints of either go on as the other, and with another number of processes.
    """

    micro_batch_size: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    activation_checkpointing: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"

    def __post_init__(self) -> None:
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: expected a number >= 1, got {self.micro_batch_size}")


@dataclass(frozen=True, kw_only=True)
class LoggingSpec:
    """[logging]. ``metrics.jsonl`` is always written; ``sinks`` adds others. ``samples``: texts to generate at each validation."""

    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    samples: int = 0
    sample_steps: int = 32

    def __post_init__(self) -> None:
        if self.samples < 0 or self.sample_steps < 1:
            raise ValueError(f"samples, sample_steps: expected >= 0 and >= 1, got {self.samples}, {self.sample_steps}")


@dataclass(frozen=True, kw_only=True)
class OptimSpec:
    """[optim]. AdamW; the learning rate rises over ``warmup_steps`` and then follows ``decay`` to ``final_lr_ratio`` of itself."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final_lr_ratio: float = 0.0
    grad_clip: float = 1.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or self.warmup_steps < 0 or not self.grad_clip > 0:
            raise ValueError(
                f"lr, warmup_steps, grad_clip: expected > 0, >= 0, > 0, got {self.lr}, {self.warmup_steps}, {self.grad_clip}"
            )
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay: expected a number >= 0, got {self.weight_decay}")
        if not 0 <= self.final_lr_ratio <= 1:
            raise ValueError(f"final_lr_ratio: expected a number in [0, 1], got {self.final_lr_ratio}")
        for name, value in (("ema_decay", self.ema_decay), ("betas[0]", self.betas[0]), ("betas[1]", self.betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run. Everything that it computes follows from this and the text."""

    model: ModelSpec
    data: DataSpec = field(default_factory=DataSpec)
    diffusion: DiffusionSpec = field(default_factory=DiffusionSpec)
    optim: OptimSpec = field(default_factory=OptimSpec)
    nce: NceSpec | None = None
    system: SystemSpec = field(default_factory=SystemSpec)
    logging: LoggingSpec = field(default_factory=LoggingSpec)
    steps: int = 1000
    batch_size: int = 32
    seed: int = 0
    log_every: int = 10
    valid_every: int = 250
    valid_windows: int = 128
    checkpoint_every: int = 250
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "valid_every", "valid_windows", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected a number in 0 .. 2**63 - 1, got {self.seed}")
        if self.model.kind == "nce_energy" and self.nce is None:
            raise ValueError("nce: expected a table [nce] with the proposal's folder for kind 'nce_energy', got none")
        if self.nce is not None and self.model.kind == "dit":
            raise ValueError("nce: expected kind 'nce_energy' or 'causal_lm' with a table [nce], got 'dit'")
        if self.nce is not None and (self.model.kind == "causal_lm") != (self.nce.start is not None):
            raise ValueError(
                "nce.start: expected the folder of a trained model with kind 'causal_lm', and none with 'nce_energy'"
            )
        if self.nce is not None:
            # A network that is there has its sizes: others would be recorded, and not be so.
            plain = ModelSpec(kind="dit")
            names = ("preset", "dim", "num_layers", "num_heads", "cond_dim", "time_conditioning")
            given = [name for name in names if getattr(self.model, name) != getattr(plain, name)]
            if given:
                raise ValueError(
                    f"model.{given[0]}: expected none with a table [nce], whose networks have their sizes, got "
                    f"{getattr(self.model, given[0])}; leave it out"
                )
        if self.nce is not None and self.nce.carry_over and self.model.kind == "nce_energy":
            raise ValueError("nce.carry_over: expected kind 'causal_lm' with it, got 'nce_energy'")
        micro = self.system.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise ValueError(f"system.micro_batch_size: expected a divisor of batch_size {self.batch_size}, got {micro}")
