"""The generative language model."""

from typing import Any

import keras
import keras_hub

from keras_performer.layers._arguments import check_known
from keras_performer.models._generation import compile_config, generate_step
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_task import (
    check_parts,
    compile_as_saved,
    take_loaders,
    token_loss,
)
from keras_performer.models.performer_causal_lm_preprocessor import PerformerCausalLMPreprocessor
from keras_performer.models.performer_decoder_backbone import PerformerDecoderBackbone


@load_by_name
@take_loaders
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerCausalLM(keras_hub.models.CausalLM):
    """A Performer decoder that predicts the next token, and generates in constant memory.

    With a `preprocessor`, `fit`, `evaluate` and `predict` take raw strings, from the same sources
    and with the same `sample_weight` as those of `PerformerMaskedLM`, and `generate` turns prompts
    into strings with any keras-hub sampler (`compile(sampler="top_k")`). Generation reads the
    prompts up to the shortest one's end in one pass, then takes one token at a time. What it
    carries from token to token is the state of the attention, whose size depends neither on the
    position nor on the longest length: with a key-value cache it would grow with both.

    **Shapes** Inputs: a dict of `token_ids` and `padding_mask`, both integers (B, T). Output:
    logits (B, T, vocabulary_size).

    **Args**
        backbone: A `PerformerDecoderBackbone`.
        preprocessor: A `PerformerCausalLMPreprocessor`, or None if inputs come prepared.
        **kwargs: `name` of the model, and `compile=False` to leave it uncompiled.

    **Returns** (calling the model) logits of the token that follows each place.

    **Masking** As in `PerformerDecoderBackbone`. Prompts in one batch may differ in length.

    **Precision** As the backbone's dtype policy; samplers work in float32.

    **Cost** The backbone's, and O(T D vocabulary_size). A generated token costs the same at every
    position.

    **Raises** TypeError for another backbone; ValueError if it has fewer tokens than the tokenizer.

    **Example**

    >>> backbone = PerformerDecoderBackbone(
    ...     vocabulary_size=30, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=16
    ... )
    >>> preprocessor = PerformerCausalLMPreprocessor(ProteinTokenizer(), sequence_length=12)
    >>> model = PerformerCausalLM(backbone, preprocessor)
    >>> model.compile(sampler="greedy", run_eagerly=True)
    >>> model.generate(["MKT", "M"], max_length=8)[0][:3]
    'MKT'

    **Source** Choromanski et al. 2021, arXiv 2009.14794, for the attention; Katharopoulos et al.
    2020, arXiv 2006.16236, section 3.4, for generation with a fixed-size state.
    """

    backbone_cls = PerformerDecoderBackbone
    preprocessor_cls = PerformerCausalLMPreprocessor

    def __init__(
        self,
        backbone: PerformerDecoderBackbone,
        preprocessor: PerformerCausalLMPreprocessor | None = None,
        **kwargs: Any,
    ):
        check_known(self, kwargs, "name", "trainable", "compile")
        check_parts("PerformerCausalLM", backbone, preprocessor, PerformerDecoderBackbone)

        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        hidden = backbone(backbone.input)
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
    generate_step = generate_step

    def initial_state(self, batch_size: Any, max_length: int | None = None) -> list[dict[str, Any]]:
        """The state before the first token; see `PerformerDecoderBackbone.initial_state`."""
        return self.backbone.initial_state(batch_size, max_length)

    def call_with_state(
        self, inputs: dict[str, Any], state: list[dict[str, Any]]
    ) -> tuple[Any, Any, list[dict[str, Any]]]:
        """Predict over the next tokens of a stream: one token, or a chunk.

        **Args**
            inputs: A dict of `token_ids` and `padding_mask` (B, T), of any length T.
            state: From `initial_state` or an earlier call.

        **Returns** The logits (B, T, vocabulary_size), the hidden states (B, T, D) and the state
        after these tokens. Chunks in a row give what one call on all of them gives.

        **Raises** ValueError as `PerformerDecoderBackbone.call_with_state` does, which also tells
        what learned positions do with longer streams.
        """
        hidden, state = self.backbone.call_with_state(inputs, state)
        return self.backbone.token_embedding(hidden, reverse=True), hidden, state
