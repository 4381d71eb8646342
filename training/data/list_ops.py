"""ListOps of the Long Range Arena: nested operations on digits, whose result is to be told.

`[MAX 4 3 [MIN 2 3 ] 1 [MED 1 5 8 ] ]` has the result 5. The ten classes are the digits.

**Source** Nangia and Bowman 2018 (arXiv 1804.06028) for the task, Tay et al. 2021
(arXiv 2011.04006) for the long version. Its script draws from Python's generator without a seed;
here the same distribution comes from the raw bits of NumPy's PCG64, which are the same on every
machine and in every version of NumPy. The brackets stay in the input: an early version of the
arena lost them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.data.examples import SPLITS
from training.data.registry import cache_folder, replacing

WORDS = ("[MIN", "[MAX", "[MED", "[SM", "]", *map(str, range(10)))
VOCABULARY = ("<pad>", *WORDS, "<cls>", "<eos>", "<mask>")
_OPERATORS = 4
_CLOSE = 5
_DIGIT_0 = 6

# The published settings.
COUNTS = {"train": 96_000, "validation": 2_000, "test": 2_000}
MAX_DEPTH = 10
MIN_ARGUMENTS, MAX_ARGUMENTS = 2, 10
# An example is longer than the first and shorter than the second.
LENGTH_BOUNDS = (500, 2000)

# Trees drawn at a time; another number gives other examples.
_BATCH = 1024


@dataclass(frozen=True, slots=True)
class ListOps:
    """Examples of different lengths, one after the other.

    **Args**
        tokens: (S,) uint8, indices of `WORDS` in `VOCABULARY`.
        offsets: (N + 1,) int64, example i is `tokens[offsets[i] : offsets[i + 1]]`.
        labels: (N,) uint8, the results.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        """Return the number of examples, N."""
        return len(self.labels)

    def __getitem__(self, index: int) -> np.ndarray:
        """Return the tokens of an example."""
        first, end = self.offsets[index], self.offsets[index + 1]
        return self.tokens[first:end]


class ListOpsTokenizer:
    """What recipes ask of a tokenizer, for examples that come as tokens."""

    pad_token_id = VOCABULARY.index("<pad>")
    start_token_id = VOCABULARY.index("<cls>")
    end_token_id = VOCABULARY.index("<eos>")
    mask_token_id = VOCABULARY.index("<mask>")
    special_token_ids = (pad_token_id, start_token_id, end_token_id, mask_token_id)

    def vocabulary_size(self) -> int:
        """Return the number of token ids."""
        return len(VOCABULARY)

    def tokenize(self, example: np.ndarray) -> np.ndarray:
        """Return the tokens of an example, which it is."""
        return example


def load_list_ops(seed: int = 0) -> dict[str, ListOps]:
    """Read the splits of the published sizes, generated in the first call.

    **Args**
        seed: Other examples for each.

    **Returns** `train` (96,000 examples), `validation` and `test` (2,000 each).

    **Example**

    >>> len(load_list_ops()["test"])  # doctest: +SKIP
    2000
    """
    splits = {}
    for split in SPLITS:
        path = cache_folder() / f"list_ops_{seed}_{split}.npz"
        if not path.is_file():
            made = generate_list_ops(COUNTS[split], (seed, SPLITS.index(split)))
            with replacing(path) as unfinished:
                np.savez(unfinished, tokens=made.tokens, offsets=made.offsets, labels=made.labels)
        with np.load(path) as arrays:
            splits[split] = ListOps(**arrays)
    return splits


def generate_list_ops(
    count: int,
    seed: int | Sequence[int],
    *,
    max_depth: int = MAX_DEPTH,
    length_bounds: tuple[int, int] = LENGTH_BOUNDS,
) -> ListOps:
    """Draw examples.

    A node above `max_depth` is an operation with probability 1/4, else a digit, and a digit at
    `max_depth`; operations, their 2 to 10 arguments and digits are uniform. Trees are drawn until
    their length fits.

    **Args**
        count: Number of examples.
        seed: Of all that is random; different seeds are independent.
        max_depth: Nodes on the longest way from the root.
        length_bounds: Lengths in tokens lie between them, both excluded.

    **Returns** The examples.

    **Raises** ValueError if no tree can be that long.

    **Example**

    >>> examples = generate_list_ops(3, seed=0, length_bounds=(4, 50))
    >>> [evaluate(example) for example in examples] == list(examples.labels)
    True
    """
    shortest, longest = length_bounds
    largest = 1
    for _ in range(max_depth - 1):
        largest = 2 + MAX_ARGUMENTS * largest
    if max(shortest + 1, 2 + MIN_ARGUMENTS) > min(longest - 1, largest):
        raise ValueError(
            f"Trees of that depth have from {2 + MIN_ARGUMENTS} to {largest:,} tokens, of which "
            "some number must lie strictly between the bounds. "
            f"Received: max_depth={max_depth}, length_bounds={length_bounds}"
        )
    bits = np.random.PCG64(seed)
    tokens, lengths, labels = [], [], []
    found = 0
    while found < count:
        new_tokens, new_lengths, new_labels = _draw_batch(bits, max_depth, length_bounds)
        tokens.append(new_tokens)
        lengths.append(new_lengths)
        labels.append(new_labels)
        found += len(new_labels)
    offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths)[:count])))
    return ListOps(np.concatenate(tokens)[: offsets[-1]], offsets, np.concatenate(labels)[:count])


def _draw_batch(
    bits: np.random.PCG64, max_depth: int, length_bounds: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens, lengths and results of those of `_BATCH` trees whose length fits.

    Trees grow level by level, all at once, so a level lists its nodes from left to right, tree by
    tree, and the arguments of one operation are neighbours in the next level.
    """
    levels = [_draw_level(bits, _BATCH, may_nest=True, must_nest=True)]
    while levels[-1][1].any():
        is_deepest = len(levels) == max_depth - 1
        levels.append(_draw_level(bits, int(levels[-1][1].sum()), may_nest=not is_deepest))

    # From the leaves up: the length and the value of each node.
    lengths: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for kind, arguments in reversed(levels):
        length = np.ones(len(kind), "int64")
        value = kind - _DIGIT_0
        nested = arguments > 0
        if nested.any():
            first = np.cumsum(arguments[nested]) - arguments[nested]
            length[nested] = 2 + np.add.reduceat(lengths[-1], first)
            value[nested] = _apply(kind[nested], values[-1], first, arguments[nested])
        lengths.append(length)
        values.append(value)
    lengths.reverse()

    # From the root down: the place of each node. A tree that does not fit gets none.
    shortest, longest = length_bounds
    fits = (lengths[0] > shortest) & (lengths[0] < longest)
    kept = lengths[0][fits]
    place = np.full(_BATCH, -1)
    place[fits] = np.cumsum(kept) - kept
    tokens = np.empty(int(kept.sum()), "uint8")
    for depth, (kind, arguments) in enumerate(levels):
        written = place >= 0
        tokens[place[written]] = kind[written]
        closed = written & (arguments > 0)
        tokens[place[closed] + lengths[depth][closed] - 1] = _CLOSE
        if depth + 1 < len(levels):
            # An argument begins after its operation and the arguments before it.
            before = np.cumsum(lengths[depth + 1]) - lengths[depth + 1]
            nested = arguments > 0
            first = np.cumsum(arguments[nested]) - arguments[nested]
            shift = np.repeat(place[nested] + 1 - before[first], arguments[nested])
            place = np.where(np.repeat(written[nested], arguments[nested]), before + shift, -1)
    return tokens, kept, values[-1][fits].astype("uint8")


def _draw_level(
    bits: np.random.PCG64, count: int, *, may_nest: bool, must_nest: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the token and the number of arguments of each node of a level.

    One word of 64 bits decides a node: two bits whether it nests, two its operation, and the low 32
    its digit or its number of arguments. A root always nests: a single digit would never fit.
    """
    raw = bits.random_raw(count)
    nests = np.full(count, may_nest) if must_nest else may_nest & (raw >> np.uint64(62) == 0)
    fraction = raw & np.uint64(2**32 - 1)
    digit = (fraction * np.uint64(10)) >> np.uint64(32)
    choices = MAX_ARGUMENTS - MIN_ARGUMENTS + 1
    arguments = MIN_ARGUMENTS + ((fraction * np.uint64(choices)) >> np.uint64(32)).astype("int64")
    operation = 1 + ((raw >> np.uint64(60)) % np.uint64(_OPERATORS)).astype("int64")
    kind = np.where(nests, operation, _DIGIT_0 + digit.astype("int64"))
    return kind, np.where(nests, arguments, 0)


def _apply(
    kind: np.ndarray, values: np.ndarray, first: np.ndarray, arguments: np.ndarray
) -> np.ndarray:
    """Return the results of operations whose arguments are neighbours in `values`."""
    table = np.full((len(first), MAX_ARGUMENTS), 10)  # Larger than a digit: sorted to the end.
    filled = np.arange(MAX_ARGUMENTS) < arguments[:, None]
    table[filled] = values
    table.sort(axis=1)
    rows = np.arange(len(first))
    low, high = table[rows, (arguments - 1) // 2], table[rows, arguments // 2]
    results = np.stack(
        (
            table[:, 0],
            table[rows, arguments - 1],
            (low + high) // 2,
            np.add.reduceat(values, first) % 10,
        )
    )
    return results[kind - 1, rows]


def encode(text: str) -> np.ndarray:
    """Return the tokens of a written example, without the parentheses of the arena's files.

    **Raises** ValueError for a word that is no token.

    **Example**

    >>> encode("[MAX 4 3 ]")
    array([ 2, 10,  9,  5], dtype=uint8)
    """
    words = [word for word in text.split() if word not in ("(", ")")]
    for word in words:
        if word not in WORDS:
            raise ValueError(
                f"Words of ListOps are {' '.join(WORDS)}, with spaces between. "
                f"Received: {word[:40]!r}"
            )
    return np.array([VOCABULARY.index(word) for word in words], "uint8")


def decode(tokens: np.ndarray) -> str:
    """Return tokens written out, without padding.

    **Example**

    >>> decode(encode("[MAX 4 3 ]"))
    '[MAX 4 3 ]'
    """
    return " ".join(VOCABULARY[token] for token in tokens if token)


def evaluate(tokens: np.ndarray) -> int:
    """Return the result of an example, read from left to right.

    The median of an even number of digits is the mean of the middle two, rounded down; `[SM` is the
    sum modulo 10.

    **Raises** ValueError if brackets do not match or an operation has no arguments.

    **Example**

    >>> evaluate(encode("[MAX 4 3 [MIN 2 3 ] 1 [MED 1 5 8 ] ]"))
    5
    """
    open_lists: list[tuple[str, list[int]]] = [("", [])]
    for word in decode(tokens).split():
        if word.isdigit():
            open_lists[-1][1].append(int(word))
        elif word != "]":
            open_lists.append((word, []))
        else:
            operation, arguments = open_lists.pop()
            if not operation or not arguments:
                raise ValueError(f"Brackets must match and hold arguments: {decode(tokens)[:80]!r}")
            open_lists[-1][1].append(_result(operation, arguments))
    if len(open_lists) != 1 or len(open_lists[0][1]) != 1:
        raise ValueError(f"An example is one closed operation: {decode(tokens)[:80]!r}")
    return open_lists[0][1][0]


def _result(operation: str, arguments: list[int]) -> int:
    if operation == "[MIN":
        return min(arguments)
    if operation == "[MAX":
        return max(arguments)
    if operation == "[MED":
        return int(np.median(arguments))
    return sum(arguments) % 10
