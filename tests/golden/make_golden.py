"""Makes the golden arrays: outputs of other people's FAVOR+ code for given inputs.

    pip install gin-config absl-py tensorflow jax torch performer-pytorch==1.1.4
    python tests/golden/make_golden.py --google-research PATH_TO_CHECKOUT

`PATH_TO_CHECKOUT` holds `performer/fast_attention/{jax,tensorflow}` of
https://github.com/google-research/google-research. The arrays beside this file were made with
commit 0c1bbe5fc971a1de1a427debc814e66ab4f1e7fa of it and performer-pytorch 1.1.4, on CPU with
Python 3.11, NumPy 2.4.6, JAX 0.10.2, TensorFlow 2.21.0 and PyTorch 2.13.0. It takes half a minute
on two cores.

The peers' code is imported and run, never changed on disk; where a constant is not an argument
(performer-pytorch) it is bound at run time. Every output is checked against a float64 NumPy loop
of this file before anything is written, so a change in a peer's semantics stops the script.
README.md says what each array is.
"""

import argparse
import functools
import importlib
import inspect
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

BATCH, LENGTH, NUM_HEADS, VALUE_DIM, NUM_FEATURES = 2, 37, 3, 8, 24
# name -> (seed, head size, scale of query and key).
# "_large": norms at which the shipped epsilons do visible harm, and Google JAX's guard fires.
CASES = {"": (2020, 8, 0.7), "_h16": (2021, 16, 0.7), "_large": (2022, 8, 1.4)}
RELU_EPSILON = 1e-3  # the default of all three projects
AGREEMENT = 1e-6  # relative RMS between a float32 output and its float64 truth

Arrays = dict[str, np.ndarray]


class Shipped(NamedTuple):
    """How a project departs, as shipped, from the eps=0 definition."""

    epsilon: float  # added to every feature, relative to exp of the largest w.x
    key_sum_epsilon: float = 0.0  # added to the key sum, causal only
    guard: float = 0.0  # a denominator at or below it grows by twice as much


GOOGLE_JAX = Shipped(epsilon=1e-6, guard=1e-6)
GOOGLE_TF = Shipped(epsilon=1e-6)
PERFORMER_PYTORCH = Shipped(epsilon=1e-4, key_sum_epsilon=1e-6)


# --- Inputs ---------------------------------------------------------------------------------


def orthogonal_projection(rng: np.random.Generator, num_features: int, dim: int) -> np.ndarray:
    """Rows orthogonal within each block of `dim`, row norms those of Gaussian vectors."""
    blocks = []
    for _ in range(-(-num_features // dim)):
        q, r = np.linalg.qr(rng.standard_normal((dim, dim)))
        blocks.append((q * np.sign(np.diag(r))).T)  # the sign makes q uniform
    norms = np.linalg.norm(rng.standard_normal((num_features, dim)), axis=1)
    return norms[:, None] * np.concatenate(blocks)[:num_features]


def make_inputs(seed: int, dim: int, scale: float) -> Arrays:
    rng = np.random.default_rng(seed)
    qk_shape = (BATCH, LENGTH, NUM_HEADS, dim)
    inputs = {
        "query": scale * rng.standard_normal(qk_shape),
        "key": scale * rng.standard_normal(qk_shape),
        "value": rng.standard_normal((BATCH, LENGTH, NUM_HEADS, VALUE_DIM)),
        "projection": orthogonal_projection(rng, NUM_FEATURES, dim),
    }
    return {name: array.astype(np.float32) for name, array in inputs.items()}


# --- The truth, in float64 ------------------------------------------------------------------


def exponential_features(x: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """M^(-1/2) exp(w.x - |x|^2/2) of x H^(-1/4): no maximum, no epsilon."""
    x = x.astype(np.float64) * x.shape[-1] ** -0.25
    w = projection.astype(np.float64)
    half_norm = np.sum(x * x, axis=-1, keepdims=True) / 2
    return np.exp(x @ w.T - half_norm) * w.shape[0] ** -0.5


def legacy_exponential_features(
    x: np.ndarray, projection: np.ndarray, *, is_query: bool, epsilon: float
) -> np.ndarray:
    """The features as the peers ship them.

    The epsilon is relative to exp of the largest w.x: over the features for a query, over the
    features *and all positions* of a batch item and head for a key. |x|^2/2 is not part of that
    maximum, and for a key it depends on later keys, also in the causal mode.
    """
    x = x.astype(np.float64) * x.shape[-1] ** -0.25
    w = projection.astype(np.float64)
    half_norm = np.sum(x * x, axis=-1, keepdims=True) / 2
    scores = x @ w.T  # (B, T, N, M)
    largest = np.max(scores, axis=-1 if is_query else (1, 3), keepdims=True)
    return (np.exp(scores - half_norm - largest) + epsilon) * w.shape[0] ** -0.5


def relu_features(
    x: np.ndarray, projection: np.ndarray | None, *, scale_data: bool, scale_features: bool
) -> np.ndarray:
    """relu(W x) + 1e-3, with H^(-1/4) before W and M^(-1/2) after it where asked for."""
    x = x.astype(np.float64)
    if scale_data:
        x = x * x.shape[-1] ** -0.25
    if projection is not None:
        x = x @ projection.astype(np.float64).T
    if scale_features:
        x = x * x.shape[-1] ** -0.5
    return np.maximum(x, 0.0) + RELU_EPSILON


def attention_loop(
    phi_q: np.ndarray,
    phi_k: np.ndarray,
    value: np.ndarray,
    *,
    causal: bool,
    key_sum_epsilon: float = 0.0,
    guard: float = 0.0,
) -> np.ndarray:
    """Sum_s w_ts v_s / Sum_s w_ts with w_ts = phi(q_t).phi(k_s), pair by pair."""
    output = np.zeros((*phi_q.shape[:-1], value.shape[-1]))
    for b, t, n in np.ndindex(*phi_q.shape[:3]):
        numerator = np.zeros(value.shape[-1])
        denominator = key_sum_epsilon * np.sum(phi_q[b, t, n])
        for s in range(t + 1 if causal else phi_k.shape[1]):
            weight = float(np.dot(phi_q[b, t, n], phi_k[b, s, n]))
            numerator += weight * value[b, s, n].astype(np.float64)
            denominator += weight
        if guard and abs(denominator / guard - 1) < 1e-4:
            raise SystemExit("A denominator is too near the guard for float32: change the seed.")
        if denominator <= guard:
            denominator += 2 * guard
        output[b, t, n] = numerator / denominator
    return output


# --- The peers ------------------------------------------------------------------------------


def google_jax(inputs: Arrays, make: Callable[[], Callable], projection: bool) -> np.ndarray:
    """Calls what `make` returns: a bound method, whose projection is set to ours."""
    jnp = importlib.import_module("jax.numpy")
    attention = make()
    if projection:
        attention.__self__.projection_matrix = jnp.asarray(inputs["projection"])
    return np.asarray(attention(*(jnp.asarray(inputs[x]) for x in ("query", "key", "value"))))


def google_jax_softmax(inputs: Arrays, causal: bool, epsilon: float) -> np.ndarray:
    module = importlib.import_module("performer.fast_attention.jax.fast_attention")
    make = functools.partial(
        module.make_fast_softmax_attention,
        inputs["query"].shape[-1],
        nb_features=NUM_FEATURES,
        numerical_stabilizer=epsilon,
        redraw_features=False,
        unidirectional=causal,
    )
    return google_jax(inputs, make, projection=True)


def google_jax_relu(inputs: Arrays, causal: bool, projection: bool) -> np.ndarray:
    module = importlib.import_module("performer.fast_attention.jax.fast_attention")
    make = functools.partial(
        module.make_fast_generalized_attention,
        inputs["query"].shape[-1],
        nb_features=NUM_FEATURES,
        features_type="ortho" if projection else "deterministic",
        kernel_epsilon=RELU_EPSILON,
        unidirectional=causal,
    )
    return google_jax(inputs, make, projection=projection)


def google_tf(inputs: Arrays, causal: bool, transformation: str, epsilon: float) -> np.ndarray:
    tf = importlib.import_module("tensorflow")
    module = importlib.import_module("performer.fast_attention.tensorflow.fast_attention")
    kernel = functools.partial(getattr(module, transformation), numerical_stabilizer=epsilon)
    query, key, value, projection = (
        tf.constant(inputs[x]) for x in ("query", "key", "value", "projection")
    )
    return module.favor_attention(query, key, value, kernel, causal, projection).numpy()


def performer_pytorch(
    inputs: Arrays, causal: bool, *, generalized: bool, epsilon: float, key_sum_epsilon: float
) -> np.ndarray:
    """`FastAttention.forward` with the two default epsilons bound to the given ones."""
    torch = importlib.import_module("torch")
    module = importlib.import_module("performer_pytorch.performer_pytorch")
    attention = module.FastAttention(
        dim_heads=inputs["query"].shape[-1],
        nb_features=NUM_FEATURES,
        causal=causal,
        generalized_attention=generalized,
    )
    attention.projection_matrix.copy_(torch.from_numpy(inputs["projection"]))
    if causal:
        attention.causal_linear_fn = functools.partial(
            module.causal_linear_attention_noncuda, eps=key_sum_epsilon
        )
    # Its tensors are (B, N, T, H).
    query, key, value = (
        torch.from_numpy(np.swapaxes(inputs[x], 1, 2).copy()) for x in ("query", "key", "value")
    )
    original = module.softmax_kernel
    module.softmax_kernel = functools.partial(original, eps=epsilon)
    try:
        with torch.no_grad():
            output = attention(query, key, value)
    finally:
        module.softmax_kernel = original
    return np.ascontiguousarray(np.swapaxes(output.numpy(), 1, 2))


def check_defaults() -> None:
    """The epsilons named here are those that the peers ship."""
    jax_module = importlib.import_module("performer.fast_attention.jax.fast_attention")
    tf_module = importlib.import_module("performer.fast_attention.tensorflow.fast_attention")
    torch_module = importlib.import_module("performer_pytorch.performer_pytorch")
    for function, parameter, expected in (
        (jax_module.make_fast_softmax_attention, "numerical_stabilizer", GOOGLE_JAX.epsilon),
        (jax_module.make_fast_softmax_attention, "numerical_stabilizer", GOOGLE_JAX.guard),
        (jax_module.make_fast_generalized_attention, "kernel_epsilon", RELU_EPSILON),
        (jax_module.make_fast_generalized_attention, "numerical_stabilizer", 0.0),
        (tf_module.softmax_kernel_transformation, "numerical_stabilizer", GOOGLE_TF.epsilon),
        (tf_module.relu_kernel_transformation, "numerical_stabilizer", RELU_EPSILON),
        (torch_module.softmax_kernel, "eps", PERFORMER_PYTORCH.epsilon),
        (torch_module.generalized_kernel, "kernel_epsilon", RELU_EPSILON),
        (torch_module.causal_linear_attention_noncuda, "eps", PERFORMER_PYTORCH.key_sum_epsilon),
    ):
        default = inspect.signature(function).parameters[parameter].default
        if default != expected:
            raise SystemExit(
                f"{function.__name__}: expected the default {parameter}={expected}. "
                f"Received: {default}"
            )


# --- Files ----------------------------------------------------------------------------------


def distance(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative RMS."""
    difference = actual.astype(np.float64) - expected
    return float(np.sqrt(np.mean(difference**2) / np.mean(expected.astype(np.float64) ** 2)))


def check(label: str, actual: np.ndarray, truth: np.ndarray) -> None:
    error = distance(actual, truth)
    if actual.dtype != np.float32 or not np.all(np.isfinite(actual)) or not error < AGREEMENT:
        raise SystemExit(
            f"{label}: expected finite float32 within {AGREEMENT:.0e} of the float64 loop. "
            f"Received: dtype={actual.dtype}, relative RMS={error:.2e}."
        )


def report(label: str, truth_error: float, shipped: float | None = None) -> None:
    tail = "" if shipped is None else f"   shipped to eps=0: {shipped:.2e}"
    print(f"{label:45s} to float64: {truth_error:.1e}{tail}")


def softmax_file(
    name: str, inputs: Arrays, shipped_as: Shipped, run: Callable[[bool, bool], np.ndarray]
) -> Arrays:
    """All arrays of one softmax-kernel file; `run(causal, shipped)` calls the peer."""
    arrays = dict(inputs)
    query, key, value, projection = (inputs[x] for x in ("query", "key", "value", "projection"))
    phi_q, phi_k = exponential_features(query, projection), exponential_features(key, projection)
    legacy = functools.partial(
        legacy_exponential_features, projection=projection, epsilon=shipped_as.epsilon
    )
    legacy_q, legacy_k = legacy(query, is_query=True), legacy(key, is_query=False)
    for mode, causal in (("bidirectional", False), ("causal", True)):
        truth = attention_loop(phi_q, phi_k, value, causal=causal)
        shipped_truth = attention_loop(
            legacy_q,
            legacy_k,
            value,
            causal=causal,
            key_sum_epsilon=shipped_as.key_sum_epsilon * causal,
            guard=shipped_as.guard,
        )
        eps0, shipped = run(causal, False), run(causal, True)
        check(f"{name} {mode} eps=0", eps0, truth)
        check(f"{name} {mode} shipped", shipped, shipped_truth)
        report(f"{name} {mode}", distance(eps0, truth), distance(shipped, eps0))
        arrays[f"{mode}_eps0"] = eps0
        arrays[f"{mode}_shipped"] = shipped
        arrays[f"{mode}_float64"] = truth
    return arrays


def relu_arrays(
    name: str,
    inputs: Arrays,
    run: Callable[[bool], np.ndarray],
    *,
    projection: bool,
    scale_data: bool,
    scale_features: bool,
    suffix: str = "",
) -> Arrays:
    """The outputs of one ReLU kernel and their truth; `run(causal)` calls the peer."""
    matrix = inputs["projection"] if projection else None
    features = functools.partial(
        relu_features, projection=matrix, scale_data=scale_data, scale_features=scale_features
    )
    phi_q, phi_k = features(inputs["query"]), features(inputs["key"])
    arrays = {}
    for mode, causal in (("bidirectional", False), ("causal", True)):
        truth = attention_loop(phi_q, phi_k, inputs["value"], causal=causal)
        output = run(causal)
        check(f"{name} {mode}{suffix}", output, truth)
        report(f"{name} {mode}{suffix}", distance(output, truth))
        arrays[f"{mode}{suffix}"] = output
        arrays[f"{mode}{suffix}_float64"] = truth
    return arrays


def make_files() -> dict[str, Arrays]:
    files: dict[str, Arrays] = {}
    for suffix, (seed, dim, scale) in CASES.items():
        inputs = make_inputs(seed, dim, scale)

        def run_jax(causal: bool, shipped: bool, inputs: Arrays = inputs) -> np.ndarray:
            return google_jax_softmax(inputs, causal, GOOGLE_JAX.epsilon * shipped)

        def run_tf(causal: bool, shipped: bool, inputs: Arrays = inputs) -> np.ndarray:
            kernel = "softmax_kernel_transformation"
            return google_tf(inputs, causal, kernel, GOOGLE_TF.epsilon * shipped)

        def run_torch(causal: bool, shipped: bool, inputs: Arrays = inputs) -> np.ndarray:
            return performer_pytorch(
                inputs,
                causal,
                generalized=False,
                epsilon=PERFORMER_PYTORCH.epsilon * shipped,
                key_sum_epsilon=PERFORMER_PYTORCH.key_sum_epsilon * shipped,
            )

        for name, shipped_as, run in (
            ("google_jax_softmax", GOOGLE_JAX, run_jax),
            ("google_tf_softmax", GOOGLE_TF, run_tf),
            ("performer_pytorch_softmax", PERFORMER_PYTORCH, run_torch),
        ):
            files[name + suffix] = softmax_file(name + suffix, inputs, shipped_as, run)

    inputs = make_inputs(*CASES[""])
    name = "google_jax_relu"
    files[name] = dict(inputs)
    for projection, suffix in ((False, ""), (True, "_projected")):
        files[name] |= relu_arrays(
            name,
            inputs,
            functools.partial(google_jax_relu, inputs, projection=projection),
            projection=projection,
            scale_data=False,
            scale_features=False,
            suffix=suffix,
        )
    name = "google_tf_relu"
    files[name] = dict(inputs) | relu_arrays(
        name,
        inputs,
        functools.partial(
            google_tf, inputs, transformation="relu_kernel_transformation", epsilon=RELU_EPSILON
        ),
        projection=True,
        scale_data=False,
        scale_features=True,
    )
    name = "performer_pytorch_relu"
    run_relu = functools.partial(performer_pytorch, inputs, generalized=True, epsilon=0.0)
    files[name] = dict(inputs) | relu_arrays(
        name,
        inputs,
        functools.partial(run_relu, key_sum_epsilon=0.0),
        projection=True,
        scale_data=True,
        scale_features=False,
    )
    shipped = run_relu(True, key_sum_epsilon=PERFORMER_PYTORCH.key_sum_epsilon)
    features = functools.partial(
        relu_features, projection=inputs["projection"], scale_data=True, scale_features=False
    )
    truth = attention_loop(
        features(inputs["query"]),
        features(inputs["key"]),
        inputs["value"],
        causal=True,
        key_sum_epsilon=PERFORMER_PYTORCH.key_sum_epsilon,
    )
    check(f"{name} causal shipped", shipped, truth)
    change = distance(shipped, files[name]["causal"])
    report(f"{name} causal_shipped", distance(shipped, truth), change)
    files[name]["causal_shipped"] = shipped
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--google-research", type=pathlib.Path, required=True)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    arguments = parser.parse_args()
    if not (arguments.google_research / "performer" / "fast_attention").is_dir():
        parser.error(
            "--google-research must hold performer/fast_attention. "
            f"Received: {arguments.google_research}"
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the arrays are CPU results
    sys.path.insert(0, str(arguments.google_research))

    check_defaults()
    for name, arrays in make_files().items():
        for key, array in arrays.items():
            if not np.all(np.isfinite(array)):
                raise SystemExit(f"{name}.npz: {key} has values that are not finite.")
        path = arguments.output / f"{name}.npz"
        # NumPy's signature takes a keyword for one of its own, `allow_pickle`.
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"wrote {path.name}: {path.stat().st_size / 1024:.0f} KiB, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
