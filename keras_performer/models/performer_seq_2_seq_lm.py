"""The generative encoder-decoder model."""

from typing import Any

import keras
import keras_hub
import numpy as np

from keras_performer.layers._arguments import check_known
from keras_performer.models._generation import compile_config, generate_tokens
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_task import (
    check_parts,
    compile_as_saved,
    take_loaders,
    token_loss,
)
from keras_performer.models.performer_seq_2_seq_backbone import PerformerSeq2SeqBackbone
from keras_performer.models.performer_seq_2_seq_lm_preprocessor import (
    PerformerSeq2SeqLMPreprocessor,
)


@load_by_name
@take_loaders
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerSeq2SeqLM(keras_hub.models.Seq2SeqLM):
    """A Performer encoder-decoder that predicts the next token of the target.

    With a `preprocessor`, `fit` takes dicts of `encoder_text` and `decoder_text`, from the same
    sources and with the same `sample_weight` as `PerformerMaskedLM`, and `generate` turns source
    strings, or such dicts with a prompt for the decoder, into target strings with any keras-hub
    sampler. The source is encoded once; from token to token the decoder carries a state and a
    memory of the source, both of a fixed size (feature attention).

    **Shapes** Inputs: as `PerformerSeq2SeqBackbone`. Output: logits (B, T, vocabulary_size).

    **Args**
        backbone: A `PerformerSeq2SeqBackbone`.
        preprocessor: A `PerformerSeq2SeqLMPreprocessor`, or None if inputs come prepared.
        **kwargs: `name` of the model, and `compile=False` to leave it uncompiled.

    **Returns** (calling the model) logits of the token that follows each place of the decoder.

    **Masking** As in `PerformerSeq2SeqBackbone`. Sources and prompts may differ in length.

    **Precision** As the backbone's dtype policy; samplers work in float32.

    **Cost** The backbone's, and O(T D vocabulary_size).

    **Raises** TypeError for another backbone; ValueError if it has fewer tokens than the tokenizer.

    **Example**

    >>> backbone = PerformerSeq2SeqBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> model = PerformerSeq2SeqLM(backbone)
    >>> ids = np.ones((2, 5), "int32")
    >>> x = {f"{side}_{name}": ids for side in ("encoder", "decoder")
    ...      for name in ("token_ids", "padding_mask")}
    >>> tuple(model(x).shape)
    (2, 5, 30)

    **Source** Vaswani et al. 2017, arXiv 1706.03762; Choromanski et al. 2021, arXiv 2009.14794.
    """

    backbone_cls = PerformerSeq2SeqBackbone
    preprocessor_cls = PerformerSeq2SeqLMPreprocessor

    def __init__(
        self,
        backbone: PerformerSeq2SeqBackbone,
        preprocessor: PerformerSeq2SeqLMPreprocessor | None = None,
        **kwargs: Any,
    ):
        check_known(self, kwargs, "name", "trainable", "compile")
        check_parts("PerformerSeq2SeqLM", backbone, preprocessor, PerformerSeq2SeqBackbone)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        hidden = backbone(backbone.input)["decoder_sequence_output"]
        outputs = backbone.token_embedding(hidden, reverse=True)
        super().__init__(inputs=backbone.input, outputs=outputs, **kwargs)

    def get_compile_config(self) -> dict[str, Any]:
        """Return how the model was compiled, with its sampler."""
        return compile_config(super().get_compile_config(), self.sampler)

    def compile(self, optimizer: Any = "auto", loss: Any = "auto", **kwargs: Any) -> None:
        """Compile as keras-hub does; the "auto" loss is the mean over the predicted tokens."""
        if isinstance(loss, str) and loss == "auto":
            loss = token_loss()
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    compile_from_config = compile_as_saved
    _strips_prompt = False

    def generate(
        self,
        inputs: Any,
        max_length: int | None = None,
        stop_token_ids: Any = "auto",
        strip_prompt: bool = False,
    ) -> Any:
        """Generate a target for each source.

        **Args**
            inputs: With a preprocessor source strings, or a dict of `encoder_text` and, if there
                are prompts, `decoder_text`; without one, inputs as the model's. Also `tf.data` of
                these.
            max_length: The length T at which generation ends, of prompt and target together; None
                for the preprocessor's.
            stop_token_ids: Tokens that end a row, None to go on to T, or "auto" for the tokenizer's
                end token.
            strip_prompt: Whether to leave out the decoder's prompt.

        **Returns** Target strings, or without a preprocessor a dict of `decoder_token_ids` and
        `decoder_padding_mask` (B, T).

        **Raises** ValueError for "auto" without a preprocessor.
        """
        inputs = dict(inputs) if isinstance(inputs, dict) else inputs  # keras-hub fills it anew
        self._strips_prompt = strip_prompt
        try:
            return super().generate(inputs, max_length, stop_token_ids)
        finally:
            self._strips_prompt = False

    def make_generate_function(self) -> Any:
        """Return the compiled `generate_step`."""
        generate = super().make_generate_function()
        if not self._strips_prompt:
            return generate

        # keras-hub's own strips inputs of decoders alone.
        def generate_stripped(inputs: dict[str, Any], stop_token_ids: Any = None) -> dict[str, Any]:
            outputs = generate(inputs, stop_token_ids=stop_token_ids)
            token_ids, mask, prompt = (
                np.asarray(keras.ops.convert_to_numpy(x[f"decoder_{name}"]))
                for x, name in (
                    (outputs, "token_ids"),
                    (outputs, "padding_mask"),
                    (inputs, "padding_mask"),
                )
            )
            mask = np.logical_and(mask, np.logical_not(prompt))
            first = np.argsort(~mask, axis=1, kind="stable")
            return {
                "decoder_token_ids": np.take_along_axis(token_ids, first, axis=1),
                "decoder_padding_mask": np.take_along_axis(mask, first, axis=1),
            }

        return generate_stripped

    def generate_step(self, inputs: dict[str, Any], stop_token_ids: Any = None) -> dict[str, Any]:
        """Generate after a batch of prompts; the compiled part of `generate`.

        **Args**
            inputs: As the model's, where the decoder's are prompts, padded on the right to the
                length T at which generation ends.
            stop_token_ids: Tokens that stop a row, or None to always go on to T.

        **Returns** A dict of `decoder_token_ids` and `decoder_padding_mask` (B, T); the mask ends
        after the first token that stops a row.
        """
        source_mask = inputs["encoder_padding_mask"]
        encoded = self.backbone.encode(inputs["encoder_token_ids"], source_mask)
        length = inputs["decoder_token_ids"].shape[1]

        def read(token_ids: Any, mask: Any, state: Any) -> tuple[Any, Any, Any]:
            hidden, state = self.backbone.call_with_state(
                {"decoder_token_ids": token_ids, "decoder_padding_mask": mask}, state
            )
            return self.backbone.token_embedding(hidden, reverse=True), hidden, state

        token_ids, padding_mask = generate_tokens(
            self,
            read,
            inputs["decoder_token_ids"],
            inputs["decoder_padding_mask"],
            self.backbone.initial_state(encoded, source_mask, length),
            stop_token_ids,
        )
        return {"decoder_token_ids": token_ids, "decoder_padding_mask": padding_mask}
