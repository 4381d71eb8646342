"""Longer learned position embeddings."""

from typing import Any

import keras
import keras_hub
import numpy as np

from keras_performer.convert._rebuild import (
    check_ties,
    clone_graph,
    copy_layer,
    freeze_as,
    is_backbone,
    is_graph,
    is_task,
    rebuild_backbone,
    rebuild_task,
)

_LAYERS = (keras_hub.layers.PositionEmbedding, keras_hub.layers.TokenAndPositionEmbedding)


def extend_positions(model: keras.Model, length: int, method: str = "tile") -> Any:
    """Make a model that reads longer inputs, by extending its learned position embeddings.

    Takes what `performerize` takes, before or after it: keras-hub's BERT, RoBERTa, DistilBERT and
    GPT-2 (and ESM with absolute positions), and functional or sequential models with keras-hub's
    `PositionEmbedding` or `TokenAndPositionEmbedding`.

    "tile" repeats the table: what the model does with inputs of the old length does not change, and
    near tokens keep their distances, but for those across a seam. "interpolate" stretches it, so
    that every place is new, and near tokens get nearly equal positions. Either way fine-tune on
    long inputs.

    **Args**
        model: A built model. It is not changed.
        length: The new number of positions, above the old one.
        method: "tile" or "interpolate" (linearly).

    **Returns** A new model of the same class, which shares no weight with `model`. The preprocessor
    of a task is the same object: set its `sequence_length` for longer strings.

    **Raises** ValueError if `length` is not above the old one, for an unknown method, and for
    models without learned positions, such as those with rotary ones, which have no longest input.

    **Example**

    >>> x = keras.Input((None, 8))
    >>> model = keras.Model(x, keras_hub.layers.PositionEmbedding(4)(x))
    >>> longer = extend_positions(model, 8)
    >>> tuple(longer(np.ones((1, 8, 8), "float32")).shape)
    (1, 8, 8)

    **Source** Beltagy et al. 2020, arXiv 2004.05150, section 5, for tiling.
    """
    if method not in ("tile", "interpolate"):
        raise ValueError(f"method must be 'tile' or 'interpolate'. Received: method={method!r}")
    made: dict[int, Any] = {}
    old_lengths: set[int] = set()

    def fill(old: Any, new: Any, first: int = 0) -> None:
        if not isinstance(old, _LAYERS):
            copy_layer(old, new)
            return
        if old.sequence_length >= length:
            raise ValueError(
                "length must be above the number of positions that the model has. Received: "
                f"length={length}, and {old.sequence_length} positions in layer {old.name!r}"
            )
        freeze_as(old, new)
        old_lengths.add(old.sequence_length)
        new.set_weights(
            [
                # The tables of tokens have other shapes; that of positions is the one that differs.
                value if value.shape == place.shape else _extend(value, length, method, first)
                for value, place in zip(old.get_weights(), new.weights, strict=True)
            ]
        )

    def make(layer: Any) -> Any:
        # One for each old one, in whatever graphs it is.
        if id(layer) not in made:
            made[id(layer)] = make_new(layer)
        return made[id(layer)]

    def make_new(layer: Any) -> Any:
        if is_task(layer):
            return rebuild_task(layer, type(layer), make(layer.backbone))
        if is_backbone(layer):
            first = 0
            if isinstance(layer, keras_hub.models.ESMBackbone):
                # Its places are counted from the padding token's number.
                first = layer.pad_token_id

            def fill_inner(old: Any, new: Any) -> None:
                made[id(old)] = new  # which a graph around the backbone may call too
                fill(old, new, first)

            return rebuild_backbone(layer, type(layer), fill_inner, max_sequence_length=length)
        if is_graph(layer):
            return clone_graph(layer, make, fill)
        config = layer.get_config()
        if isinstance(layer, _LAYERS):
            config["sequence_length"] = length
        return type(layer).from_config(config)

    longer = make(model)
    if not old_lengths:
        raise ValueError(
            "This model has no learned positions that extend_positions knows; with rotary "
            f"positions it needs none. Received: model {model.name!r} of class "
            f"{type(model).__name__}"
        )
    check_ties(model, longer)
    for x in longer.inputs:
        if len(x.shape) == 2 and x.shape[1] in old_lengths:
            raise ValueError(
                f"The inputs of this model are fixed to the old length: make it of inputs of any, "
                f"`keras.Input((None,))`. Received: input {x.name!r} of shape {tuple(x.shape)}"
            )
    return longer


def _extend(table: np.ndarray, length: int, method: str, first: int) -> np.ndarray:
    """Extend a table of positions; rows before `first` belong to none."""
    table, unused = table[first:], table[:first]
    places = np.arange(length - first)
    if method == "tile":
        return np.concatenate([unused, table[places % len(table)]])
    places = places * ((len(table) - 1) / (len(places) - 1))
    below = np.minimum(places.astype(int), len(table) - 2)
    share = (places - below)[:, None]
    longer = table[below] * (1 - share) + table[below + 1] * share
    return np.concatenate([unused, longer.astype(table.dtype)])
