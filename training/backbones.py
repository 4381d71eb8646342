"""The backbone that a task is put on: a new one, or one that was pretrained."""

import argparse
import hashlib
import os
from typing import Any

from keras_performer.presets import local_folder, presets, sha256
from training.sections import ModelConfig

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.


def add_preset_flag(
    parser: argparse.ArgumentParser,
    what: str = "the encoder of this preset, such as a masked language model",
) -> None:
    """Add `--preset`, which `build_backbone` takes, and say `what` of it is trained on."""
    parser.add_argument(
        "--preset", metavar="NAME_OR_FOLDER",
        help=f"train on {what}; its shape and attention replace those of [model], of which only "
        "dropout is read then",
    )  # fmt: skip


def preset_facts(preset: str | os.PathLike[str] | None) -> dict[str, str | None]:
    """Return the name of a preset, as `preset`, and what tells its weights from others.

    **Returns** `preset_sha256` is the sha256 of the files of its weights, or the name itself of one
    that a hub keeps. Both are None without a preset.
    """
    if preset is None:
        return {"preset": None, "preset_sha256": None}
    name = os.fspath(preset)
    found = name
    if os.path.isdir(name) or name in presets():
        weights = sorted(local_folder(name).glob("*.h5"))
        found = hashlib.sha256("".join(map(sha256, weights)).encode()).hexdigest()
    return {"preset": name, "preset_sha256": found}


def build_backbone(
    backbone_class: Any,
    section: ModelConfig,
    vocabulary_size: int,
    tokenizer: Any,
    sequence_length: int,
    preset: str | None,
    seed: int,
    precision: str,
) -> Any:
    """Return an untrained backbone, or the one in a preset of any task, such as a masked LM.

    A preset decides its own shape and attention: of the section only `dropout` is read then.

    **Args**
        backbone_class: The class of keras_performer.models.
        section: Section `[model]` of the config.
        vocabulary_size: Number of token ids.
        tokenizer: What makes token ids; None if the data come as ids, or it is the preset's own.
        sequence_length: `data.sequence_length`, the length of the longest inputs.
        preset: Name or folder of a preset.
        seed: Of the initial weights and of dropout.
        precision: Dtype policy.

    **Raises** ValueError if the preset is damaged or unknown, has other tokens, another attention
    than the section names, or learned positions for shorter inputs only.
    """
    if preset is None:
        return backbone_class(
            vocabulary_size=vocabulary_size, **section.arguments(), seed=seed, dtype=precision
        )
    backbone = backbone_class.from_preset(
        preset, dropout=section.dropout, seed=seed, dtype=precision
    )
    if tokenizer is not None:
        type(tokenizer).from_preset(preset)  # Refuses another class or vocabulary.
    if backbone.vocabulary_size != vocabulary_size:
        raise ValueError(
            f"The preset has {backbone.vocabulary_size} token ids, and the data have "
            f"{vocabulary_size}. Choose a preset with the same tokens. Received: {preset}"
        )
    if backbone.attention != section.attention:
        raise ValueError(
            f"The preset's attention is {backbone.attention!r}, and 'model.attention' is "
            f"{section.attention!r}. Pass --set model.attention={backbone.attention}, or another "
            f"preset. Received: {preset}"
        )
    limit = backbone.max_sequence_length
    if limit is not None and sequence_length > limit:
        raise ValueError(
            f"The preset has learned positions for at most {limit} tokens, and "
            f"'data.sequence_length' is {sequence_length}. Pass --set data.sequence_length={limit} "
            f"or less, or another preset. Received: {preset}"
        )
    return backbone


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer of a task, or None if its data come as token ids."""
    return model.preprocessor and model.preprocessor.tokenizer


def backbone_phrase(backbone: Any, preset: str | None) -> str:
    """Return what a recipe says of its backbone."""
    phrase = (
        f"{backbone.num_layers} layers of width {backbone.hidden_dim}, {backbone.num_heads} heads "
        f"({backbone.attention})"
    )
    if preset is not None:
        # Not "[model]", which Rich would take for its markup.
        phrase += f", all from {preset}; of section model only dropout is read"
    return phrase
