"""Sections that the configs of all recipes share, with their checks."""

import dataclasses
from typing import Any

ATTENTIONS = ("performer", "softmax", "sliding_window")
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def require(condition: bool, key: str, what: str) -> None:
    """Raise ValueError that names the key unless the condition holds."""
    if not condition:
        raise ValueError(f"{key!r} must be {what}.")


def require_batch(
    source: str,
    count: int,
    examples: str,
    batch_size: int,
    advice: str = "Lower training.batch_size, or pass more.",
) -> None:
    """Raise ValueError, with the advice, unless the training examples of a source fill a batch."""
    if count < batch_size:
        raise ValueError(
            f"{source}: {count} {examples} are left to train on, fewer than one batch of "
            f"{batch_size}. {advice}"
        )


def require_buckets(data: Any) -> None:
    """Raise ValueError unless a section `[data]` says how lengths become batches.

    **Args**
        data: Batches end at a multiple of `length_multiple`, or at the full length if it is 0, and
            the examples of so many batches as `bucket_batches` says are sorted by length together.
    """
    require(data.length_multiple >= 0, "data.length_multiple", "at least 0 (full length)")
    require(data.bucket_batches >= 1, "data.bucket_batches", "at least 1")
    # On TensorFlow Keras takes the shapes of the first two batches for those of all, and `Batches`
    # begins with the longest and the shortest of three or more.
    require(
        data.bucket_batches >= 3 or not data.length_multiple,
        "data.bucket_batches",
        "at least 3 where data.length_multiple is above 0, for the first two batches to differ",
    )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What stands above the sections of every config."""

    seed: int

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed", "at least 0 and below 2**32")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Section `[model]`: the backbone, whose class checks what is not checked here.

    `attention` chooses between the Performer and its two baselines, which have the same other
    weights. `num_features`, `feature_map`, `exact_window`, `num_sink_tokens` and `far_bias` are
    read by "performer" only, and `sliding_window` by "sliding_window" only; 0 stands for none, and
    some maps take no other `num_features`.
    """

    num_layers: int
    num_heads: int
    hidden_dim: int
    intermediate_dim: int
    num_features: int
    dropout: float
    attention: str = "performer"
    feature_map: str = "favor_plus"
    exact_window: int = 0
    num_sink_tokens: int = 0
    far_bias: float = 0.0
    sliding_window: int = 64
    qk_norm: bool = True
    gated: bool = False
    reversible: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        require(self.attention in ATTENTIONS, "model.attention", f"one of {', '.join(ATTENTIONS)}")
        require(self.exact_window >= 0, "model.exact_window", "at least 0 (none)")

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a backbone's constructor."""
        arguments = dataclasses.asdict(self)
        arguments["exact_window"] = self.exact_window or None
        arguments["far_bias"] = self.far_bias or None
        arguments["num_features"] = self.num_features or None
        if self.attention != "sliding_window":
            arguments["sliding_window"] = None
        return arguments


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Section `[training]`: AdamW with a linear warm-up and a cosine decay.

    `batch_size` is what one step computes; with `accumulate` = n the weights move after every n
    steps, by the mean of their gradients. Validation, the backup and the place where a killed run
    resumes come after every `steps_per_epoch` steps. `patience` = n ends the training when the
    validation loss has not fallen for n epochs, and keeps the best weights; 0 trains to the end.
    `redraw_features_every` = n draws new random features after every n movements of the weights;
    `attention_health` measures after each epoch how far features are from softmax attention. On the
    baselines, which have no features, both have no effect.
    """

    steps: int
    steps_per_epoch: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    beta_2: float
    weight_decay: float
    clip_norm: float
    precision: str
    accumulate: int = 1
    patience: int = 0
    redraw_features_every: int = 0
    attention_health: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "steps_per_epoch", "batch_size", "accumulate"):
            require(getattr(self, name) >= 1, f"training.{name}", "at least 1")
        require(
            self.steps % self.steps_per_epoch == 0,
            "training.steps",
            f"a multiple of training.steps_per_epoch ({self.steps_per_epoch})",
        )
        require(
            self.steps_per_epoch % self.accumulate == 0,
            "training.accumulate",
            f"a divisor of training.steps_per_epoch ({self.steps_per_epoch})",
        )
        require(
            0 <= self.warmup_steps < self.steps,
            "training.warmup_steps",
            f"at least 0 and below training.steps ({self.steps})",
        )
        for name in ("learning_rate", "clip_norm"):
            require(getattr(self, name) > 0, f"training.{name}", "above 0")
        require(0 < self.beta_2 < 1, "training.beta_2", "between 0 and 1")
        for name in ("weight_decay", "patience", "redraw_features_every"):
            require(getattr(self, name) >= 0, f"training.{name}", "at least 0")
        require(
            self.precision in PRECISIONS, "training.precision", f"one of {', '.join(PRECISIONS)}"
        )
