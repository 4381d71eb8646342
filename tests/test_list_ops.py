import hashlib
import re
from itertools import chain

import numpy as np
import pytest

from training.data import list_ops
from training.data.list_ops import (
    VOCABULARY,
    WORDS,
    ListOpsTokenizer,
    decode,
    encode,
    evaluate,
    generate_list_ops,
)


@pytest.mark.parametrize(
    "text, result",
    [
        ("[MAX 4 3 [MIN 2 3 ] 1 [MED 1 5 8 ] ]", 5),
        ("[MIN 4 3 8 ]", 3),
        ("[MED 4 9 1 ]", 4),
        ("[MED 1 2 ]", 1),
        ("[MED 9 2 3 8 ]", 5),
        ("[SM 9 8 7 ]", 4),
        ("[SM [SM 5 5 ] [MAX 0 9 ] [MIN 9 2 ] ]", 1),
        ("[SM 0 0 ]", 0),
        ("7", 7),
        ("( ( ( [MAX 4 ) 3 ) ] )", 4),
    ],
)
def test_results_that_were_worked_out_by_hand(text, result):
    assert evaluate(encode(text)) == result
    padded = np.concatenate((encode(text), np.zeros(3, "uint8")))
    assert evaluate(padded) == result


@pytest.mark.parametrize("text", ["[MAX 1 2", "1 2", "]", "[MAX ]", "[MAX 1 2 ] ]", ""])
def test_what_is_no_example_has_no_result(text):
    with pytest.raises(ValueError, match=r"must match and hold|one closed operation"):
        evaluate(encode(text))


def test_tokens_are_those_of_the_vocabulary():
    text = "[MIN 0 1 [MAX 2 3 ] [MED 4 5 ] [SM 6 7 8 ] 9 ]"
    tokens = encode(text)
    assert tokens.dtype == "uint8" and decode(tokens) == text
    assert set(tokens) == set(range(1, 16)) and tuple(VOCABULARY[1:16]) == WORDS
    assert {*tokens, *ListOpsTokenizer.special_token_ids} == set(range(len(VOCABULARY)))
    for word in ("[FIRST", "<mask>"):
        with pytest.raises(ValueError, match=re.escape(repr(word))):
            encode(f"[MAX 1 2 {word} ]")


def draw_by_recursion(rng, depth, max_depth):
    """The published description, node by node."""
    if depth == max_depth or rng.random() > 0.25:
        return [str(rng.integers(10))]
    arguments = [draw_by_recursion(rng, depth + 1, max_depth) for _ in range(rng.integers(2, 11))]
    operation = rng.choice(["[MIN", "[MAX", "[MED", "[SM"])
    return [operation, *chain(*arguments), "]"]


def statistics(examples):
    """One row for each example: length, operations, depth, result, and operations of one kind."""
    rows = []
    for tokens in examples:
        words = decode(tokens).split()
        steps = np.array([(word[0] == "[") - (word == "]") for word in words])
        row = [len(words), sum(steps > 0), np.cumsum(steps).max(), evaluate(tokens)]
        rows.append([*row, words.count("[SM"), sum(word == "0" for word in words)])
    return np.array(rows, float)


def test_examples_are_distributed_as_described():
    """Against a walk node by node: means within five standard errors of their difference."""
    bounds, max_depth, count = (10, 60), 4, 1500
    rng = np.random.default_rng(0)
    expected = []
    while len(expected) < count:
        words = draw_by_recursion(rng, 1, max_depth)
        if bounds[0] < len(words) < bounds[1]:
            expected.append(encode(" ".join(words)))
    made = generate_list_ops(count, 0, max_depth=max_depth, length_bounds=bounds)
    a, b = statistics(made), statistics(expected)
    error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / count)
    assert np.all(np.abs(a.mean(axis=0) - b.mean(axis=0)) < 5 * error)
    assert a[:, 2].max() == b[:, 2].max() == max_depth - 1


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_published_settings_give_right_results_and_known_statistics():
    made = generate_list_ops(400, (0, 2))
    lengths = np.diff(made.offsets)
    assert len(made) == 400 and made.offsets[-1] == len(made.tokens)
    assert lengths.min() > 500 and lengths.max() < 2000
    assert [evaluate(example) for example in made] == made.labels.tolist()
    depths = [statistics([example])[0, 2] for example in made]
    assert max(depths) == 9
    # Minima and maxima of many make 0 and 9 the most frequent results: about 16 % each, not 10 %.
    shares = np.bincount(made.labels, minlength=10) / 400
    assert sorted(np.argsort(shares)[-2:]) == [0, 9]
    assert np.all(np.abs(shares[[0, 9]] - 0.163) < 5 * np.sqrt(0.163 * 0.837 / 400))
    # Operations are equally frequent.
    counts = np.bincount(made.tokens, minlength=16)
    assert counts[0] == 0 and counts[5] == counts[1:5].sum()
    assert np.ptp(counts[1:5]) < 5 * np.sqrt(2 * counts[5] / 4)


def test_examples_are_the_same_on_every_machine():
    made = generate_list_ops(50, 0)
    digest = hashlib.sha256(made.tokens.tobytes() + made.labels.tobytes()).hexdigest()
    assert digest == "6fc905fc76e397f0a0d20b460c15424dda4461c699331a7c40cfa3e9a0d57b54"
    longer = generate_list_ops(60, 0)
    assert np.array_equal(longer.tokens[: len(made.tokens)], made.tokens)
    assert not np.array_equal(generate_list_ops(50, 1).labels, made.labels)


@pytest.mark.parametrize(
    "max_depth, bounds", [(1, (0, 50)), (2, (12, 50)), (10, (500, 501)), (10, (0, 4))]
)
def test_lengths_that_no_tree_has_are_refused(max_depth, bounds):
    with pytest.raises(ValueError, match=f"max_depth={max_depth}"):
        generate_list_ops(1, 0, max_depth=max_depth, length_bounds=bounds)


def test_splits_are_generated_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_PERFORMER_CACHE", str(tmp_path))
    monkeypatch.setattr(list_ops, "COUNTS", {"train": 30, "validation": 3, "test": 2})
    first = list_ops.load_list_ops(seed=7)
    monkeypatch.setattr(list_ops, "generate_list_ops", None)
    again = list_ops.load_list_ops(seed=7)
    for split, count in list_ops.COUNTS.items():
        assert len(first[split]) == len(again[split]) == count
        assert np.array_equal(first[split].tokens, again[split].tokens)
        assert np.array_equal(first[split].labels, again[split].labels)
        assert [evaluate(example) for example in again[split]] == again[split].labels.tolist()
    assert not np.array_equal(first["validation"][0], first["test"][0])
