"""What the encoder and the decoder backbone share."""

from typing import Any, ClassVar

import keras
import keras_hub

from keras_performer.layers import ReversibleStack
from keras_performer.layers._arguments import (
    check_attention,
    check_known,
    check_near_field,
    dropout_rate,
    positive_int,
    seed_of,
    split_width,
)


def check_length(inputs: Any, limit: int | None) -> None:
    """Raise ValueError if inputs (B, T) are known to be longer than learned positions reach.

    The backends' own errors do not say what to do about it.
    """
    length = inputs.shape[1]
    if None not in (length, limit) and length > limit:
        raise ValueError(
            f"This model has learned positions for at most {limit} tokens. Received: inputs of "
            f"length {length}. Cut the inputs (`sequence_length` of the preprocessor), or build "
            "the model with a larger `max_sequence_length`."
        )


def positions_after(start: Any, inputs: Any, limit: Any) -> Any:
    """The positions (B, T) of inputs (B, T, ...) after `start` (B,) tokens, below a limit.

    How far a stream has come is not known here; generation checks its length.
    """
    index = keras.ops.arange(keras.ops.shape(inputs)[1], dtype="int32")
    return keras.ops.minimum(keras.ops.expand_dims(start, -1) + index, limit - 1)


def set_own_policies(model: Any) -> None:
    """Give each layer its own dtype policy, out of a map that the model was built with.

    Such a map comes from a quantized model. Keras cannot save a quantized layer that has the map.
    """
    for layer in model._flatten_layers(include_self=False):
        policy = layer.dtype_policy
        # Layers that were never called have no path, and no weights.
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap) and layer.path:
            layer._dtype_policy = policy[layer.path]


class PerformerBackbone(keras_hub.models.Backbone):
    """The abstract backbone: arguments and their checks, the embedding, and the making of blocks.

    A subclass defines `_make_blocks`, which creates the stacks of blocks and the last norms, and
    `_connect`, which returns the inputs and outputs of the functional model.

    **Args** Those that `PerformerEncoderBackbone` documents.
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        key_dim: int | None = None,
        num_key_value_heads: int | None = None,
        attention: str = "performer",
        sliding_window: int | None = None,
        num_features: int | None = None,
        feature_map: Any = "favor_plus",
        exact_window: int | None = None,
        num_sink_tokens: int = 0,
        far_bias: float | None = None,
        qk_norm: bool = True,
        position_embedding: str = "rotary",
        max_sequence_length: int | None = None,
        rotary_max_wavelength: float = 10000,
        gated: bool = False,
        activation: Any = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        tie_weights: bool = True,
        remat: bool = False,
        reversible: bool = False,
        seed: int | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ):
        check_known(self, kwargs, "name", "trainable")
        vocabulary_size = positive_int("vocabulary_size", vocabulary_size)
        num_layers = positive_int("num_layers", num_layers)
        num_heads = positive_int("num_heads", num_heads)
        hidden_dim = positive_int("hidden_dim", hidden_dim)
        if position_embedding not in ("rotary", "learned"):
            raise ValueError(
                "`position_embedding` must be 'rotary' or 'learned'. Received: "
                f"position_embedding={position_embedding!r}"
            )
        check_attention(attention, sliding_window)
        rotary = position_embedding == "rotary"
        if rotary and max_sequence_length is not None:
            raise ValueError(
                "Rotary positions have no longest length: leave out `max_sequence_length`, or pass "
                f"position_embedding='learned'. Received: max_sequence_length={max_sequence_length}"
            )
        if not rotary:
            max_sequence_length = positive_int("max_sequence_length", max_sequence_length)
        if rotary and rotary_max_wavelength is None:
            raise ValueError(
                "Rotary positions need a longest wavelength. Received: rotary_max_wavelength=None, "
                "position_embedding='rotary'"
            )
        if remat and reversible:
            raise ValueError(
                "`reversible` computes again what `remat` would: choose one. Received: remat=True, "
                "reversible=True"
            )
        split_width(hidden_dim, num_heads, rotary, key_dim)
        check_near_field(exact_window, num_sink_tokens, far_bias)
        dropout_rate("dropout", dropout)
        if isinstance(feature_map, keras.layers.Layer):
            feature_map = keras.saving.serialize_keras_object(feature_map)
        kernel_initializer = keras.initializers.get(kernel_initializer)

        # === Layers ===
        # Not keras-hub's subclass of it, which `quantize` skips.
        self.token_embedding = keras.layers.ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
            tie_weights=tie_weights,
            embeddings_initializer=keras.initializers.TruncatedNormal(stddev=0.02),
            dtype=dtype,
            name="token_embedding",
        )
        self.position_embedding_layer = None
        if not rotary:
            self.position_embedding_layer = keras_hub.layers.PositionEmbedding(
                max_sequence_length,
                initializer=keras.initializers.TruncatedNormal(stddev=0.02),
                dtype=dtype,
                name="position_embedding",
            )
            self.embeddings_add = keras.layers.Add(dtype=dtype, name="embeddings_add")
        self.embeddings_dropout = keras.layers.Dropout(
            dropout, seed=seed_of(seed), dtype=dtype, name="embeddings_dropout"
        )
        self.reversible = reversible
        self._make_blocks(
            num_layers,
            {
                "num_heads": num_heads,
                "intermediate_dim": intermediate_dim,
                "key_dim": key_dim,
                "num_key_value_heads": num_key_value_heads,
                "attention": attention,
                "sliding_window": sliding_window,
                "num_features": num_features,
                "feature_map": feature_map,
                "exact_window": exact_window,
                "num_sink_tokens": num_sink_tokens,
                "far_bias": far_bias,
                "qk_norm": qk_norm,
                "rotary_max_wavelength": rotary_max_wavelength if rotary else None,
                "gated": gated,
                "activation": activation,
                "dropout": dropout,
                "attention_dropout": attention_dropout,
                "layer_norm_epsilon": layer_norm_epsilon,
                "use_bias": use_bias,
                "kernel_initializer": kernel_initializer,
                "remat": remat,
                "seed": seed,
                "dtype": dtype,
            },
        )

        # === Functional model ===
        self.max_sequence_length = max_sequence_length
        inputs, outputs = self._connect()
        super().__init__(inputs=inputs, outputs=outputs, dtype=dtype, **kwargs)
        set_own_policies(self)

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.key_dim = key_dim
        self.num_key_value_heads = num_key_value_heads
        self.attention = attention
        self.sliding_window = sliding_window
        self.num_features = num_features
        self.feature_map = feature_map
        self.exact_window = exact_window
        self.num_sink_tokens = num_sink_tokens
        self.far_bias = far_bias
        self.qk_norm = qk_norm
        self.position_embedding = position_embedding
        self.rotary_max_wavelength = rotary_max_wavelength
        self.gated = gated
        self.activation = keras.activations.get(activation)
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_epsilon = layer_norm_epsilon
        self.use_bias = use_bias
        self.kernel_initializer = kernel_initializer
        self.tie_weights = tie_weights
        self.remat = remat
        self.seed = seed

    def _stack(
        self, block_class: Any, name: str, num_layers: int, options: dict[str, Any], first: int = 0
    ) -> list[Any]:
        """Make blocks `name_0`, `name_1`, ...; the first is number `first` of the model."""
        seed, initializer = options["seed"], options["kernel_initializer"]
        return [
            block_class(
                **{
                    **options,
                    "kernel_initializer": initializer.clone(),
                    # A block uses three seeds from its own on; the embedding's dropout is first.
                    "seed": None if seed is None else seed + 1 + 3 * (first + i),
                },
                name=f"{name}_{i}",
            )
            for i in range(num_layers)
        ]

    def _run(self, stack: str, inputs: Any, *encoder_outputs: Any, **masks: Any) -> Any:
        """Run the blocks of one stack, in a row or on two streams."""
        blocks = getattr(self, f"{stack}_layers")
        if self.reversible:
            reversible = getattr(self, f"{stack}_reversible", None)
            if reversible is None:
                reversible = ReversibleStack(
                    blocks, dtype=blocks[0].dtype_policy, name=f"{stack}_reversible"
                )
                setattr(self, f"{stack}_reversible", reversible)
            return reversible(inputs, *encoder_outputs, **masks)
        for block in blocks:
            inputs = block(inputs, *encoder_outputs, **masks)
        return inputs

    def _run_with_state(
        self, stack: str, x: Any, state: list[Any], padding_mask: Any, memories: Any = None
    ) -> tuple[Any, list[Any]]:
        """Run the next tokens through the blocks of one stack, in inference mode."""
        if self.reversible:
            reversible = getattr(self, f"{stack}_reversible")
            return reversible.call_with_state(x, state, padding_mask, memories)
        after = []
        for i, block in enumerate(getattr(self, f"{stack}_layers")):
            x, new = block(
                x,
                *(() if memories is None else (memories[i],)),
                padding_mask=padding_mask,
                initial_state=state[i],
                return_state=True,
                training=False,
            )
            after.append(new)
        return x, after

    def _norm(self, name: str, options: dict[str, Any]) -> keras.layers.Layer:
        return keras.layers.LayerNormalization(
            epsilon=options["layer_norm_epsilon"], dtype=options["dtype"], name=name
        )

    def _embed(self, token_ids: Any, start: Any = None, positions: Any = None) -> Any:
        """Embed tokens at places 0, 1, ..., or on from `start` (B,), or at `positions` (B, T)."""
        x = self.token_embedding(token_ids)
        if self.position_embedding_layer is None:
            return x
        if positions is None:
            check_length(token_ids, self.max_sequence_length)
        if start is not None:
            positions = positions_after(start, x, self.max_sequence_length)
        return self.embeddings_add((x, self.position_embedding_layer(x, positions=positions)))

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Run the model on a dict of token ids and padding masks."""
        for tensor in keras.tree.flatten(inputs):
            check_length(tensor, self.max_sequence_length)
        return super().call(inputs, training=training, mask=mask)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "hidden_dim": self.hidden_dim,
            "intermediate_dim": self.intermediate_dim,
            "key_dim": self.key_dim,
            "num_key_value_heads": self.num_key_value_heads,
            "attention": self.attention,
            "sliding_window": self.sliding_window,
            "num_features": self.num_features,
            "feature_map": self.feature_map,
            "exact_window": self.exact_window,
            "num_sink_tokens": self.num_sink_tokens,
            "far_bias": self.far_bias,
            "qk_norm": self.qk_norm,
            "position_embedding": self.position_embedding,
            "max_sequence_length": self.max_sequence_length,
            "rotary_max_wavelength": self.rotary_max_wavelength,
            "gated": self.gated,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "tie_weights": self.tie_weights,
            "remat": self.remat,
            "reversible": self.reversible,
            "seed": self.seed,
        }


class PerformerStack(PerformerBackbone):
    """The abstract backbone of one stack: blocks of `block_class`, a last norm, and a state."""

    block_class: ClassVar[Any]

    def _make_blocks(self, num_layers: int, options: dict[str, Any]) -> None:
        self.transformer_layers = self._stack(
            self.block_class, "transformer_layer", num_layers, options
        )
        self.final_norm = self._norm("final_norm", options)

    def _connect(self) -> tuple[Any, Any]:
        inputs = {
            name: keras.Input(shape=(None,), dtype="int32", name=name)
            for name in ("token_ids", "padding_mask")
        }
        x = self.embeddings_dropout(self._embed(inputs["token_ids"]))
        x = self._run("transformer", x, padding_mask=inputs["padding_mask"])
        return inputs, self.final_norm(x)

    def packed(self) -> keras.Model:
        """A model of the same layers for rows that hold several sequences, one after the other.

        It takes two more inputs. `segment_ids` (B, T): tokens attend within a run of equal ids.
        `positions` (B, T): the place of each token in its own sequence. Every sequence then gets
        what it would get alone. Use it to train on short sequences without padding; its weights are
        those of this backbone.

        **Returns** A functional model of a dict of `token_ids`, `padding_mask`, `segment_ids` and
        `positions` to the hidden states (B, T, D).

        **Example**

        >>> model = PerformerDecoderBackbone(
        ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
        ... )
        >>> ids = keras.ops.ones((1, 5), "int32")
        >>> inputs = {"token_ids": ids, "padding_mask": ids}
        >>> inputs["segment_ids"] = keras.ops.convert_to_tensor([[0, 0, 0, 1, 1]])
        >>> inputs["positions"] = keras.ops.convert_to_tensor([[0, 1, 2, 0, 1]])
        >>> tuple(model.packed()(inputs).shape)
        (1, 5, 8)
        """
        inputs = {
            **self.input,
            **{
                name: keras.Input(shape=(None,), dtype="int32", name=name)
                for name in ("segment_ids", "positions")
            },
        }
        x = self._embed(inputs["token_ids"], positions=inputs["positions"])
        named = {name: tensor for name, tensor in inputs.items() if name != "token_ids"}
        x = self._run("transformer", self.embeddings_dropout(x), **named)
        return keras.Model(inputs, self.final_norm(x))

    def initial_state(self, batch_size: Any, max_length: int | None = None) -> list[dict[str, Any]]:
        """The state before the first token, to start a stream or a decoding loop from.

        **Args**
            batch_size: B.
            max_length: Number of tokens that attention="softmax" must be able to look back on.

        **Returns** One dictionary of tensors for each block, with the batch first.
        """
        return [layer.initial_state(batch_size, max_length) for layer in self.transformer_layers]

    def call_with_state(
        self, inputs: dict[str, Any], state: list[dict[str, Any]]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Encode the next tokens of a stream, in inference mode.

        A decoder gives what one call on the whole stream gives. An encoder's tokens see their own
        chunk and the chunks before it (block-causal), which one call on the whole does not give.

        **Args**
            inputs: A dict of `token_ids` and `padding_mask` (B, T), of any length T. Padding may be
                on the left before a row's first token, and on the right: the row goes on after its
                last token.
            state: From `initial_state` or an earlier call.

        **Returns** The hidden states (B, T, D) and the state after these tokens, which with feature
        attention and sliding windows has a size that does not depend on their number.

        **Raises** ValueError for a chunk that is longer than learned positions reach. A stream that
        goes beyond them chunk by chunk is not noticed: its tokens all get the last position.

        **Cost** As calling the model on T tokens, whatever came before.

        **Example**

        >>> model = PerformerDecoderBackbone(
        ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
        ... )
        >>> ids = keras.ops.ones((2, 5), "int32")
        >>> chunk = {"token_ids": ids, "padding_mask": ids}
        >>> state = model.initial_state(batch_size=2)
        >>> hidden, state = model.call_with_state(chunk, state)
        >>> hidden, state = model.call_with_state(chunk, state)
        >>> [int(n) for n in state[0]["position"]]
        [10, 10]
        """
        x = self._embed(inputs["token_ids"], state[0]["position"])
        x, after = self._run_with_state("transformer", x, state, inputs["padding_mask"])
        return self.final_norm(x), after
