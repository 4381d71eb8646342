"""keras-hub's BERT, RoBERTa, DistilBERT, GPT-2 and ESM-2 models with attention at a linear cost.

`performerize` makes them of trained models. Each is a subclass of keras-hub's class, whose config
holds the options of its attention, so that presets and `.keras` files can be loaded wherever this
module has been imported; importing `keras_performer.convert` does it. `from_preset` of the
backbones and tasks takes short names, and checks a preset's files, as our own models do.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import keras
import keras_hub

from keras_performer.convert._transformer_block import as_config, with_seed
from keras_performer.convert.exact_bert_backbone import ExactBertBackbone
from keras_performer.convert.exact_bert_masked_lm import ExactBertMaskedLM
from keras_performer.convert.performer_transformer_decoder import PerformerTransformerDecoder
from keras_performer.convert.performer_transformer_encoder import PerformerTransformerEncoder
from keras_performer.models._generation import compile_config, generate_step
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_backbone import (
    check_length,
    positions_after,
    set_own_policies,
)
from keras_performer.models._performer_task import compile_as_saved, keep_quantized_head


def _esm_encoder(
    heads: int,
    head_size: int,
    intermediate_size: int,
    use_bias: bool,
    max_wavelength: float,
    activation: Any,
    layer_norm_eps: float,
    use_rotary: bool,
    attention: dict[str, Any],
    **kwargs: Any,
) -> PerformerTransformerEncoder:
    """Make an encoder layer of the arguments of keras-hub's `ESMEncoder`."""
    del head_size  # the width over the number of heads
    rotary = {"rotary_max_wavelength": max_wavelength} if use_rotary else {}
    return PerformerTransformerEncoder(
        intermediate_size,
        heads,
        activation=activation,
        layer_norm_epsilon=layer_norm_eps,
        normalize_first=True,
        use_bias=use_bias,
        attention={**attention, **rotary},
        **kwargs,
    )


# What keras-hub's backbones make their layers with, and what stands for it here.
LAYERS: dict[str, Callable[..., Any]] = {
    "TransformerEncoder": PerformerTransformerEncoder,
    "TransformerDecoder": PerformerTransformerDecoder,
    "ESMEncoder": _esm_encoder,
}


class _LinearAttention:
    """Before a backbone of keras-hub among the bases: our layers in place of its own.

    The constructor of the backbone names the class of its layers in its body, and has no argument
    for it. So it runs as a function of the same code that sees other classes under these names;
    nothing that anyone else uses is changed.
    """

    def __init__(self, *, attention: dict[str, Any] | None = None, **kwargs: Any):
        options = as_config(attention or {})
        count = 0

        def make(layer: Callable[..., Any], **arguments: Any) -> Any:
            nonlocal count
            count += 1
            return layer(attention=with_seed(options, count - 1), **arguments)

        theirs: Any = super()
        init = theirs.__init__.__func__
        layers = {name: functools.partial(make, layer) for name, layer in LAYERS.items()}
        types.FunctionType(
            init.__code__,
            {**init.__globals__, **layers},
            init.__name__,
            init.__defaults__,
            init.__closure__,
        )(self, **kwargs)
        set_own_policies(self)
        self.attention = options
        if count == 0:
            name = init.__qualname__.removesuffix(".__init__")
            raise RuntimeError(
                f"This version of keras-hub builds {name} of other layers than "
                f"{sorted(LAYERS)}. Received: keras_hub {keras_hub.__version__}"
            )

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        theirs: Any = super()
        return {**theirs.get_config(), "attention": self.attention}


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerBertBackbone(_LinearAttention, keras_hub.models.BertBackbone):
    """A BERT encoder whose attention has a cost linear in length.

    **Args** Those of `keras_hub.models.BertBackbone`, by name, and

        attention: Arguments of `PerformerAttention`, as in `PerformerTransformerEncoder`. With a
            `seed` each layer has one of its own, counted from it.

    **Example**

    >>> backbone = PerformerBertBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16,
    ...     attention={"num_features": 16, "exact_window": 4},
    ... )
    >>> isinstance(backbone, keras_hub.models.BertBackbone)
    True
    """


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerRobertaBackbone(_LinearAttention, keras_hub.models.RobertaBackbone):
    """A RoBERTa encoder whose attention has a cost linear in length.

    **Args** Those of `keras_hub.models.RobertaBackbone`, by name, and `attention` as in
    `PerformerBertBackbone`.

    **Example**

    >>> backbone = PerformerRobertaBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> isinstance(backbone, keras_hub.models.RobertaBackbone)
    True
    """


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerRobertaMaskedLM(keras_hub.models.RobertaMaskedLM):
    """RoBERTa's masked language model with attention at a linear cost.

    **Args** Those of `keras_hub.models.RobertaMaskedLM`; `backbone` is a
    `PerformerRobertaBackbone`.

    **Example**

    >>> backbone = PerformerRobertaBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> isinstance(PerformerRobertaMaskedLM(backbone), keras_hub.models.MaskedLM)
    True
    """

    backbone_cls = PerformerRobertaBackbone


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerDistilBertBackbone(_LinearAttention, keras_hub.models.DistilBertBackbone):
    """A DistilBERT encoder whose attention has a cost linear in length.

    **Args** Those of `keras_hub.models.DistilBertBackbone`, by name, and `attention` as in
    `PerformerBertBackbone`.

    **Example**

    >>> backbone = PerformerDistilBertBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> isinstance(backbone, keras_hub.models.DistilBertBackbone)
    True
    """


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerExactBertBackbone(_LinearAttention, ExactBertBackbone):
    """An `ExactBertBackbone` whose attention has a cost linear in length.

    **Args** Those of `keras_hub.models.DistilBertBackbone`, by name, and `attention` as in
    `PerformerBertBackbone`.

    **Example**

    >>> backbone = PerformerExactBertBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> isinstance(backbone, ExactBertBackbone)
    True
    """


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerExactBertMaskedLM(ExactBertMaskedLM):
    """`ExactBertMaskedLM` for a converted backbone.

    **Args** Those of `ExactBertMaskedLM`; `backbone` is a `PerformerExactBertBackbone`.

    **Example**

    >>> backbone = PerformerExactBertBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> PerformerExactBertMaskedLM(backbone).masked_lm_head.layer_norm_epsilon
    1e-12
    """

    backbone_cls = PerformerExactBertBackbone


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerESMBackbone(_LinearAttention, keras_hub.models.ESMBackbone):
    """An ESM-2 encoder whose attention has a cost linear in length.

    Padding takes no part as a key on any backend; keras-hub 0.32 masks the rows of queries instead
    under TensorFlow and JAX, so that padded inputs differ there. In training, dropout acts where
    `keras_hub.layers.TransformerEncoder` has it, and on the keys; published ESM-2 models have none.

    **Args** Those of `keras_hub.models.ESMBackbone`, by name, and `attention` as in
    `PerformerBertBackbone`.

    **Example**

    >>> backbone = PerformerESMBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> isinstance(backbone, keras_hub.models.ESMBackbone)
    True
    """


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerGPT2Backbone(_LinearAttention, keras_hub.models.GPT2Backbone):
    """A GPT-2 decoder whose attention has a cost linear in length, and a state of fixed size.

    **Args** Those of `keras_hub.models.GPT2Backbone`, by name, and `attention` as in
    `PerformerBertBackbone`.

    **Example**

    >>> backbone = PerformerGPT2Backbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> ids = keras.ops.ones((2, 5), "int32")
    >>> chunk = {"token_ids": ids, "padding_mask": ids}
    >>> hidden, state = backbone.call_with_state(chunk, backbone.initial_state(batch_size=2))
    >>> [int(n) for n in state[0]["position"]]
    [5, 5]
    """

    def initial_state(self, batch_size: Any, max_length: int | None = None) -> list[dict[str, Any]]:
        """The state before the first token, one dictionary for each layer.

        **Args**
            batch_size: B.
            max_length: Number of tokens that exact attention (`feature_map=None`) must be able to
                look back on.
        """
        return [layer.initial_state(batch_size, max_length) for layer in self.transformer_layers]

    def call_with_state(
        self, inputs: dict[str, Any], state: list[dict[str, Any]]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Decode the next tokens of a stream, in inference mode.

        **Args**
            inputs: A dict of `token_ids` and `padding_mask` (B, T), of any length T.
            state: From `initial_state` or an earlier call.

        **Returns** The hidden states (B, T, D) and the state after these tokens. Chunks in a row
        give what one call on all of them gives.

        **Raises** ValueError for a chunk that is longer than the learned positions reach. A stream
        that goes beyond them chunk by chunk is not noticed: its tokens all get the last position.
        """
        check_length(inputs["token_ids"], self.max_sequence_length)
        tokens = self.token_embedding(inputs["token_ids"])
        positions = positions_after(state[0]["position"], tokens, self.max_sequence_length)
        x = self.embeddings_add((tokens, self.position_embedding(tokens, positions=positions)))
        after = []
        for layer, before in zip(self.transformer_layers, state, strict=True):
            x, new = layer(
                x,
                decoder_padding_mask=inputs["padding_mask"],
                initial_state=before,
                return_state=True,
                training=False,
            )
            after.append(new)
        return self.layer_norm(x), after


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerGPT2CausalLM(keras_hub.models.GPT2CausalLM):
    """GPT-2 with attention at a linear cost, which generates with a state of fixed size.

    **Args** Those of `keras_hub.models.GPT2CausalLM`; `backbone` is a `PerformerGPT2Backbone`.

    **Raises** ValueError if generation would go beyond the learned positions.

    **Example**

    >>> backbone = PerformerGPT2Backbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> model = PerformerGPT2CausalLM(backbone)
    >>> model.compile(sampler="greedy", run_eagerly=True)
    >>> prompt = np.array([[3, 4, 0, 0]])
    >>> prompt = {"token_ids": prompt, "padding_mask": prompt > 0}
    >>> output = model.generate(prompt, stop_token_ids=None)
    >>> output["token_ids"][0, :2].tolist()
    [3, 4]
    """

    backbone_cls = PerformerGPT2Backbone

    def get_compile_config(self) -> dict[str, Any]:
        """Return how the model was compiled, with its sampler."""
        return compile_config(super().get_compile_config(), self.sampler)

    compile_from_config = compile_as_saved
    generate_step = generate_step

    def call_with_cache(self, token_ids: Any, cache: Any, cache_update_index: Any) -> Any:
        """Refuse: there are no keys and values to cache."""
        del token_ids, cache, cache_update_index
        raise ValueError(
            "This model carries a state of fixed size in place of a cache of keys and values: use "
            "`backbone.initial_state` and `backbone.call_with_state`."
        )


BACKBONES: dict[type, type] = {
    keras_hub.models.BertBackbone: PerformerBertBackbone,
    keras_hub.models.RobertaBackbone: PerformerRobertaBackbone,
    keras_hub.models.DistilBertBackbone: PerformerDistilBertBackbone,
    ExactBertBackbone: PerformerExactBertBackbone,
    keras_hub.models.GPT2Backbone: PerformerGPT2Backbone,
    keras_hub.models.ESMBackbone: PerformerESMBackbone,
}
"""Ours for keras-hub's, and for BERT's encoder."""


def _of_hub(backbone_cls: type) -> list[type]:
    """The tasks, preprocessors and tokenizers that keras-hub has for a backbone."""
    classes = vars(keras_hub.models).values()
    found = [cls for cls in classes if getattr(cls, "backbone_cls", None) is backbone_cls]
    return list(dict.fromkeys(found))  # some have an older name, too


def _for_backbone(cls: type, backbone_cls: type, name: str) -> type:
    """A class that differs in `backbone_cls` alone.

    By that keras-hub finds the tasks, preprocessors and tokenizers that go with the backbone of a
    preset; of each kind there must be one.
    """
    contents = {
        "__doc__": f"`keras_hub.models.{cls.__name__}` for a `{backbone_cls.__name__}`.",
        "__module__": __name__,
        "backbone_cls": backbone_cls,
    }
    made = type(name, (cls,), contents)
    globals()[name] = made  # pickling looks there
    return keras.saving.register_keras_serializable("keras_performer")(made)


# What keras-hub has for DistilBERT, for the encoder of BERT, which has the same inputs.
_EXACT_BERT = [
    ExactBertMaskedLM,
    *(
        _for_backbone(cls, ExactBertBackbone, cls.__name__.replace("DistilBert", "ExactBert"))
        for cls in _of_hub(keras_hub.models.DistilBertBackbone)
        if cls is not keras_hub.models.DistilBertMaskedLM
    ),
]
_WRITTEN: dict[type, type] = {
    keras_hub.models.GPT2CausalLM: PerformerGPT2CausalLM,
    ExactBertMaskedLM: PerformerExactBertMaskedLM,
    keras_hub.models.RobertaMaskedLM: PerformerRobertaMaskedLM,
}
CLASSES: dict[type, type] = {
    cls: _WRITTEN.get(cls) or _for_backbone(cls, ours, f"Performer{cls.__name__}")
    for theirs, ours in BACKBONES.items()
    for cls in (_EXACT_BERT if theirs is ExactBertBackbone else _of_hub(theirs))
}
"""Tasks, preprocessors and tokenizers for our backbones, for keras-hub's."""
TASKS = {cls: made for cls, made in CLASSES.items() if issubclass(cls, keras_hub.models.Task)}
for _class in TASKS.values():
    keep_quantized_head(_class)
for _class in (*BACKBONES.values(), *TASKS.values()):
    load_by_name(_class)
