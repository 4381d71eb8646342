"""Strings to masked token ids."""

import math
from typing import Any

import keras
import keras_hub

from keras_performer.layers._arguments import packed_length, positive_int
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._performer_task import refuse_labels, weigh
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone
from keras_performer.models.protein_tokenizer import ProteinTokenizer


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerMaskedLMPreprocessor(keras_hub.models.MaskedLMPreprocessor):
    """Turn strings into masked inputs and labels for `PerformerMaskedLM`.

    A string becomes `<start> tokens <end>`, cut and padded to `sequence_length`. Of its ordinary
    tokens a random `mask_selection_rate` is selected as labels; each of those is replaced by the
    mask token, by a random token, or left alone. It works on Python strings without TensorFlow,
    and inside `tf.data`.

    **Shapes** One string gives vectors, a batch of B gives matrices: (x, y, sample_weight) with x a
    dict of `token_ids` (B, T), `padding_mask` (B, T) and `mask_positions` (B, P), y (B, P) and
    sample_weight (B, P); T is `sequence_length`, P is the number of label places.

    **Args**
        tokenizer: A tokenizer with start, end, pad and mask tokens, such as `ProteinTokenizer`.
        sequence_length: T, start and end token included. It can be set later.
        mask_selection_rate: Share of the ordinary tokens that is selected.
        mask_selection_length: P. Default: so many that a selection of a full-length string exceeds
            it about once in three million (five standard deviations above the mean); whatever
            exceeds it stays unmasked.
        mask_token_rate: Share of the selected tokens that the mask token replaces.
        random_token_rate: Share of the selected tokens that a random token replaces: any of the
            vocabulary, special ones among them, as in keras-hub.
        **kwargs: `name` of the layer.

    **Returns** (calling the layer) `(x, y, sample_weight)`; the sample weight is 1 at real labels,
    or the one given for the string, and 0 elsewhere.

    **Masking** `padding_mask` is True at the start and end token and all that is between.

    **Raises** ValueError for lengths that are too small, rates that are not shares, a tuple of
    several segments, for labels (the layer makes its own), or for sample weights that are not one
    a string.

    **Example**

    >>> preprocessor = PerformerMaskedLMPreprocessor(ProteinTokenizer(), sequence_length=9)
    >>> x, y, sample_weight = preprocessor("MKTAYIA")
    >>> sorted(x), tuple(x["token_ids"].shape)
    (['mask_positions', 'padding_mask', 'token_ids'], (9,))

    **Source** Devlin et al. 2019, arXiv 1810.04805, section 3.1.
    """

    backbone_cls = PerformerEncoderBackbone
    tokenizer_cls = ProteinTokenizer

    def __init__(
        self,
        tokenizer: Any,
        sequence_length: int = 512,
        mask_selection_rate: float = 0.15,
        mask_selection_length: int | None = None,
        mask_token_rate: float = 0.8,
        random_token_rate: float = 0.1,
        **kwargs: Any,
    ):
        if not 0 < mask_selection_rate <= 1:
            raise ValueError(
                "`mask_selection_rate` must be in (0, 1]. Received: "
                f"mask_selection_rate={mask_selection_rate}"
            )
        if min(mask_token_rate, random_token_rate) < 0 or mask_token_rate + random_token_rate > 1:
            raise ValueError(
                "`mask_token_rate` and `random_token_rate` must be shares whose sum is at most 1. "
                f"Received: mask_token_rate={mask_token_rate}, "
                f"random_token_rate={random_token_rate}"
            )
        if mask_selection_length is not None:
            mask_selection_length = positive_int("mask_selection_length", mask_selection_length)
        super().__init__(
            tokenizer,
            sequence_length=sequence_length,
            mask_selection_rate=mask_selection_rate,
            mask_selection_length=mask_selection_length,
            mask_token_rate=mask_token_rate,
            random_token_rate=random_token_rate,
            **kwargs,
        )

    @property
    def sequence_length(self) -> int:
        """The length T of the packed token ids."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int) -> None:
        self._sequence_length = packed_length(value)
        if self.packer is not None:
            self.packer.sequence_length = self._sequence_length

    def build(self, input_shape: Any) -> None:
        """Create the packer, now that the tokenizer has its vocabulary."""
        self.packer = keras_hub.layers.StartEndPacker(
            sequence_length=self.sequence_length,
            start_value=self.tokenizer.start_token_id,
            end_value=self.tokenizer.end_token_id,
            pad_value=self.tokenizer.pad_token_id,
            return_padding_mask=True,
        )

    def _make_masker(self) -> keras_hub.layers.MaskedLMMaskGenerator:
        # Made at each call, because its number of places follows `sequence_length`.
        return keras_hub.layers.MaskedLMMaskGenerator(
            vocabulary_size=self.tokenizer.vocabulary_size(),
            mask_selection_rate=self.mask_selection_rate,
            mask_token_id=self.tokenizer.mask_token_id,
            mask_selection_length=self.mask_selection_length or self._default_selection_length(),
            unselectable_token_ids=self.tokenizer.special_token_ids,
            mask_token_rate=self.mask_token_rate,
            random_token_rate=self.random_token_rate,
        )

    def _default_selection_length(self) -> int:
        count, rate = self.sequence_length - 2, self.mask_selection_rate
        return min(count, math.ceil(count * rate + 5 * math.sqrt(count * rate * (1 - rate))))

    def call(self, x: Any, y: Any = None, sample_weight: Any = None) -> Any:
        """Tokenize, pack and mask strings.

        **Args**
            x: A string, a batch of strings, or a tuple that holds one of them.
            y: None.
            sample_weight: A weight for each string, or None.

        **Returns** `(x, y, sample_weight)`.
        """
        refuse_labels(y)
        if isinstance(x, tuple):
            if len(x) != 1:
                raise ValueError(
                    "PerformerMaskedLMPreprocessor takes one sequence a sample: join the segments "
                    "first, or pass a batch as a list. Received: a tuple of "
                    f"{len(x)} segments"
                )
            (x,) = x
        token_ids, padding_mask = self.packer(self.tokenizer(x))
        masked = self._make_masker()(token_ids)
        return (
            {
                "token_ids": masked["token_ids"],
                "padding_mask": padding_mask,
                "mask_positions": masked["mask_positions"],
            },
            masked["mask_ids"],
            weigh(self, masked["mask_weights"], sample_weight),
        )

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        config = super().get_config()
        # How segments share the length: this layer has one segment.
        del config["truncate"]
        return config
