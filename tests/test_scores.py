import math

import numpy as np
import pytest

from training.scores import (
    class_scores,
    confusion_matrix,
    log_frequencies,
    macro_f1,
    matthews_correlation,
    mean_and_error,
    surprise,
    wilson_interval,
)

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 2])
PREDICTIONS = np.array([0, 0, 1, 1, 2, 2, 2, 2, 0, 2])
CONFUSION = [[2, 1, 0, 0], [0, 1, 1, 0], [1, 0, 4, 0], [0, 0, 0, 0]]


def test_rows_of_the_confusion_matrix_are_the_true_classes():
    confusion = confusion_matrix(LABELS, PREDICTIONS, 4)
    assert confusion.tolist() == CONFUSION


def test_scores_of_classes_by_hand():
    result = class_scores(np.array(CONFUSION))
    assert result["precision"] == pytest.approx([2 / 3, 1 / 2, 4 / 5, 0])
    assert result["recall"] == pytest.approx([2 / 3, 1 / 2, 4 / 5, 0])
    skewed = class_scores(np.array([[3, 1], [0, 2]]))
    assert skewed["precision"] == pytest.approx([1, 2 / 3])
    assert skewed["recall"] == pytest.approx([3 / 4, 1])
    assert skewed["f1"] == pytest.approx([6 / 7, 4 / 5])


def test_macro_f1_leaves_out_classes_that_do_not_occur():
    assert macro_f1(np.array(CONFUSION)) == pytest.approx((2 / 3 + 1 / 2 + 4 / 5) / 3)
    # One that is only predicted counts, with 0.
    assert macro_f1(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]])) == pytest.approx(
        (6 / 7 + 4 / 5) / 2
    )
    assert macro_f1(np.array([[3, 1], [0, 0]])) == pytest.approx(6 / 7 / 2)


def test_matthews_correlation_is_that_of_indicator_vectors():
    # Gorodkin: the covariance of one-hot rows over the root of their variances.
    x, y = np.eye(4)[LABELS], np.eye(4)[PREDICTIONS]
    covariance = ((x - x.mean(0)) * (y - y.mean(0))).sum()
    variances = ((x - x.mean(0)) ** 2).sum() * ((y - y.mean(0)) ** 2).sum()
    expected = covariance / math.sqrt(variances)
    assert matthews_correlation(np.array(CONFUSION)) == pytest.approx(expected)
    # Matthews, two classes: tp = 6, fn = 2, fp = 1, tn = 3.
    two = (6 * 3 - 1 * 2) / math.sqrt(7 * 8 * 4 * 5)
    assert matthews_correlation(np.array([[3, 1], [2, 6]])) == pytest.approx(two)


def test_matthews_correlation_at_its_ends_and_with_large_counts():
    assert matthews_correlation(np.diag([5, 2, 3])) == pytest.approx(1)
    assert matthews_correlation(np.array([[0, 4], [4, 0]])) == pytest.approx(-1)
    assert matthews_correlation(np.array([[7, 0], [3, 0]])) == 0
    assert matthews_correlation(np.array([[7, 3], [0, 0]])) == 0
    assert matthews_correlation(np.array([[3, 1], [2, 6]]) * 10**9) == pytest.approx(
        matthews_correlation(np.array([[3, 1], [2, 6]]))
    )


@pytest.mark.parametrize("hits, count", [(8, 10), (0, 17), (17, 17), (263, 2631)])
def test_bounds_of_the_interval_are_196_standard_errors_away(hits, count):
    # What defines them: |share - p| = z sqrt(p (1 - p) / count).
    z = 1.959964
    for p in wilson_interval(hits, count):
        assert abs(hits / count - p) == pytest.approx(
            z * math.sqrt(abs(p * (1 - p)) / count), abs=1e-6
        )
    low, high = wilson_interval(hits, count)
    assert -1e-12 <= low <= hits / count <= high + 1e-12 <= 1 + 2e-12


def test_surprise_and_frequencies_by_hand():
    logits = np.log([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]) + np.array([[1000.0], [-3.0]])
    expected = [math.log(4), math.log(10)]
    assert surprise(logits, np.array([1, 0])) == pytest.approx(expected)
    assert np.exp(log_frequencies(LABELS, 4)) == pytest.approx([4 / 14, 3 / 14, 6 / 14, 1 / 14])


def test_mean_and_error_by_hand():
    result = mean_and_error(np.array([0.5, 1.0, 0.75, 0.25]))
    assert result["mean"] == pytest.approx(0.625)
    assert result["standard_error"] == pytest.approx(math.sqrt(0.3125 / 3 / 4))
    assert mean_and_error(np.array([0.5])) == {"mean": 0.5, "standard_error": None}
