"""Settings with which a recipe of `training` runs in seconds, and how its command line is told."""

from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "training" / "configs"
# Each test file writes beside these what its recipe has for itself.
TINY = {
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.hidden_dim": 16,
    "model.intermediate_dim": 16,
    "model.num_features": 8,
    "model.exact_window": 0,
    "model.dropout": 0.0,
    "training.batch_size": 16,
    "training.learning_rate": 1e-2,
    "training.patience": 0,
}


def overrides(settings):
    """Settings as `load_config` takes them."""
    return [f"{key}={value}" for key, value in settings.items()]


def flags(settings):
    """The same as arguments of a recipe."""
    return [f"--set={override}" for override in overrides(settings)]
