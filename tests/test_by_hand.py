"""The steps that PyTorch runs with gradients by hand, beside those in `keras.ops`."""

import keras
import numpy as np
import pytest
from tolerances import AGREEMENT, relative_rms

from keras_performer.feature_maps import FavorPlus
from keras_performer.ops import _blocked, _chunked, _scan, _sums, favor_attention
from keras_performer.ops._chunks import by_hand

if keras.config.backend() != "torch":
    pytest.skip("it concerns PyTorch", allow_module_level=True)
import torch


def inputs(length, num_groups=1, scale=1.0, seed=0):
    """Query, key, value, a mask of keys whose second row begins with masked ones, and a map."""
    generator = torch.Generator().manual_seed(seed)

    def draw(num_heads):
        x = torch.randn((2, length, num_heads, 16), generator=generator)
        return (scale * x).requires_grad_()

    mask = torch.rand((2, length), generator=generator) > 0.2
    mask[1, :20] = False
    return draw(2 * num_groups), draw(2), draw(2), mask, FavorPlus(32, seed=1)


def derivatives(output, wanted):
    """The output, its gradients, and theirs."""
    weights = torch.cos(torch.arange(output.numel(), dtype=output.dtype)).reshape(output.shape)
    first = torch.autograd.grad((output * weights).sum(), wanted, create_graph=True)
    squares = torch.stack([g.square().sum() for g in first])
    second = torch.autograd.grad(squares.sum(), wanted)
    return [output, *first, *second]


@pytest.fixture
def plainly(monkeypatch):
    """Calls a function with `keras.ops` alone."""

    def call(fn):
        with monkeypatch.context() as patch:
            for module in (_sums, _chunked, _blocked):
                patch.setattr(module, "by_hand", lambda *tensors: None)
            return fn()

    return call


@pytest.mark.parametrize("scale", [1.0, 6.0])  # at 6 some features are held at the floor
@pytest.mark.parametrize(
    ("length", "num_groups"), [(1, 1), (70, 1), (300, 2), pytest.param(2200, 1, id="steps")]
)
def test_derivatives_are_those_of_keras_ops(length, num_groups, scale, plainly):
    query, key, value, mask, feature_map = inputs(length, num_groups, scale)
    assert by_hand(query)
    query_0, key_0, value_0 = (x.detach() for x in inputs(50, num_groups, seed=2)[:3])
    state = favor_attention(query_0, key_0, value_0, feature_map, causal=True, return_state=True)[1]
    state = {name: x.requires_grad_(name != "log_max") for name, x in state.items()}
    wanted = (query, key, value, state["kv"], state["k_sum"])

    def attend():
        output, after = favor_attention(
            query,
            key,
            value,
            feature_map,
            causal=True,
            key_mask=mask,
            initial_state=state,
            return_state=True,
        )
        # Of both, so that the gradient of the last sums is not zero.
        return derivatives(
            torch.cat([output.flatten(), after["kv"].flatten(), after["k_sum"].flatten()]), wanted
        )

    for actual, expected in zip(attend(), plainly(attend), strict=True):
        assert relative_rms(actual.detach(), expected.detach()) < 4 * AGREEMENT


@pytest.mark.parametrize("scale", [1.0, 6.0])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "num_groups"), [(70, 1), (300, 2), (1500, 1)])
def test_derivatives_of_blocks_are_those_of_keras_ops(length, num_groups, causal, scale, plainly):
    query, key, value, mask, feature_map = inputs(length, num_groups, scale)

    def attend():
        output = favor_attention(
            query, key, value, feature_map, causal=causal, key_mask=mask, exact_window=16
        )
        return derivatives(output, (query, key, value))

    for actual, expected in zip(attend(), plainly(attend), strict=True):
        assert relative_rms(actual.detach(), expected.detach()) < 4 * AGREEMENT


@pytest.mark.parametrize("kept", [1, 100], ids=["recomputed", "kept"])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {},
        {"trainable": True},
        {"segments": True},
        {"exact_window": 8},
        {"exact_window": 8, "segments": True},
    ],
    ids=str,
)
def test_derivatives_over_steps_are_those_of_the_reference(options, kept, monkeypatch):
    # One input of a walk may be computed from another, as sums are from keys.
    monkeypatch.setattr(_scan, "_KEPT_STEPS", kept)
    monkeypatch.setattr(_sums, "_STEP_NUMBERS", 1)
    monkeypatch.setattr(_blocked, "_STEP", 16)
    options = dict(options)
    query, key, value, *_ = inputs(200)
    if options.pop("segments", False):
        options["segment_ids"] = (torch.arange(200) // 70).expand(2, 200)
    feature_map = FavorPlus(32, seed=1, trainable_projection=options.pop("trainable", False))

    def attend(implementation):
        output = favor_attention(
            query, key, value, feature_map, implementation=implementation, **options
        )
        weights = [variable.value for variable in feature_map.trainable_variables]
        return derivatives(output, (query, key, value, *weights))

    for actual, expected in zip(attend("auto"), attend("reference"), strict=True):
        assert relative_rms(actual.detach(), expected.detach()) < 4 * AGREEMENT


def test_a_row_without_keys_gives_zeros_and_no_gradient():
    query, key, value, mask, feature_map = inputs(70)
    output = favor_attention(query, key, value, feature_map, causal=True, key_mask=mask)
    grads = torch.autograd.grad(output.sum(), (query, key, value))
    assert not output[1, :20].any() and not grads[0][1, :20].any()
    assert output.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_a_query_that_is_not_a_number_shows_in_its_row_alone():
    query, key, value, mask, feature_map = inputs(70)
    query.data[0, 3] = np.nan
    output = favor_attention(query, key, value, feature_map, causal=True, key_mask=mask)
    assert output[0, 3].isnan().all() and output.isnan().sum() == output[0, 3].numel()


def test_transforms_of_functions_take_keras_ops():
    query, key, value, _, feature_map = inputs(70)

    def loss(query):
        return favor_attention(query, key, value, feature_map, causal=True).square().sum()

    (expected,) = torch.autograd.grad(loss(query), query)
    actual = torch.func.grad(loss)(query.detach())
    assert relative_rms(actual, expected) < AGREEMENT
