"""Pairs of strings to inputs and labels of the encoder-decoder language model."""

from typing import Any

import keras
import keras_hub

from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_task import refuse_labels, weigh
from keras_performer.models.performer_causal_lm_preprocessor import PerformerCausalLMPreprocessor
from keras_performer.models.performer_seq_2_seq_backbone import PerformerSeq2SeqBackbone
from keras_performer.models.protein_tokenizer import ProteinTokenizer


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerSeq2SeqLMPreprocessor(keras_hub.models.Seq2SeqLMPreprocessor):
    """Tokenize and pack pairs of strings, and make each next token of the second the label.

    keras-hub's `Seq2SeqLMPreprocessor` for the Performer encoder-decoder, which needs TensorFlow
    only inside `tf.data`.

    **Shapes** B pairs give `encoder_token_ids` and `encoder_padding_mask` (B, S),
    `decoder_token_ids` and `decoder_padding_mask` (B, T), labels (B, T) and a sample weight (B, T).

    **Args**
        tokenizer: A tokenizer with start, end and padding tokens, for both sides.
        encoder_sequence_length: Length S. What is longer is cut at its end.
        decoder_sequence_length: Length T.
        **kwargs: `name` of the layer.

    **Returns** (calling the layer on a dict of `encoder_text` and `decoder_text`)
    `(x, y, sample_weight)`; the sample weight is 1 where the label is a token, or the one given
    for the pair, and 0 where it is padding.

    **Raises** ValueError for labels (the layer makes its own), and for sample weights that are not
    one a pair.

    **Example**

    >>> preprocessor = PerformerSeq2SeqLMPreprocessor(
    ...     ProteinTokenizer(), encoder_sequence_length=6, decoder_sequence_length=4
    ... )
    >>> x, y, _ = preprocessor({"encoder_text": ["MKT"], "decoder_text": ["M"]})
    >>> [[int(i) for i in row] for row in y]
    [[15, 2, 0, 0]]

    **Source** Sutskever et al. 2014, arXiv 1409.3215, for the objective.
    """

    backbone_cls = PerformerSeq2SeqBackbone
    tokenizer_cls = ProteinTokenizer

    def call(self, x: Any, y: Any = None, sample_weight: Any = None, **lengths: Any) -> Any:
        """Tokenize and pack pairs of strings.

        **Args**
            x: A dict of `encoder_text` and `decoder_text`, a string or a batch of strings each.
            y: None.
            sample_weight: A weight for each pair, or None.
            **lengths: `encoder_sequence_length` and `decoder_sequence_length`, instead of the
                constructor's.

        **Returns** `(x, y, sample_weight)`.
        """
        refuse_labels(y)
        x, y, weights = super().call(x, **lengths)
        return x, y, weigh(self, weights, sample_weight)

    def generate_preprocess(self, x: Any, **lengths: Any) -> dict[str, Any]:
        """Turn sources, and prompts if there are any, into inputs of `generate`.

        **Args**
            x: Source strings, or a dict of `encoder_text` and, if there are prompts,
                `decoder_text`.
            **lengths: As in `call`; `sequence_length` is the decoder's.

        **Returns** A dict of the model's inputs.

        **Raises** ValueError for prompts that are not one a source.
        """
        if isinstance(x, dict) and "decoder_text" not in x:
            x = x["encoder_text"]
        if isinstance(x, dict):
            counts = [len(texts) if isinstance(texts, list) else None for texts in x.values()]
            if None not in counts and len(set(counts)) > 1:
                raise ValueError(
                    "Every source needs a prompt of its own, or none has one. Received: "
                    + ", ".join(f"{n} of {name}" for name, n in zip(x, counts, strict=True))
                )
        return super().generate_preprocess(x, **lengths)

    def generate_postprocess(self, x: dict[str, Any]) -> Any:
        """Turn generated tokens into strings.

        **Args**
            x: A dict of `decoder_token_ids` and `decoder_padding_mask`.

        **Returns** The strings, without special tokens.
        """
        # keras-hub's own for pairs needs TensorFlow, and the one for single strings does not.
        decoder = PerformerCausalLMPreprocessor(self.tokenizer)
        return decoder.generate_postprocess(
            {name: x[f"decoder_{name}"] for name in ("token_ids", "padding_mask")}
        )

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments; keras-hub's base class leaves out the lengths."""
        return {
            **super().get_config(),
            "encoder_sequence_length": self.encoder_sequence_length,
            "decoder_sequence_length": self.decoder_sequence_length,
        }
