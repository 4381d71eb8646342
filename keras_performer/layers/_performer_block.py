"""What the encoder and the decoder block share: arguments, sublayers and residual branches."""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import keras

from keras_performer.layers._arguments import (
    check_attention,
    check_near_field,
    dropout_rate,
    optional_int,
    positive_int,
    seed_of,
    split_width,
)
from keras_performer.layers._recomputed import recomputed
from keras_performer.layers.performer_attention import PerformerAttention


class PerformerBlock(keras.layers.Layer):
    """The abstract block: self-attention and a feed-forward part, each on a residual branch.

    A subclass defines `build`, `call`, and whether it is `causal`; one that can attend to an
    encoder, also `attend_encoder`, and sets `cross_attention` where a block does.

    **Args** Those that `PerformerEncoderBlock` documents.
    """

    causal: ClassVar[bool]
    cross_attention: bool = False

    def __init__(
        self,
        num_heads: int,
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
        rotary_max_wavelength: float | None = 10000,
        gated: bool = False,
        activation: Any = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        layer_norm_epsilon: float = 1e-5,
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        remat: bool = False,
        seed: int | None = None,
        **kwargs: Any,
    ):
        super().__init__(autocast=False, **kwargs)  # as in `PerformerAttention`
        self.supports_masking = True
        self.num_heads = positive_int("num_heads", num_heads)
        self.intermediate_dim = positive_int("intermediate_dim", intermediate_dim)
        self.key_dim = optional_int("key_dim", key_dim)
        self.num_key_value_heads = optional_int("num_key_value_heads", num_key_value_heads)
        if self.num_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                "`num_key_value_heads` must divide `num_heads`. Received: "
                f"num_key_value_heads={num_key_value_heads}, num_heads={num_heads}"
            )
        self.sliding_window = optional_int("sliding_window", sliding_window)
        check_attention(attention, sliding_window)
        self.attention = attention
        self.num_features = optional_int("num_features", num_features)
        if rotary_max_wavelength is not None and rotary_max_wavelength <= 0:
            raise ValueError(
                "`rotary_max_wavelength` must be above zero, or None for no rotary positions. "
                f"Received: rotary_max_wavelength={rotary_max_wavelength}"
            )
        # Kept as a config: the map that is used belongs to the attention, and to nothing else.
        if isinstance(feature_map, keras.layers.Layer):
            feature_map = keras.saving.serialize_keras_object(feature_map)
        self.feature_map = feature_map
        self.exact_window = optional_int("exact_window", exact_window)
        check_near_field(exact_window, num_sink_tokens, far_bias)
        self.num_sink_tokens = num_sink_tokens
        self.far_bias = far_bias
        self.qk_norm = qk_norm
        self.rotary_max_wavelength = rotary_max_wavelength
        self.gated = gated
        self.activation = keras.activations.get(activation)
        self.dropout = dropout_rate("dropout", dropout)
        self.attention_dropout = dropout_rate("attention_dropout", attention_dropout)
        self.layer_norm_epsilon = layer_norm_epsilon
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.remat = remat
        self.seed = seed

    def _build_block(self, shape: tuple[int | None, ...]) -> None:
        """Create the sublayers that every block has, for inputs (B, T, D)."""
        hidden_dim = shape[-1]
        if len(shape) != 3 or hidden_dim is None:
            raise ValueError(
                f"{type(self).__name__} expects inputs (batch, length, width) of known width. "
                f"Received: inputs.shape={tuple(shape)}"
            )
        self.self_attention_norm = self._build_norm("self_attention_norm", shape)
        self.self_attention = self._build_attention("self_attention", shape, shape)
        self.self_attention_dropout = self._build_dropout("self_attention_dropout", 1)

        self.feedforward_norm = self._build_norm("feedforward_norm", shape)
        self.feedforward_intermediate = self._build_dense(
            "feedforward_intermediate",
            self.intermediate_dim,
            shape,
            None if self.gated else self.activation,
        )
        self.feedforward_gate = None
        if self.gated:
            self.feedforward_gate = self._build_dense(
                "feedforward_gate", self.intermediate_dim, shape, self.activation
            )
        self.feedforward_output = self._build_dense(
            "feedforward_output", hidden_dim, (*shape[:-1], self.intermediate_dim), None
        )
        self.feedforward_dropout = self._build_dropout("feedforward_dropout", 2)

    def _build_attention(
        self, name: str, query_shape: tuple[Any, ...], value_shape: tuple[Any, ...]
    ) -> PerformerAttention:
        """Self-attention of this block's kind, or cross-attention: without positions or window."""
        crosses = name == "cross_attention"
        wavelength = None if crosses else self.rotary_max_wavelength
        near_field: dict[str, Any] = {}
        if self.attention == "performer" and not crosses:
            near_field["exact_window"] = self.exact_window
            near_field["num_sink_tokens"] = self.num_sink_tokens
            near_field["far_bias"] = self.far_bias
        attention = PerformerAttention(
            num_heads=self.num_heads,
            key_dim=split_width(
                query_shape[-1], self.num_heads, wavelength is not None, self.key_dim
            ),
            dropout=self.attention_dropout,
            use_bias=self.use_bias,
            sliding_window=None if crosses else self.sliding_window,
            kernel_initializer=self.kernel_initializer.clone(),
            num_features=self.num_features,
            feature_map=self.feature_map if self.attention == "performer" else None,
            **near_field,
            num_key_value_heads=self.num_key_value_heads,
            qk_norm=self.qk_norm,
            rotary_max_wavelength=wavelength,
            seed=self.seed,
            dtype=self.dtype_policy,
            name=name,
        )
        attention.build(query_shape, value_shape)
        return attention

    def _build_norm(self, name: str, shape: tuple[int | None, ...]) -> keras.layers.Layer:
        norm = keras.layers.LayerNormalization(
            epsilon=self.layer_norm_epsilon, dtype=self.dtype_policy, name=name
        )
        norm.build(shape)
        return norm

    def _build_dense(
        self, name: str, units: int, shape: tuple[int | None, ...], activation: Any
    ) -> keras.layers.Layer:
        dense = keras.layers.Dense(
            units,
            activation=activation,
            use_bias=self.use_bias,
            # One instance draws the same numbers each time, so every kernel gets its own.
            kernel_initializer=self.kernel_initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build(shape)
        return dense

    def _build_dropout(self, name: str, stream: int) -> keras.layers.Layer:
        return keras.layers.Dropout(
            self.dropout,
            seed=seed_of(self.seed, stream),
            dtype=self.dtype_policy,
            name=name,
        )

    def check_encoder(self, encoder_outputs: Any) -> None:
        """Raise ValueError unless there are outputs, or a shape of them, where they are used."""
        if (encoder_outputs is not None) != self.cross_attention:
            raise ValueError(
                "`encoder_outputs` go with decoder blocks of cross_attention=True, and with "
                f"nothing else. Received: the block {self.name!r} with cross_attention="
                f"{self.cross_attention}, encoder_outputs "
                f"{'missing' if encoder_outputs is None else 'given'}"
            )

    def _run(self, function: Callable[..., Any], training: bool | None, *arguments: Any) -> Any:
        """`function(*arguments)`, nested or not; with `remat`, training keeps these only.

        On TensorFlow no gradient reaches a floating tensor that a recomputed function closes over.
        """
        if not (self.remat and training):
            return function(*arguments)
        leaves = keras.tree.flatten(arguments)
        floating = [x is not None and keras.backend.is_float_dtype(x.dtype) for x in leaves]

        def rebuilt(*tensors: Any) -> Any:
            rest = iter(tensors)
            whole = [next(rest) if f else x for f, x in zip(floating, leaves, strict=True)]
            return function(*keras.tree.pack_sequence_as(arguments, whole))

        tensors = [x for f, x in zip(floating, leaves, strict=True) if f]
        return recomputed(rebuilt, self.variables, *tensors)

    def attend(
        self,
        x: Any,
        *,
        key_mask: Any = None,
        segment_ids: Any = None,
        positions: Any = None,
        initial_state: dict[str, Any] | None = None,
        return_state: bool = False,
        training: bool | None = None,
    ) -> tuple[Any, dict[str, Any] | None]:
        """The branch of self-attention: what is added to the residual, and the state or None."""
        x = self.self_attention_norm(x)
        x = self.self_attention(
            x,
            x,
            key_mask=key_mask,
            use_causal_mask=self.causal,
            segment_ids=segment_ids,
            positions=positions,
            initial_state=initial_state,
            return_state=return_state,
            training=training,
        )
        x, state = x if return_state else (x, None)
        return self.self_attention_dropout(x, training=training), state

    def feed_forward(self, x: Any, training: bool | None = None) -> Any:
        """The feed-forward branch: what is added to the residual."""
        x = self.feedforward_norm(x)
        inner = self.feedforward_intermediate(x)
        if self.feedforward_gate is not None:
            inner = inner * self.feedforward_gate(x)
        return self.feedforward_dropout(self.feedforward_output(inner), training=training)

    def initial_state(self, batch_size: Any, max_length: int | None = None) -> dict[str, Any]:
        """The state before the first token; see `PerformerAttention.initial_state`."""
        return self.self_attention.initial_state(batch_size, max_length)

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the output, which is that of the input."""
        return inputs_shape

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Return the symbolic output, without tracing the computation."""
        given = inspect.signature(self.call).bind(*args, **kwargs).arguments
        inputs = given["inputs"]
        output = keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)
        if not given.get("return_state"):
            return output
        return output, self.self_attention.compute_state_spec(
            inputs.shape[0], given.get("initial_state"), self.causal, given.get("segment_ids")
        )

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
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
            "rotary_max_wavelength": self.rotary_max_wavelength,
            "gated": self.gated,
            "activation": keras.activations.serialize(self.activation),
            "dropout": self.dropout,
            "attention_dropout": self.attention_dropout,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "remat": self.remat,
            "seed": self.seed,
        }
