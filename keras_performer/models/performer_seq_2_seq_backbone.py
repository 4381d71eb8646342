"""The encoder-decoder model."""

from typing import Any

import keras

from keras_performer.layers import PerformerDecoderBlock, PerformerEncoderBlock
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_backbone import PerformerBackbone


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerSeq2SeqBackbone(PerformerBackbone):
    """An encoder of long sequences and a decoder that reads it: `num_layers` blocks each.

    Use it as the body of translation, summarisation and other sequence-to-sequence models. Both
    sides share the token embedding. It is a functional Keras model and a keras-hub backbone. While
    generating, the decoder reads a memory of the encoder's outputs whose size does not depend on
    their number (feature attention).

    **Shapes** Inputs: a dict of `encoder_token_ids` and `encoder_padding_mask` (B, S) and
    `decoder_token_ids` and `decoder_padding_mask` (B, T), all integers. Outputs: a dict of
    `encoder_sequence_output` (B, S, D) and `decoder_sequence_output` (B, T, D).

    **Args** Those of `PerformerEncoderBackbone`. With attention="sliding_window" the decoder reads
    the encoder by softmax attention.

    **Returns** (calling the model) the last hidden states of both sides, in the compute dtype.

    **Masking** The padding masks are 1 where a token takes part. Padding is no key for anyone, and
    no token of the decoder sees a later one.

    **Precision** As `dtype` says; attention accumulates in float32.

    **Cost** num_layers times O((S + T) M (H + V) N + (S + T) D intermediate_dim), linear in both
    lengths.

    **Raises** ValueError as `PerformerEncoderBackbone` does.

    **Example**

    >>> model = PerformerSeq2SeqBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> source, target = keras.ops.ones((2, 9), "int32"), keras.ops.ones((2, 5), "int32")
    >>> outputs = model(
    ...     {
    ...         "encoder_token_ids": source,
    ...         "encoder_padding_mask": source,
    ...         "decoder_token_ids": target,
    ...         "decoder_padding_mask": target,
    ...     }
    ... )
    >>> tuple(outputs["decoder_sequence_output"].shape)
    (2, 5, 8)

    **Source** Vaswani et al. 2017, arXiv 1706.03762, for the arrangement; Choromanski et al. 2021,
    arXiv 2009.14794, for the attention.
    """

    def _make_blocks(self, num_layers: int, options: dict[str, Any]) -> None:
        self.encoder_layers = self._stack(
            PerformerEncoderBlock, "encoder_layer", num_layers, options
        )
        self.encoder_norm = self._norm("encoder_norm", options)
        self.decoder_layers = self._stack(
            PerformerDecoderBlock,
            "decoder_layer",
            num_layers,
            {**options, "cross_attention": True},
            first=num_layers,
        )
        self.decoder_norm = self._norm("decoder_norm", options)

    def _connect(self) -> tuple[Any, Any]:
        inputs = {
            name: keras.Input(shape=(None,), dtype="int32", name=name)
            for name in (
                "encoder_token_ids",
                "encoder_padding_mask",
                "decoder_token_ids",
                "decoder_padding_mask",
            )
        }
        x = self.embeddings_dropout(self._embed(inputs["encoder_token_ids"]))
        encoded = self.encoder_norm(
            self._run("encoder", x, padding_mask=inputs["encoder_padding_mask"])
        )
        x = self._run(
            "decoder",
            self.embeddings_dropout(self._embed(inputs["decoder_token_ids"])),
            encoded,
            padding_mask=inputs["decoder_padding_mask"],
            encoder_padding_mask=inputs["encoder_padding_mask"],
        )
        outputs = {
            "encoder_sequence_output": encoded,
            "decoder_sequence_output": self.decoder_norm(x),
        }
        return inputs, outputs

    def encode(self, token_ids: Any, padding_mask: Any) -> Any:
        """The encoder alone, in inference mode: (B, S) and (B, S) to (B, S, D)."""
        x = self._run("encoder", self._embed(token_ids), padding_mask=padding_mask, training=False)
        return self.encoder_norm(x)

    def initial_state(
        self, encoded: Any, encoder_padding_mask: Any, max_length: int | None = None
    ) -> list[dict[str, Any]]:
        """What the decoder carries before its first token.

        **Args**
            encoded: (B, S, D), from `encode`.
            encoder_padding_mask: (B, S).
            max_length: Number of tokens that attention="softmax" must be able to look back on.

        **Returns** For each block a dictionary of `self_attention`, its state, and `memory`, what
        it reads of the encoder.
        """
        batch_size = keras.ops.shape(encoded)[0]
        return [
            {
                "self_attention": layer.initial_state(batch_size, max_length),
                "memory": layer.encoder_memory(encoded, encoder_padding_mask),
            }
            for layer in self.decoder_layers
        ]

    def call_with_state(
        self, inputs: dict[str, Any], state: list[dict[str, Any]]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Decode the next tokens, in inference mode.

        **Args**
            inputs: A dict of `decoder_token_ids` and `decoder_padding_mask` (B, T), of any length
                T; padding on the right takes no part in what follows.
            state: From `initial_state` or an earlier call.

        **Returns** The hidden states (B, T, D) and the state after these tokens. Chunks in a row
        give what one call on all of them gives.

        **Raises** ValueError for a chunk that is longer than learned positions reach. Going beyond
        them chunk by chunk is not noticed: those tokens all get the last position.
        """
        x = self._embed(inputs["decoder_token_ids"], state[0]["self_attention"]["position"])
        memories = [part["memory"] for part in state]
        x, after = self._run_with_state(
            "decoder",
            x,
            [part["self_attention"] for part in state],
            inputs["decoder_padding_mask"],
            memories,
        )
        after = [
            {"self_attention": part, "memory": memory}
            for part, memory in zip(after, memories, strict=True)
        ]
        return self.decoder_norm(x), after
