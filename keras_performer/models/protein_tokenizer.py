"""One token per amino acid."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np

from keras_performer.models._load_preset import load_by_name
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone

VOCABULARY_FILE = "vocabulary.txt"
SPECIAL_TOKENS = ("<pad>", "<cls>", "<eos>", "<mask>", "<unk>")
# The 20 standard amino acids, then X (any), B (D or N), U (selenocysteine), Z (E or Q) and
# O (pyrrolysine).
RESIDUES = "ACDEFGHIKLMNPQRSTVWYXBUZO"

_NUM_CODES = 128


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class ProteinTokenizer(keras_hub.tokenizers.Tokenizer):
    """Split protein sequences into one token per residue.

    Every character becomes one token, so token i is residue i; lower case counts as upper case, and
    a character outside the vocabulary becomes `<unk>`. It runs on Python strings without
    TensorFlow, and as TensorFlow operations inside `tf.data` and `tf.function`. It adds no special
    tokens: the preprocessor does.

    **Shapes** One string gives a vector (T,) of int32; a batch gives a list of B lists, or inside
    TensorFlow a ragged tensor (B, T).

    **Args**
        vocabulary: A list of tokens, or the path of a text file with one token a line. It holds
            the special tokens `<pad>`, `<cls>`, `<eos>`, `<mask>` and `<unk>`; any other token is
            one ASCII character, not a lower-case letter. Default: the special tokens, the 20 amino
            acids and X, B, U, Z, O.
        **kwargs: `name` of the layer.

    **Returns** (calling the layer) token ids.

    **Raises** ValueError for a vocabulary that does not fit the description above; TypeError for
    inputs that are not strings.

    **Example**

    >>> tokenizer = ProteinTokenizer()
    >>> tokenizer(["ACD", "m?"])
    [[5, 6, 7], [15, 4]]
    >>> tokenizer.detokenize([[1, 5, 6, 7, 2, 0], [15, 3]])
    ['ACD', 'M<mask>']

    **Source** The letters are those of the IUPAC-IUB one-letter code for amino acids.
    """

    backbone_cls = PerformerEncoderBackbone

    def __init__(
        self, vocabulary: Sequence[str] | str | os.PathLike[str] | None = None, **kwargs: Any
    ):
        super().__init__(**{"dtype": "int32", **kwargs})
        self.file_assets = [VOCABULARY_FILE]
        for token, name in (
            ("<cls>", "start_token"),
            ("<eos>", "end_token"),
            ("<pad>", "pad_token"),
            ("<mask>", "mask_token"),
            ("<unk>", "unk_token"),
        ):
            self._add_special_token(token, name)
        self.set_vocabulary(vocabulary if vocabulary is not None else (*SPECIAL_TOKENS, *RESIDUES))

    def set_vocabulary(self, vocabulary: Sequence[str] | str | os.PathLike[str]) -> None:
        """Replace the vocabulary by a list of tokens, or by a text file with one token a line."""
        source = ""
        if isinstance(vocabulary, str | os.PathLike):
            source = f" in {os.fspath(vocabulary)!r}"
            vocabulary = Path(vocabulary).read_text(encoding="utf-8").splitlines()
        tokens = [str(token) for token in vocabulary]
        missing = [token for token in SPECIAL_TOKENS if token not in tokens]
        wrong = [
            token
            for token in tokens
            if token not in SPECIAL_TOKENS
            and not (len(token) == 1 and token.isascii() and token == token.upper())
        ]
        if missing or wrong or len(set(tokens)) != len(tokens):
            raise ValueError(
                f"The vocabulary{source} must hold each of {', '.join(SPECIAL_TOKENS)}, and beside "
                "them distinct ASCII characters that are not lower-case letters. Received: "
                f"{len(tokens)} tokens, {len(tokens) - len(set(tokens))} of them repeated; "
                f"missing={missing}; not a single such character={wrong}"
            )
        self._tokens = tuple(tokens)
        self._ids = {token: i for i, token in enumerate(tokens)}
        # The id of every code point; the last place stands for all beyond ASCII.
        unknown = self._ids["<unk>"]
        self._code_to_id = np.array(
            [self._ids.get(chr(code).upper(), unknown) for code in range(_NUM_CODES)] + [unknown],
            "int32",
        )
        silent = ("<pad>", "<cls>", "<eos>")
        self._id_to_text = tuple("" if token in silent else token for token in tokens)
        self._update_special_token_ids()

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
        """
        if self._use_tf_workflow():
            import tensorflow as tf

            codes = tf.strings.unicode_decode(inputs, "UTF-8")
            return tf.gather(tf.constant(self._code_to_id), tf.minimum(codes, _NUM_CODES))
        ids = self._encode(inputs)
        return np.array(ids, "int32") if not ids or isinstance(ids[0], int) else ids

    def _encode(self, inputs: Any) -> list[Any]:
        if isinstance(inputs, bytes):
            inputs = inputs.decode("utf-8", errors="replace")
        if isinstance(inputs, str):
            codes = np.frombuffer(inputs.encode("utf-32-le", errors="replace"), "<u4")
            return self._code_to_id[np.minimum(codes, _NUM_CODES)].tolist()
        if isinstance(inputs, list | tuple):
            return [self._encode(item) for item in inputs]
        array = np.asarray(inputs)
        if array.dtype.kind not in "USO":
            raise TypeError(
                "ProteinTokenizer takes strings, or lists or arrays of strings. Received: "
                f"inputs={inputs!r}"
            )
        return self._encode(array.tolist())

    def detokenize(self, inputs: Any) -> Any:
        """Turn token ids into strings.

        **Args**
            inputs: Ids, in lists, arrays or tensors of any rank.

        **Returns** A string, or nested lists of strings. `<pad>`, `<cls>` and `<eos>` are left
        out; `<mask>` and `<unk>` are spelled out.

        **Raises** ValueError for an id outside the vocabulary.
        """
        if self._use_tf_workflow():
            import tensorflow as tf

            return tf.strings.reduce_join(tf.gather(tf.constant(self._id_to_text), inputs), axis=-1)
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
        self._check_ids(ids)
        return "".join(self._id_to_text[i] for i in ids)

    def _check_ids(self, ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < len(self._tokens):
            raise ValueError(
                f"Token ids must be at least 0 and below {len(self._tokens)}. Received: ids from "
                f"{min(ids)} to {max(ids)}"
            )

    def save_assets(self, dir_path: str) -> None:
        """Write `vocabulary.txt` into a folder."""
        text = "".join(f"{token}\n" for token in self._tokens)
        (Path(dir_path) / VOCABULARY_FILE).write_text(text, encoding="utf-8")

    def load_assets(self, dir_path: str) -> None:
        """Read `vocabulary.txt` from a folder."""
        self.set_vocabulary(Path(dir_path) / VOCABULARY_FILE)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        standard = self._tokens == (*SPECIAL_TOKENS, *RESIDUES)
        return {**super().get_config(), "vocabulary": None if standard else list(self._tokens)}
