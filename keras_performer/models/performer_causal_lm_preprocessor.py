"""Strings to inputs and labels of the causal language model, and tokens back to strings."""

from typing import Any

import keras
import keras_hub
import numpy as np

from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_task import refuse_labels, weigh
from keras_performer.models.performer_decoder_backbone import PerformerDecoderBackbone
from keras_performer.models.protein_tokenizer import ProteinTokenizer


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerCausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Tokenize strings, pack them to one length, and make each next token the label.

    keras-hub's `CausalLMPreprocessor` for the Performer decoder; it also prepares prompts
    (`generate_preprocess`) and turns generated tokens into strings (`generate_postprocess`).

    **Shapes** B strings give `token_ids` and `padding_mask` (B, T), labels (B, T) and a sample
    weight (B, T).

    **Args**
        tokenizer: A tokenizer with start, end and padding tokens.
        sequence_length: Length T. What is longer is cut at its end.
        add_start_token: Whether a start token comes first.
        add_end_token: Whether an end token comes last, if there is room.
        **kwargs: `name` of the layer.

    **Returns** (calling the layer) `(x, y, sample_weight)`; the sample weight is 1 where the label
    is a token, or the one given for the string, and 0 where it is padding.

    **Raises** ValueError for labels (the layer makes its own), and for sample weights that are not
    one a string.

    **Example**

    >>> preprocessor = PerformerCausalLMPreprocessor(ProteinTokenizer(), sequence_length=6)
    >>> x, y, sample_weight = preprocessor(["MKT"])
    >>> np.asarray(x["token_ids"]).tolist(), np.asarray(y).tolist()
    ([[1, 15, 13, 21, 2, 0]], [[15, 13, 21, 2, 0, 0]])

    **Source** The objective of autoregressive language models.
    """

    backbone_cls = PerformerDecoderBackbone
    tokenizer_cls = ProteinTokenizer

    def build(self, input_shape: Any) -> None:
        """Make the layer that packs."""
        super().build(input_shape)
        if not self.add_start_token:
            # keras-hub asks it for a start token before prompts all the same.
            self.packer = keras_hub.layers.StartEndPacker(
                end_value=self.tokenizer.end_token_id,
                pad_value=self.tokenizer.pad_token_id,
                sequence_length=self.sequence_length,
                return_padding_mask=True,
            )

    def call(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        sequence_length: int | None = None,
    ) -> Any:
        """Tokenize and pack strings.

        **Args**
            x: A string or a batch of strings.
            y: None.
            sample_weight: A weight for each string, or None.
            sequence_length: Length T, instead of the constructor's.

        **Returns** `(x, y, sample_weight)`.
        """
        refuse_labels(y)
        x, y, weights = super().call(x, sequence_length=sequence_length)
        return x, y, weigh(self, weights, sample_weight)

    def generate_preprocess(self, x: Any, sequence_length: int | None = None) -> dict[str, Any]:
        """Turn prompts into inputs of `generate`.

        **Args**
            x: A string or a batch of strings.
            sequence_length: Length T at which generation ends, instead of the constructor's.

        **Returns** A dict of `token_ids` and `padding_mask` (B, T).

        **Raises** ValueError for a prompt without a token, where there is no start token.
        """
        inputs = super().generate_preprocess(x, sequence_length=sequence_length)
        if not self.add_start_token and not self._use_tf_workflow():
            lengths = np.sum(keras.ops.convert_to_numpy(inputs["padding_mask"]), axis=-1)
            if not np.all(lengths):
                raise ValueError(
                    "With add_start_token=False every prompt needs a token to go on from. "
                    f"Received: prompts of {np.ravel(lengths).tolist()} tokens"
                )
        return inputs
