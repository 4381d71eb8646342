"""What our tokenizers share: strings of any nesting, on Python and as TensorFlow operations."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_performer.models.performer_decoder_backbone import PerformerDecoderBackbone
from keras_performer.models.performer_seq_2_seq_backbone import PerformerSeq2SeqBackbone

SPECIAL_TOKENS = ("<pad>", "<cls>", "<eos>", "<mask>", "<unk>")
VOCABULARY_FILE = "vocabulary.txt"
SILENT_TOKENS = ("<pad>", "<cls>", "<eos>")
"""Those that a packer adds, and that strings do not show."""


def add_special_tokens(tokenizer: Any) -> None:
    """Tell a keras-hub tokenizer, before it has its vocabulary, which tokens are special."""
    names = ("pad_token", "start_token", "end_token", "mask_token", "unk_token")
    for token, name in zip(SPECIAL_TOKENS, names, strict=True):
        tokenizer._add_special_token(token, name)


class StringTokenizer(keras_hub.tokenizers.Tokenizer):
    """The abstract tokenizer of Python strings, without TensorFlow unless inside its graphs.

    A subclass calls `_set_tokens` and defines `_ids_of` and `_graph_ids_of`, and how ids become a
    string where that is not their tokens in a row.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**{"dtype": "int32", **kwargs})
        # Else a task cannot be quantized before its tokenizer was first called.
        self.built = True
        self.file_assets = [VOCABULARY_FILE]
        add_special_tokens(self)

    def _set_tokens(self, tokens: Sequence[str]) -> None:
        self._tokens = tuple(tokens)
        self._ids = {token: i for i, token in enumerate(self._tokens)}
        self._id_to_text = ["" if token in SILENT_TOKENS else token for token in self._tokens]
        self._update_special_token_ids()

    def _ids_of(self, text: str) -> list[int]:
        """The ids of one string."""
        raise NotImplementedError

    def _text_of(self, ids: list[int]) -> str:
        """The string of ids that are in the vocabulary."""
        return "".join(self._id_to_text[i] for i in ids)

    def _graph_ids_of(self, inputs: Any) -> Any:
        """The ids of a TensorFlow tensor of strings, ragged in the last axis."""
        raise NotImplementedError

    def _graph_text_of(self, inputs: Any) -> Any:
        """The strings of a TensorFlow tensor of ids, dense or ragged."""
        import tensorflow as tf

        return tf.strings.reduce_join(tf.gather(tf.constant(self._id_to_text), inputs), axis=-1)

    def vocabulary_size(self) -> int:
        """Return the number of token ids."""
        return len(self._tokens)

    def get_vocabulary(self) -> list[str]:
        """Return the tokens in the order of their ids."""
        return list(self._tokens)

    def id_to_token(self, id: int) -> str:
        """Return the token of an id, or raise ValueError if there is none."""
        if not 0 <= id < len(self._tokens):
            raise ValueError(
                f"`id` must be at least 0 and below {len(self._tokens)}. Received: id={id}"
            )
        return self._tokens[id]

    def token_to_id(self, token: str) -> int:
        """Return the id of a token; that of `<unk>` if it is not in the vocabulary."""
        return self._ids.get(token, self._ids["<unk>"])

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Tokenize; see `tokenize`."""
        return self.tokenize(inputs)

    def tokenize(self, inputs: Any) -> Any:
        """Turn strings into token ids.

        **Args**
            inputs: A string, or strings in a list, a NumPy array or a TensorFlow tensor.

        **Returns** For one string a vector of ids; else lists of ids, nested as the strings were.
        In TensorFlow graphs, a tensor that is ragged in its last axis.

        **Raises** TypeError for anything that is no string, such as None.
        """
        if self._use_tf_workflow():
            return self._graph_ids_of(inputs)
        ids = self._encode(inputs)
        return np.array(ids, "int32") if not ids or isinstance(ids[0], int) else ids

    def _encode(self, inputs: Any) -> list[Any]:
        if isinstance(inputs, bytes):
            # Bytes that are no UTF-8 stay distinct, and can be encoded again.
            inputs = inputs.decode("utf-8", errors="surrogateescape")
        if isinstance(inputs, str):
            return self._ids_of(inputs)
        if isinstance(inputs, list | tuple):
            return [self._encode(item) for item in inputs]
        array = np.asarray(inputs)
        items = array.tolist()
        # An array of objects without an axis may hold anything, such as None.
        if array.dtype.kind not in "USO" or not isinstance(items, list | str | bytes):
            raise TypeError(
                f"{type(self).__name__} takes strings, or lists or arrays of strings. Received: "
                f"inputs={inputs!r}"
            )
        return self._encode(items)

    def detokenize(self, inputs: Any) -> Any:
        """Turn token ids into strings.

        **Args**
            inputs: Ids, in lists, arrays or tensors of any rank.

        **Returns** A string, or nested lists of strings. `<pad>`, `<cls>` and `<eos>` are left
        out; `<mask>` and `<unk>` are spelled out.

        **Raises** ValueError for an id outside the vocabulary.
        """
        if self._use_tf_workflow():
            return self._graph_text_of(inputs)
        if not isinstance(inputs, list | tuple):
            if callable(to_list := getattr(inputs, "to_list", None)):  # a ragged tensor
                return self._decode(to_list())
            if keras.ops.is_tensor(inputs):
                inputs = keras.ops.convert_to_numpy(inputs)
            inputs = np.asarray(inputs).tolist()
        return self._decode(inputs)

    def _decode(self, ids: Any) -> Any:
        ids = ids.tolist() if isinstance(ids, np.ndarray) else ids
        if ids and isinstance(ids[0], list | tuple | np.ndarray):
            return [self._decode(row) for row in ids]
        if ids and not 0 <= min(ids) <= max(ids) < len(self._tokens):
            raise ValueError(
                f"Token ids must be at least 0 and below {len(self._tokens)}. Received: ids from "
                f"{min(ids)} to {max(ids)}"
            )
        return self._text_of([int(i) for i in ids])

    def save_assets(self, dir_path: str) -> None:
        """Write `vocabulary.txt`, one token a line, into a folder."""
        text = "".join(f"{token}\n" for token in self._tokens)
        (Path(dir_path) / VOCABULARY_FILE).write_text(text, encoding="utf-8")

    def _check_assets(self, dir_path: str) -> None:
        """For a vocabulary that follows from the config: the file must be the same."""
        path = Path(dir_path) / VOCABULARY_FILE
        if tuple(path.read_text(encoding="utf-8").splitlines()) != self._tokens:
            raise ValueError(
                f"{path} is not the vocabulary of {type(self).__name__}, which follows from its "
                "config. Write the preset again with `save_to_preset`."
            )


# Our tokenizers go with every backbone, and each of them names the encoder as its own. keras-hub
# reads the tokenizer of a preset only if it knows one that names the preset's backbone.


@keras.saving.register_keras_serializable(package="keras_performer")
class DecoderTokenizer(StringTokenizer):
    """By it `keras_hub.tokenizers.Tokenizer.from_preset` reads the tokenizers of decoders."""

    backbone_cls = PerformerDecoderBackbone


@keras.saving.register_keras_serializable(package="keras_performer")
class Seq2SeqTokenizer(StringTokenizer):
    """The same for encoder-decoders."""

    backbone_cls = PerformerSeq2SeqBackbone
