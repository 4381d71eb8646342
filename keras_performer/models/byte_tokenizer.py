"""One token per byte of text."""

from typing import Any

import keras

from keras_performer.models._load_preset import load_by_name
from keras_performer.models._string_tokenizer import (
    SILENT_TOKENS,
    SPECIAL_TOKENS,
    StringTokenizer,
)
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone

_FIRST_BYTE = len(SPECIAL_TOKENS)


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class ByteTokenizer(StringTokenizer):
    """Split text into the bytes of its UTF-8 encoding: no vocabulary to learn, nothing unknown.

    Use it for character-level models of any language. keras-hub's `ByteTokenizer` has no start, end
    and mask tokens, which packing and masking need, and lower-cases by default. Ids 0 to 4 are
    `<pad>`, `<cls>`, `<eos>`, `<mask>` and `<unk>` (never produced); byte b has the id b + 5. It
    runs without TensorFlow, and as TensorFlow operations inside `tf.data` and `tf.function`.

    **Shapes** One string gives a vector (T,) of int32; a batch gives a list of B lists, or inside
    TensorFlow a ragged tensor (B, T).

    **Args**
        **kwargs: `name` of the layer.

    **Returns** (calling the layer) token ids. `detokenize` replaces bytes that are no UTF-8 by
    U+FFFD.

    **Raises** TypeError for inputs that are not strings.

    **Example**

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer(["Aé"])
    [[70, 200, 174]]
    >>> tokenizer.detokenize([[1, 70, 200, 174, 2, 0]])
    ['Aé']

    **Source** Xue et al. 2022, arXiv 2105.13626, for models of bytes.
    """

    backbone_cls = PerformerEncoderBackbone

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._set_tokens([*SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))])
        special = ["" if token in SILENT_TOKENS else token for token in SPECIAL_TOKENS]
        self._id_to_bytes = [
            *(text.encode() for text in special),
            *(bytes([byte]) for byte in range(256)),
        ]

    def _ids_of(self, text: str) -> list[int]:
        return [byte + _FIRST_BYTE for byte in text.encode("utf-8", errors="surrogateescape")]

    def _text_of(self, ids: list[int]) -> str:
        return b"".join(self._id_to_bytes[i] for i in ids).decode("utf-8", errors="replace")

    def _graph_ids_of(self, inputs: Any) -> Any:
        import tensorflow as tf

        return tf.ragged.map_flat_values(_byte_ids, tf.strings.bytes_split(inputs))

    def _graph_text_of(self, inputs: Any) -> Any:
        import tensorflow as tf

        joined = tf.strings.reduce_join(tf.gather(tf.constant(self._id_to_bytes), inputs), axis=-1)
        return tf.strings.unicode_transcode(joined, "UTF-8", "UTF-8", errors="replace")

    def load_assets(self, dir_path: str) -> None:
        """Check the `vocabulary.txt` of a folder."""
        self._check_assets(dir_path)


def _byte_ids(letters: Any) -> Any:
    import tensorflow as tf

    return tf.cast(tf.reshape(tf.io.decode_raw(letters, tf.uint8), [-1]), "int32") + _FIRST_BYTE
