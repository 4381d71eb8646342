"""The encoder model."""

from typing import Any

import keras
import keras_hub

from keras_performer.layers import PerformerEncoderBlock
from keras_performer.layers._arguments import dropout_rate, positive_int, split_width
from keras_performer.models._load_preset import load_by_name


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerEncoderBackbone(keras_hub.models.Backbone):
    """An encoder of long token sequences: embedding, pre-norm Performer blocks, a last norm.

    Use it as the body of masked language models, classifiers and embedders. It is a functional
    Keras model and a keras-hub backbone: `from_preset`, `save_to_preset` and `enable_lora` work.

    **Shapes** Inputs: a dict of `token_ids` and `padding_mask`, both integers (B, T). Output:
    (B, T, D).

    **Args**
        vocabulary_size: Number of token ids.
        num_layers: Number of blocks.
        num_heads: Number of query heads N.
        hidden_dim: Model width D.
        intermediate_dim: Width of the feed-forward part of each block.
        key_dim: Head size H. Default: D/N.
        num_key_value_heads: Number of key/value heads K, a divisor of N. Default: N.
        num_features: Number of features M. Default: what the feature map chooses.
        feature_map: Name, config or instance of a feature map. Each block gets its own copy.
        qk_norm: Whether queries and keys are normalised, with a learned temperature.
        position_embedding: `"rotary"`, which has no longest length, or `"learned"`.
        max_sequence_length: Longest input with learned positions. Not for rotary positions.
        rotary_max_wavelength: Longest wavelength of the rotary positions.
        gated: Whether the feed-forward part is a gated linear unit.
        activation: Activation of the feed-forward part.
        dropout: Rate of dropout on the embedding and on the residual branches.
        attention_dropout: Rate at which attention drops whole keys.
        layer_norm_epsilon: Epsilon of the layer normalisations.
        use_bias: Whether the dense layers have biases.
        kernel_initializer: Initializer of the kernels of the blocks.
        seed: Seed of the random features and of dropout; each block derives its own from it.
        dtype: Dtype or dtype policy of every layer, such as `"mixed_bfloat16"`.
        **kwargs: `name` and `trainable` of the model.

    **Returns** (calling the model) the last hidden states, in the compute dtype.

    **Masking** `padding_mask` is 1 where a token takes part, 0 where it is padding: such a token is
    no key for anyone, so padding changes no other token's output. Its own output means nothing.

    **Precision** As `dtype` says; attention accumulates in float32.

    **Cost** num_layers times O(T M (H + V) N + T D intermediate_dim), linear in T.

    **Raises** ValueError for sizes that are not positive integers, heads that do not divide the
    width, an odd head size with rotary positions, an unknown `position_embedding`, or a
    `max_sequence_length` that is missing (learned) or without effect (rotary).

    **Example**

    >>> model = PerformerEncoderBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> ids = keras.ops.ones((2, 5), "int32")
    >>> tuple(model({"token_ids": ids, "padding_mask": ids}).shape)
    (2, 5, 8)

    **Source** Choromanski et al. 2021, arXiv 2009.14794, with pre-norm blocks, rotary positions
    and normalised queries and keys in place of the paper's.
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
        num_features: int | None = None,
        feature_map: Any = "favor_plus",
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
        seed: int | None = None,
        dtype: Any = None,
        **kwargs: Any,
    ):
        vocabulary_size = positive_int("vocabulary_size", vocabulary_size)
        num_layers = positive_int("num_layers", num_layers)
        num_heads = positive_int("num_heads", num_heads)
        hidden_dim = positive_int("hidden_dim", hidden_dim)
        if position_embedding not in ("rotary", "learned"):
            raise ValueError(
                "`position_embedding` must be 'rotary' or 'learned'. Received: "
                f"position_embedding={position_embedding!r}"
            )
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
        split_width(hidden_dim, num_heads, rotary, key_dim)
        dropout_rate("dropout", dropout)
        if isinstance(feature_map, keras.layers.Layer):
            feature_map = keras.saving.serialize_keras_object(feature_map)
        kernel_initializer = keras.initializers.get(kernel_initializer)

        # === Layers ===
        self.token_embedding = keras_hub.layers.ReversibleEmbedding(
            vocabulary_size,
            hidden_dim,
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
            dropout, seed=seed, dtype=dtype, name="embeddings_dropout"
        )
        self.transformer_layers = [
            PerformerEncoderBlock(
                num_heads=num_heads,
                intermediate_dim=intermediate_dim,
                key_dim=key_dim,
                num_key_value_heads=num_key_value_heads,
                num_features=num_features,
                feature_map=feature_map,
                qk_norm=qk_norm,
                rotary_max_wavelength=rotary_max_wavelength if rotary else None,
                gated=gated,
                activation=activation,
                dropout=dropout,
                attention_dropout=attention_dropout,
                layer_norm_epsilon=layer_norm_epsilon,
                use_bias=use_bias,
                kernel_initializer=kernel_initializer.clone(),
                # A block uses three seeds from its own on; the embedding's dropout has the first.
                seed=None if seed is None else seed + 1 + 3 * i,
                dtype=dtype,
                name=f"transformer_layer_{i}",
            )
            for i in range(num_layers)
        ]
        self.final_norm = keras.layers.LayerNormalization(
            epsilon=layer_norm_epsilon, dtype=dtype, name="final_norm"
        )

        # === Functional model ===
        token_ids = keras.Input(shape=(None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input(shape=(None,), dtype="int32", name="padding_mask")
        x = self.token_embedding(token_ids)
        if self.position_embedding_layer is not None:
            x = self.embeddings_add((x, self.position_embedding_layer(x)))
        x = self.embeddings_dropout(x)
        for layer in self.transformer_layers:
            x = layer(x, padding_mask=padding_mask)
        self.max_sequence_length = max_sequence_length
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.final_norm(x),
            dtype=dtype,
            **kwargs,
        )

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.hidden_dim = hidden_dim
        self.intermediate_dim = intermediate_dim
        self.key_dim = key_dim
        self.num_key_value_heads = num_key_value_heads
        self.num_features = num_features
        self.feature_map = feature_map
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
        self.seed = seed

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Encode a dict of `token_ids` and `padding_mask`."""
        # Learned positions end; the backends' own errors do not say what to do about it.
        limit = self.max_sequence_length
        length = keras.tree.flatten(inputs)[0].shape[1]
        if limit is not None and length is not None and length > limit:
            raise ValueError(
                f"This model has learned positions for at most {limit} tokens. Received: inputs of "
                f"length {length}. Cut the inputs (`sequence_length` of the preprocessor), or "
                "build the model with a larger `max_sequence_length`."
            )
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
            "num_features": self.num_features,
            "feature_map": self.feature_map,
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
            "seed": self.seed,
        }
