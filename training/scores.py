"""Figures of classifiers, in NumPy: from labels, predictions and logits to what a table shows."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

# Of the standard normal distribution, for intervals that hold with 95 %.
_QUANTILE = 1.959963984540054


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how often each class (row) was taken for each class (column), (C, C).

    **Args**
        labels: True classes (N,).
        predictions: Predicted ones (N,).
        num_classes: C.

    **Example**

    >>> confusion_matrix(np.array([0, 0, 1]), np.array([0, 1, 1]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    pairs = np.asarray(labels, "int64") * num_classes + np.asarray(predictions, "int64")
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a share, which stays between 0 and 1.

    **Source** Wilson 1927, without correction for continuity.

    **Example**

    >>> [round(bound, 4) for bound in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    share, z2 = hits / count, _QUANTILE**2
    middle = share + z2 / (2 * count)
    spread = _QUANTILE * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    return (middle - spread) / (1 + z2 / count), (middle + spread) / (1 + z2 / count)


def class_scores(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Return `precision`, `recall` and `f1` of each class (C,); 0 where nothing is to divide by.

    **Example**

    >>> class_scores(np.array([[1, 1], [0, 1]]))["recall"].tolist()
    [0.5, 1.0]
    """
    hits = np.diag(confusion).astype("float64")
    true, predicted = confusion.sum(1), confusion.sum(0)
    return {
        "precision": hits / np.maximum(predicted, 1),
        "recall": hits / np.maximum(true, 1),
        "f1": 2 * hits / np.maximum(true + predicted, 1),
    }


def class_rows(confusion: np.ndarray, names: Sequence[str], unit: str) -> dict[str, dict]:
    """Return `class_scores` and the number of true ones, called `unit`, by the name of the class.

    **Example**

    >>> class_rows(np.array([[1, 1], [0, 1]]), ["a", "b"], "examples")["a"]
    {'precision': 1.0, 'recall': 0.5, 'f1': 0.6666666666666666, 'examples': 2}
    """
    columns = {name: values.tolist() for name, values in class_scores(confusion).items()}
    columns[unit] = confusion.sum(1).tolist()
    return {
        name: {column: values[i] for column, values in columns.items()}
        for i, name in enumerate(names)
    }


def macro_f1(confusion: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur among the labels or the predictions.

    **Example**

    >>> round(macro_f1(np.array([[1, 1], [0, 1]])), 4)
    0.6667
    """
    occurs = (confusion.sum(0) + confusion.sum(1)) > 0
    return float(class_scores(confusion)["f1"][occurs].mean())


def matthews_correlation(confusion: np.ndarray) -> float:
    """Return the correlation of labels and predictions, 0 if either is always the same class.

    **Source** Gorodkin 2004, for any number of classes; for two it is Matthews's.

    **Example**

    >>> matthews_correlation(np.array([[1, 1], [0, 1]]))
    0.5
    """
    # Python's integers: products of counts leave 64 bits.
    true = [int(count) for count in confusion.sum(1)]
    predicted = [int(count) for count in confusion.sum(0)]
    total, hits = sum(true), int(np.trace(confusion))
    covariance = hits * total - sum(t * p for t, p in zip(true, predicted, strict=True))
    of_labels = total**2 - sum(t * t for t in true)
    of_predictions = total**2 - sum(p * p for p in predicted)
    if of_labels == 0 or of_predictions == 0:
        return 0.0
    return covariance / (math.sqrt(of_labels) * math.sqrt(of_predictions))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the log probabilities (..., C) of logits, in nats and float64.

    **Args**
        logits: Log probabilities (..., C), up to a constant in each row.

    **Example**

    >>> log_probabilities(np.log([[1.0, 3.0]])).round(4).tolist()
    [[-1.3863, -0.2877]]
    """
    logits = np.asarray(logits, "float64")
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def surprise(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return minus the log probability (...,) of each label, in nats.

    **Args**
        logits: Log probabilities (..., C), up to a constant in each row.
        labels: True classes (...,).

    **Example**

    >>> surprise(np.log([[1.0, 3.0]]), np.array([0])).round(4).tolist()
    [1.3863]
    """
    return -np.take_along_axis(log_probabilities(logits), labels[..., None], -1)[..., 0]


def log_frequencies(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the log frequency (C,) of each class, with one added to each count.

    **Example**

    >>> np.exp(log_frequencies(np.array([0, 0, 1]), 3)).round(4).tolist()
    [0.5, 0.3333, 0.1667]
    """
    counts = np.bincount(labels, minlength=num_classes) + 1
    return np.log(counts / counts.sum())


def mean_and_error(values: np.ndarray) -> dict[str, Any]:
    """Return the `mean` and its `standard_error`, which one value alone does not give.

    **Example**

    >>> mean_and_error(np.array([1.0, 3.0]))
    {'mean': 2.0, 'standard_error': 1.0}
    """
    count = len(values)
    error = float(values.std(ddof=1) / math.sqrt(count)) if count > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}
