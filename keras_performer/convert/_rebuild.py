"""New models of old ones: layers made anew, all weights consumed, all filled."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_performer.convert.hub_models import BACKBONES, TASKS

# Names of weights in keras-hub's ESM layers, and in ours.
_RENAMED = (
    (r"^attention_layer/q_dense_layer/", "self_attention_layer/query/"),
    (r"^attention_layer/k_dense_layer/", "self_attention_layer/key/"),
    (r"^attention_layer/v_dense_layer/", "self_attention_layer/value/"),
    (r"^attention_layer/o_dense_layer/", "self_attention_layer/attention_output/"),
    (r"^attention_norm/", "self_attention_layer_norm/"),
    (r"^ffn_norm/", "feedforward_layer_norm/"),
)


def is_graph(model: Any) -> bool:
    """Whether a model is functional or sequential, and of no class of its own."""
    return isinstance(model, keras.Model) and type(model).__name__ in ("Functional", "Sequential")


def is_backbone(model: Any) -> bool:
    """Whether a model is one of the keras-hub backbones that we know, converted or not."""
    return type(model) in (*BACKBONES, *BACKBONES.values())


def is_task(model: Any) -> bool:
    """Whether a model is a keras-hub task of such a backbone."""
    return type(model) in (*TASKS, *TASKS.values()) and is_backbone(model.backbone)


def clone_graph(
    model: Any,
    make: Callable[[Any], Any],
    fill: Callable[[Any, Any], None],
    call: Callable[..., Any] | None = None,
) -> Any:
    """Rebuild a functional or sequential model of other layers.

    **Args**
        model: What `is_graph` says it is.
        make: Returns the new layer for an old one; models within it with their weights.
        fill: Called with each old layer and the new one, once that is built, to copy the weights.
        call: If given, called with the old and the new layer and the arguments of each call in a
            functional graph, to return the outputs.
    """
    pairs: list[tuple[Any, Any]] = []

    def clone(old: Any) -> Any:
        pairs.append((old, make(old)))
        return pairs[-1][1]

    def call_new(new: Any, *args: Any, **kwargs: Any) -> Any:
        old = next(old for old, made in pairs if made is new)
        return new(*args, **kwargs) if call is None else call(old, new, args, kwargs)

    # The layers of a sequential model have one input, and no options in their calls.
    options = {} if isinstance(model, keras.Sequential) else {"call_function": call_new}
    compiled, model.compiled = model.compiled, False  # else Keras compiles the clone, or fails to
    try:
        cloned = keras.models.clone_model(model, clone_function=clone, **options)
    finally:
        model.compiled = compiled
    for old, new in pairs:
        if isinstance(old, keras.Layer) and not (is_graph(old) or is_backbone(old) or is_task(old)):
            fill(old, new)
    cloned.dtype_policy = model.dtype_policy
    if compiled:
        try:
            cloned.compile_from_config(model.get_compile_config())
        except (TypeError, ValueError) as error:
            warnings.warn(
                f"The rebuilt model {model.name!r} is not compiled, because what {model.name!r} is "
                f"compiled with is not registered with Keras: compile it. ({error})",
                stacklevel=2,
            )
    return freeze_as(model, cloned)


def check_ties(model: Any, rebuilt: Any) -> None:
    """Raise ValueError if layers that share weights no longer do in the rebuilt model."""
    before, after = (
        {id(w): w.path for w in m.weights if "feature_map/" not in w.path} for m in (model, rebuilt)
    )
    if len(after) != len(before):
        raise ValueError(
            "Layers of this model share weights in a way that a rebuilt model would not: make such "
            "a layer (a head with a token_embedding, for example) after the conversion. Received: "
            f"model {model.name!r} of {len(before)} weights, which would become {len(after)}"
        )


def rebuild_backbone(backbone: Any, made: Any, fill: Any, **changes: Any) -> Any:
    """A backbone of class `made` with a changed config."""
    rebuilt = made.from_config({**backbone.get_config(), **changes})
    for old, new in zip(backbone.layers, rebuilt.layers, strict=True):
        fill(old, new)
    return freeze_as(backbone, rebuilt)


def rebuild_task(task: Any, made: Any, backbone: Any) -> Any:
    """A task of class `made` around another backbone, with the preprocessor and head of `task`."""
    rebuilt = made.from_config(
        {**task.get_config(), "backbone": backbone, "preprocessor": task.preprocessor}
    )
    for old, new in zip(task.layers, rebuilt.layers, strict=True):
        if old is not task.backbone:
            copy_layer(old, new)
    return freeze_as(task, rebuilt)


def copy_layer(source: Any, target: Any) -> None:
    """Give `target`, a copy of a built layer or what stands for it, its weights and its freezing.

    Of a layer of another class the weights go by their names. Those of feature maps, which the
    source cannot have, keep their values.

    **Raises** ValueError if a weight of `source` has no place, or one of `target` no value.
    """
    if type(source) is type(target):
        if len(source.weights) != len(target.weights):
            raise ValueError(
                f"The weights of layer {source.name!r} do not fit its copy (convert before LoRA or "
                f"quantization). Received: {len(source.weights)} weights for "
                f"{len(target.weights)} places"
            )
        target.set_weights(source.get_weights())
        pairs = list(zip(source.weights, target.weights, strict=True))
    else:
        values = {_renamed(name): value for name, value in _by_name(source).items()}
        places = {n: w for n, w in _by_name(target).items() if "feature_map/" not in n}
        if values.keys() != places.keys():
            raise ValueError(
                f"The weights of layer {source.name!r} do not fit the layer that takes its place "
                "(convert before LoRA or quantization). Received: weights without a place "
                f"{sorted(values.keys() - places.keys())}, places without a weight "
                f"{sorted(places.keys() - values.keys())}"
            )
        pairs = [(values[name], place) for name, place in places.items()]
        for value, place in pairs:
            # A copy, since JAX gives away the arrays of a model that it trains. keras-hub's ESM
            # keeps heads and head size in one axis.
            copy = np.array(ops.convert_to_numpy(value))
            place.assign(copy.reshape(place.shape))
    trained = {id(weight) for weight in source.trainable_weights}
    for value, place in pairs:
        if id(value) not in trained:
            place.trainable = False  # a layer within this one is frozen
    freeze_as(source, target)


def freeze_as(source: Any, target: Any) -> Any:
    """Freeze `target` if `source` is frozen; return it."""
    if not source.trainable:
        target.trainable = False
    return target


def _by_name(layer: Any) -> dict[str, Any]:
    """The weights of a layer by their paths below it."""
    return {weight.path.removeprefix(f"{layer.path}/"): weight for weight in layer.weights}


def _renamed(name: str) -> str:
    for pattern, ours in _RENAMED:
        name = re.sub(pattern, ours, name)
    return name
