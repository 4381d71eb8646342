"""Whole outputs of the original implementations; see golden/README.md for where they come from."""

from pathlib import Path

import keras
import numpy as np
import pytest
from gradients import compiled, gradients, implementations
from keras import ops
from tolerances import AGREEMENT, assert_close, assert_exact, relative_rms, to_numpy

from keras_performer.feature_maps import FavorPlus, GeneralizedKernel, ReLU
from keras_performer.ops import favor_attention

FOLDER = Path(__file__).parent / "golden"
PROJECTS = ("google_jax", "google_tf", "performer_pytorch")
# The projects were given the same inputs: one call of ours is compared with three of theirs.
CASES = ("", "_h16", "_large")
NUM_FEATURES = 24


def load(file):
    with np.load(FOLDER / f"{file}.npz") as arrays:
        return dict(arrays)


def softmax_files(case):
    return {project: load(f"{project}_softmax{case}") for project in PROJECTS}


def with_projection(feature_map, golden):
    """Build a map and give it the stored projection in place of the one it draws, if it does."""
    feature_map.build(golden["key"].shape)
    if feature_map.projection is not None:
        feature_map.projection.assign(golden["projection"])
    return feature_map


def attend(golden, feature_map, mode, implementation="chunked", **replaced):
    options = {"causal": mode == "causal", "implementation": implementation}
    function = compiled(lambda *x: favor_attention(*x, feature_map, **options))
    return to_numpy(function(*({**golden, **replaced}[x] for x in ("query", "key", "value"))))


def assert_agrees(actual, expected):
    assert relative_rms(actual, expected) < AGREEMENT
    # No single row is off either. Entries that cancel to nearly zero are left to the line above.
    assert_close(np.where(np.abs(expected) > 0.1, actual, expected), expected)


def test_every_file_is_tested():
    softmax = {f"{project}_softmax{case}" for project in PROJECTS for case in CASES}
    relu = {f"{project}_relu" for project in PROJECTS}
    assert {path.stem for path in FOLDER.glob("*.npz")} == softmax | relu


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_shared(case):
    first, *others = softmax_files(case).values()
    for other in others:
        for name in ("query", "key", "value", "projection"):
            assert_exact(other[name], first[name])


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("case", CASES)
def test_softmax_kernel_without_epsilon(case, mode, implementation):
    files = softmax_files(case)
    golden = files["google_jax"]
    feature_map = with_projection(FavorPlus(NUM_FEATURES), golden)
    output = attend(golden, feature_map, mode, implementation)
    for file in files.values():
        assert_agrees(output, file[f"{mode}_eps0"])
        assert_agrees(output, file[f"{mode}_float64"])


@keras.saving.register_keras_serializable(package="keras_performer_tests")
def relu_of_the_scaled_projection(x):
    return keras.ops.relu(x * NUM_FEATURES**-0.5)


RELU_MAPS = {
    ("google_jax", ""): lambda: ReLU(projection=None),
    ("google_jax", "_projected"): lambda: ReLU(NUM_FEATURES),
    ("google_tf", ""): lambda: GeneralizedKernel(
        relu_of_the_scaled_projection, NUM_FEATURES, projection="orthogonal"
    ),
    ("performer_pytorch", ""): lambda: GeneralizedKernel(
        "relu", NUM_FEATURES, projection="orthogonal", scale_inputs=True
    ),
}


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize(("project", "variant"), RELU_MAPS)
def test_relu_kernel(project, variant, mode, implementation):
    golden = load(f"{project}_relu")
    feature_map = with_projection(RELU_MAPS[project, variant](), golden)
    output = attend(golden, feature_map, mode, implementation)
    assert_agrees(output, golden[f"{mode}{variant}"])
    assert_agrees(output, golden[f"{mode}{variant}_float64"])


# As shipped, with their epsilons.

# What each project adds to features, and for performer-pytorch also to the causal key sum.
LEGACY_EPSILON = {1e-6: ("google_jax", "google_tf"), (1e-4, 1e-6): ("performer_pytorch",)}


def legacy_map(golden, epsilon):
    return with_projection(FavorPlus(NUM_FEATURES, legacy_epsilon=epsilon), golden)


@pytest.mark.parametrize("implementation", implementations())
@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
@pytest.mark.parametrize("epsilon", LEGACY_EPSILON, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_legacy_epsilon_gives_what_was_shipped(case, epsilon, mode, implementation):
    files = softmax_files(case)
    golden = files["google_jax"]
    output = attend(golden, legacy_map(golden, epsilon), mode, implementation)
    # The epsilon is there to be seen: the default is farther away than rounding.
    assert relative_rms(output, golden[f"{mode}_eps0"]) > 10 * AGREEMENT
    for project in LEGACY_EPSILON[epsilon]:
        shipped = files[project][f"{mode}_shipped"]
        if (project, case) != ("google_jax", "_large"):
            assert_agrees(output, shipped)
            continue
        # There a denominator of at most 1e-6 grows by 2e-6, which `legacy_epsilon` does not
        # imitate, in 2 and 7 % of the rows of this file and in no other file.
        same = np.isclose(output, shipped, rtol=1e-4, atol=1e-5).all(axis=-1)
        assert 0.9 < same.mean() < 0.99


def test_a_masked_key_does_not_count_in_the_legacy_maximum():
    golden = load("google_tf_softmax_large")
    padded = np.concatenate([golden["key"], 5 * golden["key"][:, :3]], axis=1)
    value = np.concatenate([golden["value"], golden["value"][:, :3]], axis=1)
    mask = np.arange(40) < 37
    output = favor_attention(
        golden["query"],
        padded,
        value,
        legacy_map(golden, 1e-6),
        key_mask=np.tile(mask, (2, 1)),
    )
    assert_agrees(to_numpy(output), golden["bidirectional_shipped"])


def test_legacy_causal_attention_leaks_the_future_and_the_default_does_not():
    # The maximum over all keys scales the epsilon, so the last key reaches every earlier row.
    golden = load("performer_pytorch_softmax")
    key = golden["key"].copy()
    key[:, -1] *= 4
    for feature_map, leaks in (
        (legacy_map(golden, (1e-4, 1e-6)), True),
        (with_projection(FavorPlus(NUM_FEATURES), golden), False),
    ):
        before = attend(golden, feature_map, "causal")[:, :-1]
        after = attend(golden, feature_map, "causal", key=key)[:, :-1]
        if leaks:
            assert relative_rms(after, before) > 0.05
        else:
            np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("causal", [False, True])
def test_legacy_gradients_of_a_row_without_keys_are_finite(causal):
    golden = load("google_tf_softmax")
    arrays = [golden[name] for name in ("query", "key", "value")]
    mask = np.ones(arrays[1].shape[:2], bool)
    mask[0] = False
    feature_map = legacy_map(golden, 1e-6)

    def function(query, key, value):
        options = {"causal": causal, "key_mask": mask}
        output = favor_attention(query, key, value, feature_map, **options)
        return ops.sum(output * output)

    _, found = gradients(function, *arrays)
    assert all(np.isfinite(gradient).all() for gradient in found)


@pytest.mark.parametrize("mode", ["bidirectional", "causal"])
def test_legacy_epsilon_refuses_states(mode):
    golden = load("google_tf_softmax")
    arrays = [golden[name] for name in ("query", "key", "value")]
    options = {"causal": mode == "causal"}
    exact = with_projection(FavorPlus(NUM_FEATURES), golden)
    _, state = favor_attention(*arrays, exact, return_state=True, **options)
    legacy = legacy_map(golden, 1e-6)
    for asked in ({"return_state": True}, {"initial_state": state}):
        with pytest.raises(ValueError, match=r"no state.*legacy_epsilon=None"):
            favor_attention(*arrays, legacy, **options, **asked)
