"""The fused kernels for JAX, in Pallas by way of Triton. See `_fused.py` for what they compute.

On a CPU they are interpreted, which is for tests.
"""

import functools
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

from keras_performer.ops import _fused
from keras_performer.ops._chunks import LOG_ZERO
from keras_performer.ops._sums import _RANGE

# What the kernels are made of.


def _product(call, a, b):
    precision = lax.Precision.HIGHEST if call.exact_products else lax.Precision.DEFAULT
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _wide(tile):
    return tile.astype(jnp.float32)


def _exists(call, start, size):
    """Which of `size` features are no padding, (1, F)."""
    return (start + jnp.arange(size))[None, :] < call.num_features


def _features(call, x, rows, top, exists):
    """Features (C, F) of tokens (C, H) by a block of rows (F, H), and which are above the floor."""
    values = _product(call, x, rows.T) - top[:, None]
    phi = jnp.where(exists, jnp.exp(jnp.maximum(values, -_RANGE)), 0.0)
    return phi, values > -_RANGE


def _pair_weights(log_scale, row_max):
    """Factors exp(a_j - r_i) of the pairs of one chunk (queries, keys), zero for later keys."""
    place = jnp.arange(log_scale.shape[0])
    visible = place[:, None] >= place[None, :]
    return jnp.exp(jnp.where(visible, log_scale[None, :] - row_max[:, None], LOG_ZERO))


def _over_features(call, rows, body, carry):
    """Run `carry = body(place, rows of a block of features, which of them exist, carry)`."""
    size = min(_fused.FEATURE_BLOCK, rows.shape[0])

    def step(i, carry):
        here = pl.ds(i * size, size)
        return body(here, rows[here, :], _exists(call, i * size, size), carry)

    return lax.fori_loop(0, rows.shape[0] // size, step, carry)


# The kernels.


def _tops_kernel(x, rows, top, half_norm, *, call):
    tokens = _wide(x[...])

    def widen(here, block, exists, largest):
        values = _product(call, tokens, block.T)
        return jnp.maximum(largest, jnp.max(jnp.where(exists, values, -jnp.inf), axis=1))

    largest = jnp.full(tokens.shape[:1], -jnp.inf, jnp.float32)
    top[...] = _over_features(call, rows, widen, largest)
    norm = jnp.sum(tokens * tokens, axis=1)
    half_norm[...] = 0.5 * call.head_dim**-0.5 * norm + 0.5 * math.log(call.num_features)


def _walk_kernel(
    x,
    top,
    weight,
    value,
    extra,
    decay,
    rows,
    first,
    first_extra,
    last,
    last_extra,
    *kept,
    call,
    reverse,
    num_blocks,
):
    num_groups, length, _ = x.shape
    num_chunks = decay.shape[0]
    chunk_length = length // num_chunks
    block = rows[...]
    number = lax.rem(pl.program_id(0), num_blocks)
    exists = _exists(call, number * block.shape[0], block.shape[0])

    def add(step, carry):
        sums, extra_sums = carry
        chunk = num_chunks - 1 - step if reverse else step
        if kept:
            kept[0][chunk], kept[1][chunk] = sums, extra_sums
        here = pl.ds(chunk * chunk_length, chunk_length)

        def add_group(group, carry):
            sums, extra_sums = carry
            phi, _ = _features(call, _wide(x[group, here, :]), block, top[group, here], exists)
            phi = phi * weight[group, here][:, None]
            values = _wide(value[group, here, :])
            sums = sums + _product(call, phi.T, values)
            return sums, extra_sums + jnp.sum(phi * extra[group, here][:, None], axis=0)

        factor = decay[chunk]
        return lax.fori_loop(0, num_groups, add_group, (sums * factor, extra_sums * factor))

    last[...], last_extra[...] = lax.fori_loop(0, num_chunks, add, (first[...], first_extra[...]))


def _read_kernel(
    query,
    top_q,
    key,
    top_k,
    value,
    log_scale,
    row_max,
    read_weight,
    rows,
    states,
    state_sums,
    output,
    inverse,
    *,
    call,
):
    queries, query_top = _wide(query[...]), top_q[...]
    if call.causal:
        keys, key_top = _wide(key[...]), top_k[...]

    def add(here, block, exists, carry):
        total, denominator, scores = carry
        phi_q, _ = _features(call, queries, block, query_top, exists)
        total = total + _product(call, phi_q, states[here, :])
        denominator = denominator + jnp.sum(phi_q * state_sums[here][None, :], axis=1)
        if call.causal:
            phi_k, _ = _features(call, keys, block, key_top, exists)
            scores = scores + _product(call, phi_q, phi_k.T)
        return total, denominator, scores

    chunk = queries.shape[0]
    shapes = (output.shape, (chunk,), (chunk, chunk))
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    total, denominator, scores = _over_features(call, rows, add, zeros)
    factor = read_weight[...]
    total, denominator = total * factor[:, None], denominator * factor
    if call.causal:
        scores = scores * _pair_weights(log_scale[...], row_max[...])
        total = total + _product(call, scores, _wide(value[...]))
        denominator = denominator + jnp.sum(scores, axis=1)
    seen = denominator > 0
    reciprocal = jnp.where(seen, 1.0 / jnp.where(seen, denominator, 1.0), 0.0)
    output[...] = (total * reciprocal[:, None]).astype(output.dtype)
    inverse[...] = reciprocal


def _grad_query_kernel(
    query,
    top_q,
    key,
    top_k,
    value,
    log_scale,
    row_max,
    read_weight,
    rows,
    states,
    state_sums,
    d_output,
    slope,
    inverse,
    d_query,
    *d_rows,
    call,
):
    queries, query_top = _wide(query[...]), top_q[...]
    upstream, token_slope, reciprocal = _wide(d_output[...]), slope[...], inverse[...]
    weight = read_weight[...] * reciprocal
    if call.causal:
        keys, key_top = _wide(key[...]), top_k[...]
        pairs = _product(call, upstream, _wide(value[...]).T)
        pairs = (pairs + token_slope[:, None]) * reciprocal[:, None]
        pairs = pairs * _pair_weights(log_scale[...], row_max[...])

    def add(here, block, exists, gradient):
        phi_q, moves = _features(call, queries, block, query_top, exists)
        d_phi = _product(call, upstream, states[here, :].T)
        d_phi = d_phi + token_slope[:, None] * state_sums[here][None, :]
        d_phi = d_phi * weight[:, None]
        if call.causal:
            phi_k, _ = _features(call, keys, block, key_top, exists)
            d_phi = d_phi + _product(call, pairs, phi_k)
        d_values = jnp.where(moves, d_phi * phi_q, 0.0)
        if d_rows:
            d_rows[0][here, :] = _product(call, d_values.T, queries)
        return gradient + _product(call, d_values, block)

    gradient = _over_features(call, rows, add, jnp.zeros(queries.shape, jnp.float32))
    d_query[...] = gradient.astype(d_query.dtype)


def _grad_key_kernel(
    query,
    top_q,
    key,
    top_k,
    value,
    log_scale,
    row_max,
    key_weight,
    rows,
    later,
    later_sums,
    d_output,
    slope,
    inverse,
    d_key,
    d_value,
    *d_rows,
    call,
):
    keys, key_top, values = _wide(key[...]), top_k[...], _wide(value[...])
    weight = key_weight[...]
    if call.causal:
        factors = _pair_weights(log_scale[...], row_max[...])

    def add(here, block, exists, carry):
        gradient, value_gradient, d_scale = carry
        phi_k, moves = _features(call, keys, block, key_top, exists)
        sums = later[here, :]
        value_gradient = value_gradient + _product(call, phi_k * weight[:, None], sums)
        d_phi = _product(call, values, sums.T) + later_sums[here][None, :]
        d_phi = d_phi * weight[:, None]

        def add_group(group, carry):
            d_phi, value_gradient = carry
            upstream = _wide(d_output[group])
            queries = _wide(query[group])
            phi_q, _ = _features(call, queries, block, top_q[group], exists)
            row_factors = factors * inverse[group][:, None]
            pairs = _product(call, upstream, values.T)
            pairs = (pairs + slope[group][:, None]) * row_factors
            scores = _product(call, phi_q, phi_k.T) * row_factors
            return (
                d_phi + _product(call, pairs.T, phi_q),
                value_gradient + _product(call, scores.T, upstream),
            )

        if call.causal:
            carry = (d_phi, value_gradient)
            d_phi, value_gradient = lax.fori_loop(0, query.shape[0], add_group, carry)
        d_values = jnp.where(moves, d_phi * phi_k, 0.0)
        if d_rows:
            d_rows[0][here, :] = _product(call, d_values.T, keys)
        return (
            gradient + _product(call, d_values, block),
            value_gradient,
            d_scale + jnp.sum(d_phi * phi_k, axis=1),
        )

    shapes = (keys.shape, values.shape, key_top.shape)
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    gradient, value_gradient, d_scale = _over_features(call, rows, add, zeros)
    gradient = gradient - call.head_dim**-0.5 * d_scale[:, None] * keys
    d_key[...] = gradient.astype(d_key.dtype)
    d_value[...] = value_gradient.astype(d_value.dtype)


# Their launches, in the terms of `_fused.py`; see the same functions of `_triton.py`.


def tops(call: _fused.Call, x: Any, rows: Any, chunk: int) -> tuple[Any, Any]:
    """The largest projection of tokens (..., L, H), and what `FavorPlus` takes off: (..., L)."""
    tokens = x.reshape(-1, x.shape[-1])
    per_token = ("c", tokens.shape[:1], jnp.float32)
    top, half_norm = _launch(
        functools.partial(_tops_kernel, call=call),
        {"c": tokens.shape[0] // chunk},
        {"c": chunk},
        [("c", tokens), ("", rows)],
        [per_token, per_token],
    )
    return top.reshape(x.shape[:-1]), half_norm.reshape(x.shape[:-1])


def running_max(x: Any) -> Any:
    """The maximum of each row up to each column."""
    return lax.cummax(x, axis=1)


def walk(
    call: _fused.Call,
    x: Any,
    top: Any,
    weight: Any,
    value: Any,
    extra: Any,
    decay: Any,
    rows: Any,
    first: Any,
    first_extra: Any,
    *,
    reverse: bool,
) -> tuple[Any, Any, Any, Any]:
    """Add the features of tokens (P, G, L, H) to sums, chunk by chunk."""
    heads, num_chunks = decay.shape
    outputs = [("pm", t.shape, jnp.float32) for t in (first, first_extra)]
    if call.causal:
        outputs += [("p-m", (heads, num_chunks, *shape[1:]), dtype) for _, shape, dtype in outputs]
    block = min(_fused.FEATURE_BLOCK, rows.shape[0])
    num_blocks = rows.shape[0] // block
    last, last_extra, *kept = _launch(
        functools.partial(_walk_kernel, call=call, reverse=reverse, num_blocks=num_blocks),
        {"m": num_blocks, "p": heads},
        {"m": block},
        [
            *(("p", t) for t in (x, top, weight, value, extra, decay)),
            ("m", rows),
            *(("pm", t) for t in (first, first_extra)),
        ],
        outputs,
    )
    kept_sums, kept_extra = kept or (None, None)
    return kept_sums, kept_extra, last, last_extra


def read(
    call: _fused.Call,
    query: Any,
    top_q: Any,
    key: Any,
    top_k: Any,
    value: Any,
    log_scale: Any,
    scales: _fused.Scales,
    rows: Any,
    states: Any,
    state_sums: Any,
) -> tuple[Any, Any]:
    """The output (P, G, T, V), and the reciprocal of each row's denominator (P, G, T)."""
    heads, num_groups, length, _ = query.shape
    tokens = (query, top_q, key, top_k, value, log_scale)
    output, inverse = _launch(
        functools.partial(_read_kernel, call=call),
        {"c": length // call.query_chunk, "g": num_groups, "p": heads},
        {"c": call.query_chunk},
        _for_queries(call, *tokens, scales, rows, states, state_sums),
        [
            ("pgc", (*query.shape[:-1], value.shape[-1]), query.dtype),
            ("pgc", query.shape[:-1], jnp.float32),
        ],
    )
    return output, inverse


def grad_query(
    call: _fused.Call,
    query: Any,
    top_q: Any,
    key: Any,
    top_k: Any,
    value: Any,
    log_scale: Any,
    scales: _fused.Scales,
    rows: Any,
    states: Any,
    state_sums: Any,
    d_output: Any,
    slope: Any,
    inverse: Any,
    *,
    by_rows: bool,
) -> tuple[Any, Any]:
    """The gradient by the query, and if wanted that by the rows in parts (P, G n, M, H)."""
    heads, num_groups, length, _ = query.shape
    num_chunks = length // call.query_chunk
    tokens = (query, top_q, key, top_k, value, log_scale)
    outputs = [("pgc", query.shape, query.dtype)]
    if by_rows:
        outputs.append(("pgn", (heads, num_groups, num_chunks, *rows.shape), jnp.float32))
    d_query, *d_rows = _launch(
        functools.partial(_grad_query_kernel, call=call),
        {"c": num_chunks, "g": num_groups, "p": heads},
        {"c": call.query_chunk},
        _for_queries(call, *tokens, scales, rows, states, state_sums)
        + [("pgc", t) for t in (d_output, slope, inverse)],
        outputs,
    )
    return d_query, d_rows[0].reshape(heads, -1, *rows.shape) if by_rows else None


def grad_key(
    call: _fused.Call,
    query: Any,
    top_q: Any,
    key: Any,
    top_k: Any,
    value: Any,
    log_scale: Any,
    scales: _fused.Scales,
    rows: Any,
    later: Any,
    later_sums: Any,
    d_output: Any,
    slope: Any,
    inverse: Any,
    *,
    by_rows: bool,
) -> tuple[Any, Any, Any]:
    """The gradients by key and value, and if wanted that by the rows in parts (P, n, M, H)."""
    heads, length, _ = key.shape
    num_chunks = length // call.key_chunk
    # Queries of the chunk meet its keys causally only.
    rowwise, state = ("p-c", "pn") if call.causal else ("p", "p0")
    outputs = [("pc", key.shape, key.dtype), ("pc", value.shape, value.dtype)]
    if by_rows:
        outputs.append(("pn", (heads, num_chunks, *rows.shape), jnp.float32))
    d_key, d_value, *d_rows = _launch(
        functools.partial(_grad_key_kernel, call=call),
        {"c": num_chunks, "p": heads},
        {"c": call.key_chunk},
        [(rowwise, query), (rowwise, top_q), ("pc", key), ("pc", top_k), ("pc", value)]
        + [("pc", log_scale), ("pc" if call.causal else "p", scales.row_max)]
        + [("pc", scales.key_weight), ("", rows), (state, later), (state, later_sums)]
        + [(rowwise, t) for t in (d_output, slope, inverse)],
        outputs,
    )
    return d_key, d_value, d_rows[0] if by_rows else None


def _for_queries(
    call, query, top_q, key, top_k, value, log_scale, scales, rows, states, state_sums
):
    """What a kernel over chunks of queries reads first."""
    keywise, state = ("pc", "pn") if call.causal else ("p", "p0")
    return [
        *(("pgc", t) for t in (query, top_q)),
        *((keywise, t) for t in (key, top_k, value, log_scale)),
        *(("pc", t) for t in (scales.row_max, scales.read_weight)),
        ("", rows),
        *((state, t) for t in (states, state_sums)),
    ]


def _launch(kernel, grid, blocks, inputs, outputs):
    """Run a kernel for every program of `grid`, sizes by letter, the first of which runs fastest.

    A letter says what a program sees of an axis of an input (letters, array) or of an output
    (letters, shape, type): its own block of the size in `blocks`, or else its own slot without the
    axis; with "n" the slot of its chunk "c", with "0" the first, with "-" the whole axis. Axes
    without a letter are seen whole.
    """

    def spec(letters, shape):
        sizes = [
            blocks.get(letter, shape[i] if letter == "-" else None)
            for i, letter in enumerate(letters)
        ]
        rest = shape[len(letters) :]

        def index(program):
            place: dict[str, Any] = {"0": 0, "-": 0}
            for letter, size in grid.items():
                place[letter], program = lax.rem(program, size), lax.div(program, size)
            place["n"] = place.get("c", 0)
            return (*(place[letter] for letter in letters), *(0 for _ in rest))

        return pl.BlockSpec((*sizes, *rest), index)

    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in outputs],
        grid=(math.prod(grid.values()),),  # in one axis, as the others are short
        in_specs=[spec(letters, array.shape) for letters, array in inputs],
        out_specs=[spec(letters, shape) for letters, shape, _ in outputs],
        interpret=jax.default_backend() == "cpu",
        compiler_params=pallas_triton.CompilerParams(num_warps=8, num_stages=1),
    )(*(array for _, array in inputs))


# The differentiable function.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(call: _fused.Call, *tensors: Any) -> Any:
    """`_fused.forward` without what only the backward pass needs, differentiable."""
    return _fused.forward(_KERNELS, call, *tensors)[0]


def _forward(call, *primals):
    results, saved = _fused.forward(_KERNELS, call, *(p.value for p in primals))
    # Whether a gradient is wanted is known here only, and a residual must be an array or None.
    rows = primals[3]
    return results, (saved, rows.value if rows.perturbed else None)


def _instantiated(cotangent: Any) -> Any:
    if not isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return cotangent
    aval: Any = cotangent.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _backward(call, residuals, cotangents):
    saved, wanted = residuals
    cotangents = tuple(_instantiated(c) for c in cotangents[:-1])
    grads = _fused.backward(_KERNELS, call, saved, cotangents, by_rows=wanted is not None)
    return (*grads, None, None)


attend.defvjp(_forward, _backward, symbolic_zeros=True)

_KERNELS = sys.modules[__name__]
