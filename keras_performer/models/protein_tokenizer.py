"""One token per amino acid."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_performer.models._load_preset import load_by_name
from keras_performer.models._string_tokenizer import (
    SPECIAL_TOKENS,
    VOCABULARY_FILE,
    StringTokenizer,
)
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone

# The 20 standard amino acids, then X (any), B (D or N), U (selenocysteine), Z (E or Q) and
# O (pyrrolysine).
RESIDUES = "ACDEFGHIKLMNPQRSTVWYXBUZO"

_NUM_CODES = 128


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class ProteinTokenizer(StringTokenizer):
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
        super().__init__(**kwargs)
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
        self._set_tokens(tokens)
        # The id of every code point; the last place stands for all beyond ASCII.
        unknown = self._ids["<unk>"]
        self._code_to_id = np.array(
            [self._ids.get(chr(code).upper(), unknown) for code in range(_NUM_CODES)] + [unknown],
            "int32",
        )

    def _ids_of(self, text: str) -> list[int]:
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
        return self._code_to_id[np.minimum(codes, _NUM_CODES)].tolist()

    def _graph_ids_of(self, inputs: Any) -> Any:
        import tensorflow as tf

        codes = tf.strings.unicode_decode(inputs, "UTF-8")
        return tf.gather(tf.constant(self._code_to_id), tf.minimum(codes, _NUM_CODES))

    def load_assets(self, dir_path: str) -> None:
        """Read `vocabulary.txt` from a folder."""
        self.set_vocabulary(Path(dir_path) / VOCABULARY_FILE)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        standard = self._tokens == (*SPECIAL_TOKENS, *RESIDUES)
        return {**super().get_config(), "vocabulary": None if standard else list(self._tokens)}
