"""One token per run of k nucleotides."""

import itertools
from typing import Any

import keras
import numpy as np

from keras_performer.layers._arguments import positive_int
from keras_performer.models._load_preset import load_by_name
from keras_performer.models._string_tokenizer import (
    SPECIAL_TOKENS,
    StringTokenizer,
)
from keras_performer.models.performer_encoder_backbone import PerformerEncoderBackbone

NUCLEOTIDES = "ACGT"
_LONGEST_K = 8
_NUM_CODES = 128


@load_by_name
@keras.saving.register_keras_serializable(package="keras_performer")
class DNATokenizer(StringTokenizer):
    """Split DNA into k-mers: one token for each k nucleotides.

    Lower case counts as upper case. A k-mer that holds any letter but A, C, G and T becomes
    `<unk>`. With a `stride` of k, the default, what is left at the end is split into single
    nucleotides, so `detokenize` gives the string back. A smaller stride makes k-mers overlap: one
    token for each `stride` nucleotides, each of which sees k of them. It runs without TensorFlow,
    and as TensorFlow operations inside `tf.data` and `tf.function`.

    **Shapes** One string gives a vector of int32; a batch gives a list of vectors, or inside
    TensorFlow a ragged tensor. A string of L nucleotides has L // k + L % k tokens, or with a
    smaller stride 1 + (L - k) // stride (none if L < k).

    **Args**
        k: Length of a k-mer, from 1 to 8.
        stride: Distance between the starts of two k-mers, from 1 to k. Default: k.
        **kwargs: `name` of the layer.

    **Returns** (calling the layer) token ids. Ids 0 to 4 are `<pad>`, `<cls>`, `<eos>`, `<mask>`
    and `<unk>`, then come A, C, G, T and, if k > 1, the 4^k k-mers in alphabetical order.

    **Raises** ValueError for sizes that cannot be, and for detokenizing k-mers that overlap;
    TypeError for inputs that are not strings.

    **Example**

    >>> tokenizer = DNATokenizer(k=2)
    >>> tokenizer(["ACgtA", "NA"])
    [[10, 20, 5], [4]]
    >>> tokenizer.detokenize([[1, 10, 20, 5, 2, 0]])
    ['ACGTA']

    **Source** Ji et al. 2021, DNABERT, doi 10.1093/bioinformatics/btab083, for overlapping k-mers;
    Dalla-Torre et al. 2023, Nucleotide Transformer, for k-mers side by side.
    """

    backbone_cls = PerformerEncoderBackbone

    def __init__(self, k: int = 6, stride: int | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.k = positive_int("k", k)
        self.stride = self.k if stride is None else positive_int("stride", stride)
        if self.k > _LONGEST_K or self.stride > self.k:
            raise ValueError(
                f"`k` must be at most {_LONGEST_K}, for a vocabulary of 4^k, and `stride` at most "
                f"`k`. Received: k={k}, stride={stride}"
            )
        kmers = []
        if self.k > 1:
            kmers = ["".join(letters) for letters in itertools.product(NUCLEOTIDES, repeat=self.k)]
        self._set_tokens([*SPECIAL_TOKENS, *NUCLEOTIDES, *kmers])
        self._unknown = self._ids["<unk>"]
        self._first_kmer = self._ids[NUCLEOTIDES[0] * self.k]
        # The digit of every code point, or -1; the last place stands for all beyond ASCII.
        self._digits = np.full(_NUM_CODES + 1, -1, "int32")
        for digit, letter in enumerate(NUCLEOTIDES):
            self._digits[[ord(letter), ord(letter.lower())]] = digit
        self._powers = 4 ** np.arange(self.k - 1, -1, -1, dtype="int32")

    def _ids_of(self, text: str) -> list[int]:
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), "<u4")
        digits = self._digits[np.minimum(codes, _NUM_CODES)]
        count = max(0, 1 + (len(digits) - self.k) // self.stride)
        starts = np.arange(count) * self.stride
        windows = digits[starts[:, None] + np.arange(self.k)]
        ids = np.where(
            (windows >= 0).all(-1), self._first_kmer + windows @ self._powers, self._unknown
        )
        if self.stride < self.k:
            return ids.tolist()
        rest = digits[count * self.k :]
        singles = np.where(rest >= 0, self._ids[NUCLEOTIDES[0]] + rest, self._unknown)
        return [*ids.tolist(), *singles.tolist()]

    def _text_of(self, ids: list[int]) -> str:
        self._check_detokenize()
        return super()._text_of(ids)

    def _check_detokenize(self) -> None:
        if self.stride < self.k:
            raise ValueError(
                "K-mers that overlap cannot be joined without knowing where strings were cut. Use "
                f"a stride of k. Received: k={self.k}, stride={self.stride}"
            )

    def _graph_ids_of(self, inputs: Any) -> Any:
        import tensorflow as tf

        inputs = tf.convert_to_tensor(inputs)
        if inputs.shape.rank == 0:
            return self._graph_ids_of_one(inputs)
        if inputs.shape.rank != 1:
            raise ValueError(
                "Inside TensorFlow graphs DNATokenizer takes a string or a vector of strings. "
                f"Received: inputs of shape {inputs.shape}"
            )
        return tf.map_fn(
            self._graph_ids_of_one,
            inputs,
            fn_output_signature=tf.RaggedTensorSpec((None,), "int32", ragged_rank=0),
        )

    def _graph_ids_of_one(self, text: Any) -> Any:
        import tensorflow as tf

        codes = tf.strings.unicode_decode(text, "UTF-8")
        digits = tf.gather(tf.constant(self._digits), tf.minimum(codes, _NUM_CODES))
        windows = tf.signal.frame(digits, self.k, self.stride)
        ids = self._first_kmer + tf.reduce_sum(windows * self._powers, -1)
        ids = tf.where(tf.reduce_all(windows >= 0, -1), ids, self._unknown)
        if self.stride < self.k:
            return ids
        rest = digits[tf.shape(windows)[0] * self.k :]
        singles = tf.where(rest >= 0, self._ids[NUCLEOTIDES[0]] + rest, self._unknown)
        return tf.concat([ids, singles], 0)

    def _graph_text_of(self, inputs: Any) -> Any:
        self._check_detokenize()
        return super()._graph_text_of(inputs)

    def load_assets(self, dir_path: str) -> None:
        """Check the `vocabulary.txt` of a folder."""
        self._check_assets(dir_path)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {**super().get_config(), "k": self.k, "stride": self.stride}
