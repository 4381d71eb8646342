"""Statistics of the kernel that random features estimate: bias, variance and order of errors.

Blocks of one large projection are independent draws of a small one.
"""

import itertools
import math

import numpy as np
import pytest
from samples import normal
from test_favor_plus_plus import built, constants, statistics_of
from tolerances import to_numpy

from keras_performer.feature_maps import FavorPlus, FavorPlusPlus, Trigonometric

STANDARD_ERRORS = 5


def pairs(head_dim, count=5, scale=0.5):
    """Scaled queries and keys, with |q' + k'|^2 about 2 scale^2 sqrt(H)."""
    return tuple(normal(count, head_dim, seed=seed, scale=scale) for seed in (1, 2))


def anisotropic_pairs(head_dim, count, scale=1.0, seed=1):
    """Large dimensions of the queries are small in the keys."""
    sizes = np.geomspace(0.1, scale, head_dim)
    query = normal(count, head_dim, seed=seed) * sizes
    key = normal(count, head_dim, seed=seed + 1) * sizes[::-1]
    return query.astype("float32"), key.astype("float32")


def fitted(feature_map, head_dim, scale=1.0):
    """The map built for one head, with the statistics of 4096 of the `anisotropic_pairs`."""
    built(feature_map, head_dim, key_heads=1)
    q, k = anisotropic_pairs(head_dim, 4096, scale, seed=11)
    feature_map.update_statistics(q[None, :, None], k[None, :, None])
    return feature_map


def kernel(q, k):
    return np.exp(np.sum(q.astype("float64") * k, axis=-1) / math.sqrt(q.shape[-1]))


def estimates(feature_map, q, k, num_rows):
    """Estimates of the kernel (pairs, draws), each from `num_rows` rows of the projection."""
    products = to_numpy(feature_map(q, is_query=True)).astype("float64") * to_numpy(feature_map(k))
    total = feature_map.projection.shape[0]
    products = products.reshape(len(q), -1, total).sum(axis=1)  # the features of one row
    return products.reshape(len(q), -1, num_rows).sum(axis=-1) * (total / num_rows)


def squared_errors(feature_map, q, k, num_rows):
    relative = estimates(feature_map, q, k, num_rows) / kernel(q, k)[:, None] - 1
    return np.mean(relative**2, axis=0)  # over the pairs, one for each draw


@pytest.mark.parametrize(
    "make",
    [
        *(
            lambda m, p=projection: FavorPlus(m, projection=p, seed=6)
            for projection in ("orthogonal", "iid", "simplex")
        ),
        *(
            lambda m, p=projection: FavorPlus(2 * m, hyperbolic=True, projection=p, seed=6)
            for projection in ("orthogonal", "iid", "simplex")
        ),
        lambda m: Trigonometric(2 * m, seed=6),
        lambda m: Trigonometric(2 * m, projection="simplex", seed=6),
        *(
            lambda m, p=projection, b=balanced: FavorPlusPlus(m, projection=p, balanced=b, seed=6)
            for projection in ("orthogonal", "iid", "simplex")
            for balanced in (False, True)
        ),
    ],
)
def test_kernel_estimate_is_unbiased(make):
    q, k = anisotropic_pairs(7, count=5)
    feature_map = fitted(make(14 * 4001), 7)
    draws = estimates(feature_map, q, k, num_rows=14)
    standard_error = draws.std(axis=1) / math.sqrt(draws.shape[1])
    truth = kernel(q, k)
    assert (standard_error < 0.05 * truth).all()  # else the next line would hide a bias
    assert (np.abs(draws.mean(axis=1) - truth) < STANDARD_ERRORS * standard_error).all()


def test_regularized_kernel_is_biased_below_by_as_much_as_theory_says():
    q, k = pairs(7, scale=1.0)
    draws = estimates(FavorPlus(200_003, projection="iid", regularized=True, seed=7), q, k, 1)
    standard_error = draws.std(axis=1) / math.sqrt(draws.shape[1])
    # The mean of exp(sqrt(H) u.z) over the sphere is 0F1(; H/2; H |z|^2 / 4).
    x, y = (t.astype("float64") * 7**-0.25 for t in (q, k))
    argument = 7 * np.sum((x + y) ** 2, axis=-1) / 4
    terms = [np.ones(len(q))]
    for i in range(60):
        terms.append(terms[-1] * argument / ((i + 1) * (3.5 + i)))
    truth = np.sum(terms, axis=0) * np.exp(-np.sum(x * x + y * y, axis=-1) / 2)
    assert (np.abs(draws.mean(axis=1) - truth) < STANDARD_ERRORS * standard_error).all()
    below = kernel(q, k) - draws.mean(axis=1)
    assert (below > 0).all()
    assert (below > STANDARD_ERRORS * standard_error).any()


def test_variance_of_iid_features_is_that_of_the_theory():
    # (exp(|q' + k'|^2) - 1) / M for M independent features: what `FavorPlus` documents.
    q, k = pairs(7, scale=0.4)
    draws = estimates(FavorPlus(400_009, projection="iid", seed=8), q, k, 1)
    squares = (draws / kernel(q, k)[:, None] - 1) ** 2
    f = np.sum((q.astype("float64") + k) ** 2, axis=-1) / math.sqrt(7)
    standard_error = squares.std(axis=1) / math.sqrt(squares.shape[1])
    assert (np.abs(squares.mean(axis=1) - (np.exp(f) - 1)) < STANDARD_ERRORS * standard_error).all()
    assert (standard_error < 0.05 * np.exp(f)).all()


@pytest.mark.parametrize("balanced", [False, True])
def test_variance_of_favor_plus_plus_is_that_of_the_theory(balanced):
    q, k = anisotropic_pairs(7, count=5)
    feature_map = fitted(FavorPlusPlus(400_009, projection="iid", balanced=balanced, seed=8), 7)
    draws = estimates(feature_map, q, k, 1)
    squares = (draws / kernel(q, k)[:, None] - 1) ** 2
    standard_error = squares.std(axis=1) / math.sqrt(squares.shape[1])
    (a,), (psi,) = constants(statistics_of(feature_map), balanced)
    assert a < -0.02  # far enough from FAVOR+ for the formulas to differ
    f = np.sum((q.astype("float64") * psi + k / psi) ** 2, axis=-1) / math.sqrt(7)
    variance = (1 - 4 * a) ** 7 * (1 - 8 * a) ** -3.5
    variance = variance * np.exp(2 * (1 - 4 * a) * f / (1 - 8 * a) - f) - 1
    assert (np.abs(squares.mean(axis=1) - variance) < STANDARD_ERRORS * standard_error).all()
    assert (standard_error < 0.05 * (variance + 1)).all()


@pytest.mark.parametrize(
    ("better", "worse", "num_features", "num_rows_of_better"),
    [
        ({"projection": "orthogonal"}, {"projection": "iid"}, 7, 7),
        ({"projection": "iid", "hyperbolic": True}, {"projection": "iid"}, 14, 7),
    ],
    ids=["orthogonal_below_iid", "hyperbolic_below_plain_for_short_vectors"],
)
def test_error_is_lower(better, worse, num_features, num_rows_of_better):
    q, k = pairs(7, count=11, scale=0.3)
    low, high = (
        squared_errors(FavorPlus(num_features * 20011, seed=9, **options), q, k, num_rows)
        for options, num_rows in ((better, num_rows_of_better), (worse, num_features))
    )
    standard_error = math.sqrt((low.var() + high.var()) / low.size)
    assert high.mean() - low.mean() > STANDARD_ERRORS * standard_error


def test_simplex_rows_are_better_than_orthogonal_ones():
    q, k = pairs(7, count=11, scale=0.3)
    low, high = (
        squared_errors(built(FavorPlus(7 * 8009, projection=p, seed=9)), q, k, 7)
        for p in ("simplex", "orthogonal")
    )
    standard_error = math.sqrt((low.var() + high.var()) / low.size)
    assert high.mean() - 2 * low.mean() > STANDARD_ERRORS * standard_error


def test_errors_on_anisotropic_data_are_ordered():
    # FORMULAS.md gives 0.063 < 0.140 < 0.268 on data of its own, at these sizes.
    q, k = anisotropic_pairs(16, count=41, scale=0.8)
    errors = [
        squared_errors(fitted(make(16 * 4001), 16, scale=0.8), q, k, 16)
        for make in (
            lambda m: FavorPlusPlus(m, balanced=True, seed=9),
            lambda m: FavorPlusPlus(m, seed=9),
            lambda m: FavorPlus(m, seed=9),
        )
    ]
    for low, high in itertools.pairwise(errors):
        standard_error = math.sqrt((low.var() + high.var()) / low.size)
        assert high.mean() - low.mean() > STANDARD_ERRORS * standard_error


@pytest.mark.parametrize("projection", ["orthogonal", "iid"])
def test_error_falls_with_the_square_root_of_features(projection):
    # Short vectors, and 24 draws of each size: the error itself has heavy tails.
    q, k = normal(11, 13, seed=1, scale=0.3), normal(17, 13, seed=2, scale=0.3)
    truth = np.exp(q.astype("float64") @ k.T / math.sqrt(13))
    sizes = [13, 52, 208, 832]
    errors = []
    for num_features in sizes:
        feature_map = FavorPlus(24 * num_features, projection=projection, seed=3)
        phi_q, phi_k = (to_numpy(feature_map(x)).reshape(-1, 24, num_features) for x in (q, k))
        estimate = 24 * np.einsum("tdm,sdm->dts", phi_q, phi_k)
        errors.append(math.sqrt(np.mean((estimate / truth - 1) ** 2)))
    slope, _ = np.polyfit(np.log(sizes), np.log(errors), 1)
    assert -0.6 < slope < -0.4
