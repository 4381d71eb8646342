"""Trained softmax models into Performers."""

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras

from keras_performer.convert._rebuild import (
    check_ties,
    clone_graph,
    copy_layer,
    is_graph,
    rebuild_backbone,
    rebuild_task,
)
from keras_performer.convert._transformer_block import as_config, with_seed
from keras_performer.convert.hub_models import BACKBONES, LAYERS, TASKS
from keras_performer.convert.performer_transformer_decoder import PerformerTransformerDecoder
from keras_performer.convert.performer_transformer_encoder import PerformerTransformerEncoder
from keras_performer.layers import PerformerAttention

_ATTENTIONS = (keras.layers.MultiHeadAttention, keras.layers.GroupQueryAttention)
# Arguments of calls that our layers do not have: with what words they are refused.
_REFUSED = {
    "self_attention_cache": "it is called with a cache, in place of which ours take a state",
    "return_attention_scores": "it returns attention scores, which ours do not",
}


def performerize(
    model: keras.Model,
    *,
    feature_map: Any = "favor_plus",
    num_features: int | None = None,
    exact_window: int | None = None,
    num_sink_tokens: int = 0,
    sliding_window: int | None = None,
    seed: int | None = None,
) -> Any:
    """Make a model of the same kind with linear attention and the weights of `model`.

    What it takes: functional and sequential Keras models, nested ones too, with
    `keras.layers.MultiHeadAttention` and `GroupQueryAttention` layers and keras-hub's
    `TransformerEncoder` and `TransformerDecoder`; and keras-hub's BERT, RoBERTa, DistilBERT, GPT-2
    and ESM-2 backbones and tasks. A task stays one, of a subclass, with the same preprocessor
    object; GPT-2 generates with a state of fixed size. A layer with a `sliding_window` of its own
    keeps that, exact as it is and linear as it can be. The result shares no weight with `model`; it
    is saved and loaded like `model`, in a process that has imported `keras_performer.convert`.

    With an `exact_window` of at least the length of the inputs the outputs are those of `model`, to
    rounding. Without one, or beyond it, weights trained under softmax have norms for which random
    features are noisy: see `calibrate`, and fine-tune.

    **Args**
        model: A built model. It is not changed.
        feature_map: As in `PerformerAttention`. To `calibrate` it, it must have something to train,
            as `FavorPlus(256, trainable_projection=True)` has. None makes a twin with the same
            layers whose attention is exact, at quadratic cost.
        num_features: As in `PerformerAttention`.
        exact_window: W, to weigh near keys exactly. It is for self-attention: keras-hub's
            decoder layers have it there alone, a layer of cross-attention is refused with it.
        num_sink_tokens: Number of leading tokens that are weighed exactly; needs an `exact_window`.
        sliding_window: Makes attention softmax within a band and nothing beyond: the baseline that
            a conversion has to beat.
        seed: Seeds the first layer's projection, the next number the second's, and so on.

    **Returns** The new model. `conversion_report` tells what is in it. A functional model that was
    compiled is compiled in the same way, a task in its default way.

    **Masking** Masks of keys are honoured as before, from Keras, `padding_mask` or
    `attention_mask` of shape (B, 1, S). Outputs at masked queries, which mean nothing, may differ.

    **Cost** Memory for a second set of weights.

    **Raises** TypeError for something that is no Keras model; ValueError for a model with attention
    that cannot be replaced, or with none. It names every such layer, and says why.

    **Example**

    >>> x = keras.Input((None, 8))
    >>> attention = keras.layers.MultiHeadAttention(2, 4, name="attention")
    >>> model = keras.Model(x, attention(x, x, use_causal_mask=True))
    >>> performer = performerize(model, num_features=32, exact_window=16)
    >>> performer.get_layer("attention").num_features
    32

    **Source** Choromanski et al. 2021, arXiv 2009.14794, section 4.2, for the transfer of weights.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"performerize takes a Keras model. Received: {model!r}")
    options = {
        "feature_map": feature_map,
        "num_features": num_features,
        "exact_window": exact_window,
        "num_sink_tokens": num_sink_tokens,
        "sliding_window": sliding_window,
        "seed": seed,
    }
    # Refuses impossible options before anything else does.
    PerformerAttention(1, 2, **options)
    conversion = _Conversion(as_config(options))
    converted = conversion.convert(model, model.name)
    conversion.check(model)
    check_ties(model, converted)
    return converted


class AttentionRow(NamedTuple):
    """One layer of a `ConversionReport`."""

    name: str
    """The layer's path in the model."""
    num_heads: int
    num_key_value_heads: int
    key_dim: int
    causal: bool | None
    """None where the model does not say: the caller decides."""
    feature_map: str
    """The class of the feature map, or "softmax"."""
    num_features: int | None
    window: int | None
    """Exact window, or the band of a sliding window."""
    num_sink_tokens: int


class ConversionReport(tuple[AttentionRow, ...]):
    """A tuple of rows whose text is a table."""

    def __str__(self) -> str:
        header = AttentionRow._fields
        lines = [header, *([str(x) for x in row] for row in self)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
        return "\n".join(
            "  ".join(x.ljust(width) for x, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def conversion_report(model: keras.Model) -> ConversionReport:
    """List every `PerformerAttention` of a model: heads, head size, features and windows.

    **Args**
        model: A model from `performerize`, as it was made or loaded from a file.

    **Returns** A tuple of `AttentionRow`; `print` shows it as a table.

    **Example**

    >>> x = keras.Input((None, 8))
    >>> model = keras.Model(x, keras.layers.MultiHeadAttention(2, 4, name="a")(x, x))
    >>> print(conversion_report(performerize(model, num_features=32)))
    name  num_heads  num_key_value_heads  key_dim  causal  feature_map  num_features  window ...
    a     2          2                    4        False   FavorPlus    32            None   0
    """
    return ConversionReport(_row(*found) for found in _attentions(model, ""))


def _row(name: str, layer: PerformerAttention, causal: bool | None) -> AttentionRow:
    feature_map = layer.feature_map
    return AttentionRow(
        name,
        layer.num_heads,
        layer.num_key_value_heads,
        layer.key_dim,
        causal,
        "softmax" if feature_map is None else type(feature_map).__name__,
        None if feature_map is None else feature_map.feature_dim,
        layer.exact_window or layer.sliding_window,
        layer.num_sink_tokens,
    )


def _attentions(
    layer: Any, name: str, causal: bool | None = None
) -> Iterator[tuple[str, PerformerAttention, bool | None]]:
    """The attention layers in a layer, with their names and whether they are causal."""
    if isinstance(layer, PerformerAttention):
        yield name, layer, causal
        return
    calls = _causal_calls(layer) if _holds_graph(layer) else {}
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        if isinstance(layer, PerformerTransformerDecoder):
            # What GPT-2 and `performerize`'s graphs do unless a call says otherwise.
            inner_causal = inner is layer.self_attention and causal is not False
        elif isinstance(layer, PerformerTransformerEncoder):
            inner_causal = False
        else:
            inner_causal = calls.get(inner.name)
        yield from _attentions(inner, f"{name}/{inner.name}".strip("/"), inner_causal)


def _causal_calls(model: Any) -> dict[str, bool]:
    """Whether each layer that a functional model calls directly is called causally."""
    causal = {}
    for layer in model.layers:
        if isinstance(layer, (PerformerAttention, PerformerTransformerDecoder)):
            signature = inspect.signature(layer.call)
            for node in layer._inbound_nodes:
                bound = signature.bind(*node.arguments.args, **node.arguments.kwargs)
                bound.apply_defaults()
                causal[layer.name] = bool(bound.arguments["use_causal_mask"])
    return causal


def _holds_graph(model: Any) -> bool:
    """Whether a layer is a graph of layers: functional, sequential, or a class derived of them."""
    return any(cls.__name__ in ("Functional", "Sequential") for cls in type(model).__mro__)


class _Conversion:
    """One run of `performerize`: what was replaced, and what could not be."""

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.num_replaced = 0
        self.problems: dict[str, str] = {}
        self.made: dict[int, Any] = {}

    def convert(self, layer: Any, path: str) -> Any:
        """Make the new layer or model; what cannot be replaced is noted, and copied as it is."""
        # One for each old one, in whatever graphs it is.
        if id(layer) not in self.made:
            self.made[id(layer)] = self._convert(layer, path)
        return self.made[id(layer)]

    def _convert(self, layer: Any, path: str) -> Any:
        kind = type(layer)
        if kind in TASKS:
            return self._convert_task(layer, path)
        if kind in BACKBONES:
            return self._convert_backbone(layer)
        if is_graph(layer):
            return self._convert_graph(layer, path)
        if kind in _ATTENTIONS:
            return self._convert_attention(layer, path)
        if _is_hub_layer(layer):
            config = layer.get_config()
            for shape in ("decoder_sequence_shape", "encoder_sequence_shape"):
                config.pop(shape, None)  # ours are built by the call
            return LAYERS[kind.__name__](attention=self._next_options(), **config)
        return self._keep(layer, path)

    def check(self, model: keras.Model) -> None:
        """Raise a ValueError if something was not replaced, or there was nothing to replace."""
        if self.problems:
            lines = "".join(f"\n- {name}: {why}" for name, why in self.problems.items())
            raise ValueError(
                "Some attention of this model cannot be replaced, so nothing was. Received: "
                f"model {model.name!r} with{lines}"
            )
        if not self.num_replaced:
            raise ValueError(
                "This model has no attention that performerize knows. Received: model "
                f"{model.name!r} of class {type(model).__name__}"
            )

    def _next_options(self) -> dict[str, Any]:
        self.num_replaced += 1
        return with_seed(self.options, self.num_replaced - 1)

    def _keep(self, layer: Any, path: str) -> Any:
        """A copy of a layer or an operation without attention."""
        inner = layer._flatten_layers() if isinstance(layer, keras.Layer) else [layer]
        names = [
            f"{x.name!r} ({type(x).__name__})"
            for x in inner
            if "attention" in type(x).__name__.lower() or isinstance(x, _ATTENTIONS)
            if not isinstance(x, PerformerAttention)
        ]
        if names:
            self.problems[path] = (
                f"class {type(layer).__module__}.{type(layer).__name__} is code of its own, and "
                f"what performerize replaces are other classes; its attention is in "
                f"{', '.join(names)}"
            )
        if isinstance(layer, keras.Model) and names:
            return layer
        return type(layer).from_config(layer.get_config())

    def _convert_task(self, task: Any, path: str) -> Any:
        backbone = self.convert(task.backbone, f"{path}/{task.backbone.name}")
        if self.problems:
            return task
        return rebuild_task(task, TASKS[type(task)], backbone)

    def _convert_backbone(self, backbone: Any) -> Any:
        options = with_seed(self.options, self.num_replaced)
        self.num_replaced += backbone.num_layers

        def fill(old: Any, new: Any) -> None:
            self.made[id(old)] = new  # which a graph around the backbone may call too
            copy_layer(old, new)

        return rebuild_backbone(backbone, BACKBONES[type(backbone)], fill, attention=options)

    def _convert_graph(self, model: Any, path: str) -> Any:
        def make(layer: Any) -> Any:
            return self.convert(layer, f"{path}/{layer.name}")

        def call(old: Any, new: Any, args: Any, kwargs: Any) -> Any:
            why = self._why_not_call(old, args, kwargs)
            if why is None:
                return new(*args, **kwargs)
            self.problems[f"{path}/{old.name}"] = why
            # Go on, to name what else there is; the result is thrown away.
            return type(old).from_config(old.get_config())(*args, **kwargs)

        def fill(old: Any, new: Any) -> None:
            if not self.problems:
                copy_layer(old, new)

        return clone_graph(model, make, fill, call)

    def _convert_attention(self, layer: Any, path: str) -> Any:
        config = {**layer.get_config(), "dtype": layer.dtype_policy}
        options = self._next_options()
        if "num_query_heads" in config:
            config["num_heads"] = config.pop("num_query_heads")
            config["key_dim"] = config.pop("head_dim")
        config["flash_attention"] = None
        if config["sliding_window"] is not None:
            # Exact and linear already: there is nothing for features to stand for.
            return PerformerAttention(**config)
        try:
            return PerformerAttention(**{**config, **options})
        except ValueError as error:
            self.problems[path] = str(error)
            return type(layer).from_config(layer.get_config())

    def _why_not_call(self, layer: Any, args: Any, kwargs: Any) -> str | None:
        """Why a call of this layer in a graph cannot be honoured by the one that replaces it."""
        if type(layer) in _ATTENTIONS:
            return self._why_not_attend(layer, args, kwargs)
        if not _is_hub_layer(layer) or type(layer).__name__ == "ESMEncoder":
            return None
        arguments = inspect.signature(layer.call).bind(*args, **kwargs).arguments
        for name, why in _REFUSED.items():
            if arguments.get(name) is not None and arguments[name] is not False:
                return why
        masks = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
        whys = (_why_not_mask(arguments.get(name), 1) for name in masks)
        return next((why for why in whys if why), None)

    def _why_not_attend(self, layer: Any, args: Any, kwargs: Any) -> str | None:
        arguments = inspect.signature(layer.call).bind(*args, **kwargs).arguments
        query, value = arguments["query"], arguments["value"]
        config = layer.get_config()
        if len(query.shape) > 3 and arguments.get("attention_mask") is not None:
            return "its attention_mask is for inputs of more than three axes"
        key = arguments.get("key")
        crosses = query is not value or not (key is None or key is value)
        if crosses and self.options["exact_window"]:
            return (
                "exact_window needs queries, keys and values of the same tokens, and these are "
                "different tensors (cross-attention): use exact_window=None"
            )
        if crosses and self.options["sliding_window"]:
            return "a sliding_window needs queries, keys and values of the same tokens"
        num_heads = config.get("num_key_value_heads") or config["num_heads"]
        return _why_not_mask(arguments.get("attention_mask"), num_heads)


def _is_hub_layer(layer: Any) -> bool:
    """Whether a layer is one of keras-hub's Transformer layers, and not a subclass."""
    return type(layer).__module__.startswith("keras_hub.") and type(layer).__name__ in LAYERS


def _why_not_mask(mask: Any, num_heads: int) -> str | None:
    """Why a mask, as softmax layers read it, is none of keys alone."""
    shape = None if mask is None else tuple(mask.shape)
    if shape is None or (
        len(shape) in (3, 4) and shape[-2] == 1 and (len(shape) == 3 or shape[1] in (1, num_heads))
    ):
        return None
    return (
        f"its attention_mask of shape {shape} may differ from query to query, and linear attention "
        "sums over keys once for all queries: pass a mask of keys, (batch, 1, length), or "
        "use_causal_mask=True"
    )
