"""The model of performer-pytorch."""

from typing import Any

import keras
import keras_hub

from keras_performer.convert.performer_pytorch_block import PerformerPytorchBlock
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_backbone import set_own_policies


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerPytorchBackbone(keras_hub.models.Backbone):
    """`PerformerLM` of performer-pytorch up to its last norm, for weights that were trained there.

    Positions are a table that is added to the tokens: learned, or fixed sinusoids with `rotary`,
    where queries and keys also turn. New models are better made of `PerformerEncoderBackbone` or
    `PerformerDecoderBackbone`, which carry a state and generate.

    **Shapes** A dict of `token_ids` and `padding_mask` (B, T) -> (B, T, D).

    **Args**
        vocabulary_size: Number of tokens.
        max_sequence_length: Number of positions.
        num_layers: Number of blocks.
        num_heads: Number of heads N.
        hidden_dim: Width D.
        key_dim: Head size H.
        intermediate_dim: Width of the feed-forward part.
        causal: Whether tokens see only what is before them.
        norm: "layer", "scale" or "rezero"; see `PerformerPytorchBlock`.
        gated: Whether the feed-forward part is a gated linear unit.
        shift_tokens: Whether a part of the features comes from neighbouring tokens.
        rotary: Whether queries and keys have rotary positions; the table is not trained then.
        use_bias: Whether the projections of attention have biases.
        reversible: Whether blocks run on two streams; the output is their sum.
        feature_map: As in `PerformerAttention`.
        embedding_dropout: Rate of dropout on the embeddings.
        attention_dropout: Rate of dropout on the output of attention.
        feedforward_dropout: Rate of dropout inside the feed-forward part.
        dtype: Dtype or dtype policy.
        **kwargs: `name` and `trainable` of the model.

    **Masking** As in `PerformerPytorchBlock`.

    **Example**

    >>> backbone = keras_performer.convert.PerformerPytorchBackbone(
    ...     vocabulary_size=7, max_sequence_length=20, num_layers=1, num_heads=2, hidden_dim=8,
    ...     key_dim=4, intermediate_dim=16,
    ... )
    >>> ids = np.ones((1, 5), "int32")
    >>> tuple(backbone({"token_ids": ids, "padding_mask": ids}).shape)
    (1, 5, 8)

    **Source** performer-pytorch 1.1.4.
    """

    def __init__(
        self,
        vocabulary_size: int,
        max_sequence_length: int,
        num_layers: int,
        num_heads: int,
        hidden_dim: int,
        key_dim: int,
        intermediate_dim: int,
        causal: bool = False,
        norm: str = "layer",
        gated: bool = False,
        shift_tokens: bool = False,
        rotary: bool = False,
        use_bias: bool = False,
        reversible: bool = False,
        feature_map: Any = "favor_plus",
        embedding_dropout: float = 0.0,
        attention_dropout: float = 0.0,
        feedforward_dropout: float = 0.0,
        dtype: Any = None,
        **kwargs: Any,
    ):
        if isinstance(feature_map, keras.layers.Layer):
            feature_map = keras.saving.serialize_keras_object(feature_map)

        # === Layers ===
        # Not keras-hub's subclass of it, which `quantize` skips.
        self.token_embedding = keras.layers.ReversibleEmbedding(
            vocabulary_size, hidden_dim, dtype=dtype, name="token_embedding"
        )
        self.position_embedding = keras_hub.layers.PositionEmbedding(
            max_sequence_length, trainable=not rotary, dtype=dtype, name="position_embedding"
        )
        self.embeddings_dropout = keras.layers.Dropout(
            embedding_dropout, dtype=dtype, name="embeddings_dropout"
        )
        self.transformer_layers = [
            PerformerPytorchBlock(
                num_heads,
                key_dim,
                intermediate_dim,
                causal=causal,
                norm=norm,
                gated=gated,
                shift_tokens=shift_tokens,
                rotary=rotary,
                use_bias=use_bias,
                reversible=reversible,
                feature_map=feature_map,
                attention_dropout=attention_dropout,
                feedforward_dropout=feedforward_dropout,
                dtype=dtype,
                name=f"transformer_layer_{i}",
            )
            for i in range(num_layers)
        ]
        self.final_norm = keras.layers.LayerNormalization(
            epsilon=1e-5, dtype=dtype, name="final_norm"
        )

        # === Functional model ===
        inputs = {
            name: keras.Input(shape=(None,), dtype="int32", name=name)
            for name in ("token_ids", "padding_mask")
        }
        x = self.token_embedding(inputs["token_ids"])
        x = self.embeddings_dropout(x + self.position_embedding(x))
        x = keras.ops.concatenate([x, x], axis=-1) if reversible else x
        for block in self.transformer_layers:
            x = block(x, padding_mask=inputs["padding_mask"])
        if reversible:
            first, second = keras.ops.split(x, 2, axis=-1)
            x = first + second
        super().__init__(inputs=inputs, outputs=self.final_norm(x), dtype=dtype, **kwargs)
        set_own_policies(self)

        # === Config ===
        self.vocabulary_size = vocabulary_size
        self.max_sequence_length = max_sequence_length
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.hidden_dim = hidden_dim
        self.key_dim = key_dim
        self.intermediate_dim = intermediate_dim
        self.causal = causal
        self.norm = norm
        self.gated = gated
        self.shift_tokens = shift_tokens
        self.rotary = rotary
        self.use_bias = use_bias
        self.reversible = reversible
        self.feature_map = feature_map
        self.embedding_dropout = embedding_dropout
        self.attention_dropout = attention_dropout
        self.feedforward_dropout = feedforward_dropout

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {
            **super().get_config(),
            "vocabulary_size": self.vocabulary_size,
            "max_sequence_length": self.max_sequence_length,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "hidden_dim": self.hidden_dim,
            "key_dim": self.key_dim,
            "intermediate_dim": self.intermediate_dim,
            "causal": self.causal,
            "norm": self.norm,
            "gated": self.gated,
            "shift_tokens": self.shift_tokens,
            "rotary": self.rotary,
            "use_bias": self.use_bias,
            "reversible": self.reversible,
            "feature_map": self.feature_map,
            "embedding_dropout": self.embedding_dropout,
            "attention_dropout": self.attention_dropout,
            "feedforward_dropout": self.feedforward_dropout,
        }
