"""What the fused kernels share: when they apply, and the algorithm around them in `keras.ops`.

Features live on chip only. A kernel computes those of one chunk of tokens from the tokens and the
projection, block of features by block, wherever it needs them; what is written to memory are
outputs, sums and one or two numbers a token. `_triton.py` and `_pallas.py` hold the same five
kernels, each for its backend, and make of `forward` and `backward` one differentiable function.

**Scales** are those of `_sums.py`, but every one is known before features are summed: `tops` gives
the largest log feature of each token, and running maxima of the keys' log scales give the scale of
each state and the maximum of each row. So the blocks of features are independent of each other.

**Backward.** With w_ij = exp(a_j - r_i) (phi_i . phi_j), out_i = sum_j w_ij v_j / den_i and a
cotangent g_i of out_i, the gradient by w_ij is (g_i . v_j - g_i . out_i) / den_i. Keys of earlier
chunks enter it through the state that a chunk begins with, queries of later chunks through sums of
phi_i g_i / den_i and -phi_i (g_i . out_i) / den_i, walked backwards at the scales of the forward
states. Both are recomputed; nothing is recovered by subtraction.

Tensors are laid out per key/value head, P = B K of them: query (P, G, T, H), key (P, S, H), value
(P, S, V), and the rows of the projection (M, H), scaled by H^(-1/4). All axes but P and G are
padded with zeros to multiples of the kernels' blocks.
"""

import dataclasses
import importlib
import importlib.util
from typing import Any, NamedTuple

import keras
from keras import ops

from keras_performer.ops._chunks import LOG_ZERO, dtype_of, exp, pad
from keras_performer.ops._sums import as_state, initial_carry

FEATURE_BLOCK = 32
"""Features that a kernel holds at a time."""
_LARGEST_HEAD = 128
_NEEDS_AMPERE = "needs the on-chip memory of an NVIDIA GPU of compute capability 8.0 or later."
_FAVOR_PLUS = "keras_performer>FavorPlus"


class Call(NamedTuple):
    """What is fixed when a call is compiled."""

    causal: bool
    head_dim: int  # before padding
    num_features: int  # before padding
    query_chunk: int
    key_chunk: int
    exact_products: bool  # 16-bit tensors lose nothing to products of ten-bit mantissas


class Scales(NamedTuple):
    """Factors at most one, from the keys' log scales; n chunks of keys."""

    begin: Any  # of the initial sums, (P, 1)
    decay: Any  # of the sums over a chunk, (P, n)
    key_weight: Any  # of a key in the sums that leave its chunk, (P, S)
    read_weight: Any  # of a row's read of the sums, (P, T)
    row_max: Any  # log of the largest weight that a row sees, (P, T)
    last: Any  # log scale of the last sums, (P, 1)


@dataclasses.dataclass(frozen=True)
class Fused:
    """Kernels as an implementation of `favor_attention`; `name` is also that of their module."""

    name: str
    backend: str

    def why_not(
        self,
        tensors: tuple[Any, ...],
        feature_map: Any,
        *,
        exact_window: int | None,
        segmented: bool,
        **options: Any,
    ) -> str | None:
        """Say in one sentence why these kernels cannot run, or return None."""
        del options
        if keras.backend.backend() != self.backend:
            return (
                f"implementation={self.name!r} runs on the {self.backend} backend. "
                f"Received: keras.backend.backend()={keras.backend.backend()!r}."
            )
        where = _why_not_triton if self.name == "triton" else _why_not_pallas
        refusal = where(tensors)
        if refusal is not None:
            return f"implementation={self.name!r} {refusal}"
        if exact_window or segmented:
            what = f"exact_window={exact_window}" if exact_window else "segment_ids"
            return (
                f"implementation={self.name!r} has neither an exact near field nor segments: "
                f"take 'auto'. Received: {what}."
            )
        if keras.saving.get_registered_name(type(feature_map)) != _FAVOR_PLUS or (
            not feature_map.log_space
        ):
            return (
                f"implementation={self.name!r} knows the features of FavorPlus without "
                f"legacy_epsilon only. Received: feature_map={feature_map!r}."
            )
        for tensor in tensors:
            received = f"Received: {dtype_of(tensor)} of shape {tuple(tensor.shape)}."
            if dtype_of(tensor) == "float64":
                return f"implementation={self.name!r} accumulates in float32. {received}"
            if not all(isinstance(size, int) for size in tensor.shape):
                return f"implementation={self.name!r} needs static shapes. {received}"
            if tensor.shape[-1] > _LARGEST_HEAD:
                return (
                    f"implementation={self.name!r} holds heads of at most {_LARGEST_HEAD} on chip. "
                    f"{received}"
                )
        return None

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        feature_map: Any,
        operands: tuple[Any, ...],
        *,
        causal: bool,
        key_mask: Any,
        runs: Any,
        state: dict[str, Any] | None,
    ) -> tuple[Any, dict[str, Any]]:
        """Compute attention; see `_chunked.attend`. The tensors are of any type but float64."""
        del runs
        batch, num_heads, num_groups, length, head_dim = query.shape
        num_keys, value_dim, num_features = key.shape[2], value.shape[3], feature_map.feature_dim
        heads = batch * num_heads
        if state is None:
            sums = ops.zeros((batch, num_heads, num_features, value_dim + 1), "float32")
            scale = ops.zeros((batch, num_heads, 1, 1), "float32") + LOG_ZERO
        else:
            sums, scale = initial_carry(state, key, value, feature_map)
        rows = ops.cast(operands[0], "float32") * head_dim**-0.25
        if feature_map.hyperbolic:
            rows = ops.concatenate([rows, -rows], axis=0)
        if key_mask is None:
            key_mask = ops.ones((batch, 1, num_keys), "bool")
        key_mask = ops.broadcast_to(key_mask, (batch, num_heads, num_keys))
        exact_products = any(dtype_of(x) == "float32" for x in (query, key, value))
        # As many tokens as registers hold.
        largest = 64 // (2 if exact_products else 1) // (2 if max(head_dim, value_dim) > 64 else 1)
        call = Call(
            causal=causal,
            head_dim=head_dim,
            num_features=num_features,
            query_chunk=min(largest, _power_of_two(length)),
            key_chunk=min(largest, _power_of_two(num_keys)),
            exact_products=exact_products,
        )
        features = _multiple(num_features, min(FEATURE_BLOCK, _power_of_two(num_features)))
        head, width = _power_of_two(head_dim), _power_of_two(value_dim)
        padded_queries = _multiple(length, call.query_chunk)
        padded_keys = _multiple(num_keys, call.key_chunk)

        def laid_out(x: Any, shape: tuple[int, ...], padded: tuple[int, ...]) -> Any:
            x = ops.reshape(x, shape)
            for axis, size in enumerate(padded):
                x = pad(x, axis, size)
            return x

        output, last_sums, last_key_sums, last = self._kernels().attend(
            call,
            laid_out(
                query,
                (heads, num_groups, length, head_dim),
                (heads, num_groups, padded_queries, head),
            ),
            laid_out(key, (heads, num_keys, head_dim), (heads, padded_keys, head)),
            laid_out(value, (heads, num_keys, value_dim), (heads, padded_keys, width)),
            laid_out(rows, (num_features, head_dim), (features, head)),
            laid_out(sums[..., :-1], (heads, num_features, value_dim), (heads, features, width)),
            laid_out(sums[..., -1], (heads, num_features), (heads, features)),
            ops.reshape(scale, (heads, 1)),
            laid_out(key_mask, (heads, num_keys), (heads, padded_keys)),
        )
        output = ops.reshape(
            output[:, :, :length, :value_dim],
            (batch, num_heads, num_groups, length, value_dim),
        )
        last_sums = ops.concatenate(
            [
                last_sums[:, :num_features, :value_dim],
                ops.expand_dims(last_key_sums[:, :num_features], -1),
            ],
            axis=-1,
        )
        carry = (
            ops.reshape(last_sums, (batch, num_heads, num_features, value_dim + 1)),
            ops.reshape(last, (batch, num_heads, 1, 1)),
        )
        return output, as_state(carry)

    def _kernels(self) -> Any:
        """The module of the kernels, which needs what not every installation has."""
        return importlib.import_module(f"keras_performer.ops._{self.name}")


TRITON = Fused("triton", "torch")
PALLAS = Fused("pallas", "jax")


def _why_not_triton(tensors: tuple[Any, ...]) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton."
    if TRITON._kernels().INTERPRETED:
        return None
    if not all(tensor.device.type == "cuda" for tensor in tensors):
        return (
            "needs tensors on a GPU, or its interpreter: set TRITON_INTERPRET=1 before Python "
            f"starts. Received: tensors on {', '.join(str(t.device) for t in tensors)}."
        )
    import torch

    if torch.version.cuda is None:
        return f"{_NEEDS_AMPERE} Received: torch {torch.__version__}."
    capability = torch.cuda.get_device_capability(tensors[0].device)
    return None if capability >= (8, 0) else f"{_NEEDS_AMPERE} Received: {capability}."


def _why_not_pallas(tensors: tuple[Any, ...]) -> str | None:
    del tensors
    import jax

    platform = jax.default_backend()
    if platform == "cpu":  # interpreted
        return None
    if platform != "gpu":
        return f"is for GPUs. Received: jax.default_backend()={platform!r}."
    if keras.distribution.distribution() is not None:
        return "is not spread over devices by keras.distribution: take 'auto'."
    capability = jax.devices()[0].compute_capability  # "gfx942" or the like on AMD
    if capability.startswith("gfx") or float(capability) < 8:
        return f"{_NEEDS_AMPERE} Received: {capability!r}."
    return None


def _power_of_two(size: int) -> int:
    """The next power of two that a matrix product on chip takes."""
    return max(16, 1 << (size - 1).bit_length())


def _multiple(size: int, block: int) -> int:
    return -(-size // block) * block


# The algorithm. `kernels` is one of the two modules.


def forward(
    kernels: Any,
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    rows: Any,
    sums: Any,
    key_sums: Any,
    first: Any,
    mask: Any,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Compute the output, the last sums, key sums and log scale, and what `backward` needs.

    Args:
        kernels: The module of the kernels.
        call: What is fixed.
        query: (P, G, T, H).
        key: (P, S, H).
        value: (P, S, V).
        rows: The scaled projection (M, H), float32.
        sums: Initial sums (P, M, V), float32.
        key_sums: Initial sums of features (P, M), float32.
        first: The log scale of both (P, 1).
        mask: Boolean (P, S).
    """
    top_q, _ = kernels.tops(call, query, rows, call.query_chunk)
    top_k, half_norm = kernels.tops(call, key, rows, call.key_chunk)
    log_scale = ops.where(mask, top_k - half_norm, LOG_ZERO)
    scales = _scales(kernels, call, log_scale, first, query.shape[2])
    states, last_sums, last_key_sums = _key_states(
        kernels, call, key, top_k, value, rows, sums, key_sums, scales
    )
    output, inverse = kernels.read(
        call, query, top_q, key, top_k, value, log_scale, scales, rows, *states
    )
    saved = (query, key, value, rows, sums, key_sums, first, top_q, top_k, log_scale)
    return (output, last_sums, last_key_sums, scales.last), (*saved, output, inverse)


def backward(
    kernels: Any, call: Call, saved: tuple[Any, ...], cotangents: tuple[Any, ...], by_rows: bool
) -> tuple[Any, ...]:
    """Gradients by query, key, value, rows (None unless `by_rows`), sums and key sums."""
    query, key, value, rows, sums, key_sums, first, top_q, top_k, log_scale = saved[:10]
    output, inverse = saved[10:]
    d_output, d_last_sums, d_last_key_sums = cotangents
    scales = _scales(kernels, call, log_scale, first, query.shape[2])
    states, _, _ = _key_states(kernels, call, key, top_k, value, rows, sums, key_sums, scales)
    slope = -ops.sum(ops.cast(d_output, "float32") * ops.cast(output, "float32"), axis=-1)
    row_weight = ops.expand_dims(scales.read_weight, 1) * inverse
    decay = scales.decay
    if not call.causal:
        num_chunks = query.shape[2] // call.query_chunk
        decay = ops.ones((key.shape[0], num_chunks), "float32")
    *later, d_sums, d_key_sums = kernels.walk(
        call,
        query,
        top_q,
        row_weight,
        d_output,
        slope,
        decay,
        rows,
        d_last_sums,
        d_last_key_sums,
        reverse=True,
    )
    later = later if call.causal else _single_state(d_sums, d_key_sums)
    tokens = (query, top_q, key, top_k, value, log_scale, scales, rows)
    cotangent = (d_output, slope, inverse)
    d_query, by_query = kernels.grad_query(call, *tokens, *states, *cotangent, by_rows=by_rows)
    d_key, d_value, by_key = kernels.grad_key(call, *tokens, *later, *cotangent, by_rows=by_rows)
    d_rows = ops.sum(by_query, axis=(0, 1)) + ops.sum(by_key, axis=(0, 1)) if by_rows else None
    d_sums = d_sums * ops.expand_dims(scales.begin, -1)
    return d_query, d_key, d_value, d_rows, d_sums, d_key_sums * scales.begin


def _scales(kernels, call, log_scale, first, length):
    if call.causal:
        # The maximum before each key, and after the last.
        running = kernels.running_max(ops.concatenate([first, log_scale], axis=1))
        entering = running[:, : -1 : call.key_chunk]
        leaving = running[:, call.key_chunk :: call.key_chunk]
        # Above the log of zero, so that what a row must not see weighs nothing.
        row_max = ops.maximum(running[:, 1:], LOG_ZERO / 2)
        read = ops.repeat(entering, call.key_chunk, axis=1)
        last = running[:, -1:]
    else:
        last = ops.maximum(first, ops.max(log_scale, axis=1, keepdims=True))
        shape = (log_scale.shape[0], log_scale.shape[1] // call.key_chunk)
        entering = leaving = ops.broadcast_to(last, shape)
        read = ops.broadcast_to(last, (log_scale.shape[0], length))
        row_max = ops.maximum(read, LOG_ZERO / 2)
    weight = exp(log_scale - ops.repeat(leaving, call.key_chunk, axis=1))
    return Scales(
        begin=exp(first - entering[:, :1]),
        decay=exp(entering - leaving),
        key_weight=ops.where(log_scale > LOG_ZERO / 2, weight, 0.0),
        read_weight=exp(read - row_max),
        row_max=row_max,
        last=last,
    )


def _key_states(kernels, call, key, top_k, value, rows, sums, key_sums, scales):
    """The sums that each chunk of queries reads, (P, n, M, V) and (P, n, M), and the last ones."""
    *states, last_sums, last_key_sums = kernels.walk(
        call,
        ops.expand_dims(key, 1),
        ops.expand_dims(top_k, 1),
        ops.expand_dims(scales.key_weight, 1),
        ops.expand_dims(value, 1),
        ops.ones_like(ops.expand_dims(top_k, 1)),
        scales.decay,
        rows,
        sums * ops.expand_dims(scales.begin, -1),
        key_sums * scales.begin,
        reverse=False,
    )
    if not call.causal:
        states = _single_state(last_sums, last_key_sums)
    return states, last_sums, last_key_sums


def _single_state(sums, key_sums):
    return [ops.expand_dims(sums, 1), ops.expand_dims(key_sums, 1)]
