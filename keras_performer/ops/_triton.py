"""The fused kernels for PyTorch, in Triton. See `_fused.py` for what they compute."""

import math
import sys
from typing import Any

import torch
import triton
import triton.language as tl

from keras_performer.ops import _fused
from keras_performer.ops._chunks import LOG_ZERO
from keras_performer.ops._sums import _RANGE

_FLOOR = tl.constexpr(-_RANGE)
_LOG_ZERO = tl.constexpr(LOG_ZERO)


# What the kernels are made of.


@triton.jit
def _tile(pointer, rows, columns, width):
    """Read a tile of a matrix of `width` columns as float32."""
    return tl.load(pointer + rows[:, None] * width + columns[None, :]).to(tl.float32)


@triton.jit
def _features(x, rows, top, feature, num_features, PRECISION: tl.constexpr):
    """Features (C, F) of tokens (C, H) by a block of rows (F, H), and which are at the floor."""
    values = tl.dot(x, tl.trans(rows), input_precision=PRECISION) - top[:, None]
    exists = feature[None, :] < num_features
    phi = tl.where(exists, tl.exp(tl.maximum(values, _FLOOR)), 0.0)
    return phi, values > _FLOOR


@triton.jit
def _pair_weights(log_scale, row_max, CHUNK: tl.constexpr):
    """Factors exp(a_j - r_i) of the pairs of one chunk (queries, keys), zero for later keys."""
    place = tl.arange(0, CHUNK)
    visible = place[:, None] >= place[None, :]
    return tl.exp(tl.where(visible, log_scale[None, :] - row_max[:, None], _LOG_ZERO))


# The kernels.


@triton.jit
def _tops_kernel(
    x,
    rows,
    top,
    half_norm,
    num_features,
    offset,
    norm_scale,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    depth = tl.arange(0, HEAD)
    tokens = _tile(x, token, depth, HEAD)
    largest = tl.full((CHUNK,), float("-inf"), tl.float32)
    for start in range(0, FEATURES, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        block = _tile(rows, feature, depth, HEAD)
        values = tl.dot(tokens, tl.trans(block), input_precision=PRECISION)
        values = tl.where(feature[None, :] < num_features, values, float("-inf"))
        largest = tl.maximum(largest, tl.max(values, axis=1))
    tl.store(top + token, largest)
    tl.store(half_norm + token, tl.sum(tokens * tokens, axis=1) * norm_scale + offset)


@triton.jit
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
    kept,
    kept_extra,
    last,
    last_extra,
    length,
    num_chunks,
    groups,
    num_features,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
    REVERSE: tl.constexpr,
):
    num_blocks: tl.constexpr = FEATURES // BLOCK
    head = (tl.program_id(0) // num_blocks).to(tl.int64)
    feature = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    depth, column = tl.arange(0, HEAD), tl.arange(0, WIDTH)
    block = _tile(rows, feature, depth, HEAD)
    state = head * FEATURES + feature
    cells = state[:, None] * WIDTH + column[None, :]
    sums, extra_sums = tl.load(first + cells), tl.load(first_extra + state)
    for step in range(num_chunks):
        chunk = num_chunks - 1 - step if REVERSE else step
        if KEEP:
            state_kept = (head * num_chunks + chunk) * FEATURES + feature
            cells_kept = state_kept[:, None] * WIDTH + column[None, :]
            tl.store(kept + cells_kept, sums)
            tl.store(kept_extra + state_kept, extra_sums)
        factor = tl.load(decay + head * num_chunks + chunk)
        sums, extra_sums = sums * factor, extra_sums * factor
        for group in range(groups):
            token = (head * groups + group) * length + chunk * CHUNK + tl.arange(0, CHUNK)
            tokens = _tile(x, token, depth, HEAD)
            phi, _ = _features(
                tokens, block, tl.load(top + token), feature, num_features, PRECISION
            )
            phi = phi * tl.load(weight + token)[:, None]
            values = _tile(value, token, column, WIDTH)
            sums += tl.dot(tl.trans(phi), values, input_precision=PRECISION)
            extra_sums += tl.sum(phi * tl.load(extra + token)[:, None], axis=0)
    tl.store(last + cells, sums)
    tl.store(last_extra + state, extra_sums)


@triton.jit
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
    length,
    num_states,
    groups,
    num_features,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    num_chunks = length // CHUNK
    chunk, row = tl.program_id(0) % num_chunks, (tl.program_id(0) // num_chunks).to(tl.int64)
    head = row // groups
    depth, column = tl.arange(0, HEAD), tl.arange(0, WIDTH)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    token, key_token = row * length + place, head * length + place
    queries, query_top = _tile(query, token, depth, HEAD), tl.load(top_q + token)
    if CAUSAL:
        keys, key_top = _tile(key, key_token, depth, HEAD), tl.load(top_k + key_token)
        state = (head * num_states + chunk) * FEATURES
    else:
        state = head * FEATURES
    scores = tl.zeros((CHUNK, CHUNK), tl.float32)
    total = tl.zeros((CHUNK, WIDTH), tl.float32)
    denominator = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, FEATURES, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        block = _tile(rows, feature, depth, HEAD)
        phi_q, _ = _features(queries, block, query_top, feature, num_features, PRECISION)
        sums = _tile(states, state + feature, column, WIDTH)
        total += tl.dot(phi_q, sums, input_precision=PRECISION)
        denominator += tl.sum(phi_q * tl.load(state_sums + state + feature)[None, :], axis=1)
        if CAUSAL:
            phi_k, _ = _features(keys, block, key_top, feature, num_features, PRECISION)
            scores += tl.dot(phi_q, tl.trans(phi_k), input_precision=PRECISION)
    factor = tl.load(read_weight + key_token)
    total, denominator = total * factor[:, None], denominator * factor
    if CAUSAL:
        scores *= _pair_weights(tl.load(log_scale + key_token), tl.load(row_max + key_token), CHUNK)
        values = _tile(value, key_token, column, WIDTH)
        total += tl.dot(scores, values, input_precision=PRECISION)
        denominator += tl.sum(scores, axis=1)
    seen = denominator > 0
    reciprocal = tl.where(seen, 1.0 / tl.where(seen, denominator, 1.0), 0.0)
    cells = token[:, None] * WIDTH + column[None, :]
    tl.store(output + cells, (total * reciprocal[:, None]).to(output.dtype.element_ty))
    tl.store(inverse + token, reciprocal)


@triton.jit
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
    d_rows,
    length,
    num_states,
    groups,
    num_features,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_ROWS: tl.constexpr,
):
    num_chunks = length // CHUNK
    chunk, row = tl.program_id(0) % num_chunks, (tl.program_id(0) // num_chunks).to(tl.int64)
    head = row // groups
    depth, column = tl.arange(0, HEAD), tl.arange(0, WIDTH)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    token, key_token = row * length + place, head * length + place
    queries, query_top = _tile(query, token, depth, HEAD), tl.load(top_q + token)
    upstream, token_slope = _tile(d_output, token, column, WIDTH), tl.load(slope + token)
    reciprocal = tl.load(inverse + token)
    weight = tl.load(read_weight + key_token) * reciprocal
    if CAUSAL:
        keys, key_top = _tile(key, key_token, depth, HEAD), tl.load(top_k + key_token)
        values = _tile(value, key_token, column, WIDTH)
        pairs = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
        pairs = (pairs + token_slope[:, None]) * reciprocal[:, None]
        pairs *= _pair_weights(tl.load(log_scale + key_token), tl.load(row_max + key_token), CHUNK)
        state = (head * num_states + chunk) * FEATURES
    else:
        state = head * FEATURES
    gradient = tl.zeros((CHUNK, HEAD), tl.float32)
    for start in range(0, FEATURES, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        block = _tile(rows, feature, depth, HEAD)
        phi_q, moves = _features(queries, block, query_top, feature, num_features, PRECISION)
        sums = _tile(states, state + feature, column, WIDTH)
        d_phi = tl.dot(upstream, tl.trans(sums), input_precision=PRECISION)
        d_phi += token_slope[:, None] * tl.load(state_sums + state + feature)[None, :]
        d_phi *= weight[:, None]
        if CAUSAL:
            phi_k, _ = _features(keys, block, key_top, feature, num_features, PRECISION)
            d_phi += tl.dot(pairs, phi_k, input_precision=PRECISION)
        d_values = tl.where(moves, d_phi * phi_q, 0.0)
        gradient += tl.dot(d_values, block, input_precision=PRECISION)
        if BY_ROWS:
            part = (row * num_chunks + chunk) * FEATURES + feature
            cells = part[:, None] * HEAD + depth[None, :]
            tl.store(d_rows + cells, tl.dot(tl.trans(d_values), queries, input_precision=PRECISION))
    cells = token[:, None] * HEAD + depth[None, :]
    tl.store(d_query + cells, gradient.to(d_query.dtype.element_ty))


@triton.jit
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
    d_rows,
    length,
    num_states,
    groups,
    num_features,
    norm_slope,
    CHUNK: tl.constexpr,
    HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    FEATURES: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    BY_ROWS: tl.constexpr,
):
    num_chunks = length // CHUNK
    chunk, head = tl.program_id(0) % num_chunks, (tl.program_id(0) // num_chunks).to(tl.int64)
    depth, column = tl.arange(0, HEAD), tl.arange(0, WIDTH)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    key_token = head * length + place
    keys, key_top = _tile(key, key_token, depth, HEAD), tl.load(top_k + key_token)
    values = _tile(value, key_token, column, WIDTH)
    weight = tl.load(key_weight + key_token)
    if CAUSAL:
        state = (head * num_states + chunk) * FEATURES
        factors = _pair_weights(tl.load(log_scale + key_token), tl.load(row_max + key_token), CHUNK)
    else:
        state = head * FEATURES
    gradient = tl.zeros((CHUNK, HEAD), tl.float32)
    value_gradient = tl.zeros((CHUNK, WIDTH), tl.float32)
    d_scale = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, FEATURES, BLOCK):
        feature = start + tl.arange(0, BLOCK)
        block = _tile(rows, feature, depth, HEAD)
        phi_k, moves = _features(keys, block, key_top, feature, num_features, PRECISION)
        sums = _tile(later, state + feature, column, WIDTH)
        weighted = phi_k * weight[:, None]
        value_gradient += tl.dot(weighted, sums, input_precision=PRECISION)
        d_phi = tl.dot(values, tl.trans(sums), input_precision=PRECISION)
        d_phi += tl.load(later_sums + state + feature)[None, :]
        d_phi *= weight[:, None]
        if CAUSAL:
            for group in range(groups):
                token = (head * groups + group) * length + place
                queries, query_top = _tile(query, token, depth, HEAD), tl.load(top_q + token)
                upstream = _tile(d_output, token, column, WIDTH)
                phi_q, _ = _features(queries, block, query_top, feature, num_features, PRECISION)
                row_factors = factors * tl.load(inverse + token)[:, None]
                pairs = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
                pairs = (pairs + tl.load(slope + token)[:, None]) * row_factors
                d_phi += tl.dot(tl.trans(pairs), phi_q, input_precision=PRECISION)
                scores = tl.dot(phi_q, tl.trans(phi_k), input_precision=PRECISION) * row_factors
                value_gradient += tl.dot(tl.trans(scores), upstream, input_precision=PRECISION)
        d_scale += tl.sum(d_phi * phi_k, axis=1)
        d_values = tl.where(moves, d_phi * phi_k, 0.0)
        gradient += tl.dot(d_values, block, input_precision=PRECISION)
        if BY_ROWS:
            part = (head * num_chunks + chunk) * FEATURES + feature
            cells = part[:, None] * HEAD + depth[None, :]
            tl.store(d_rows + cells, tl.dot(tl.trans(d_values), keys, input_precision=PRECISION))
    gradient -= d_scale[:, None] * keys * norm_slope
    cells = key_token[:, None] * HEAD + depth[None, :]
    tl.store(d_key + cells, gradient.to(d_key.dtype.element_ty))
    cells = key_token[:, None] * WIDTH + column[None, :]
    tl.store(d_value + cells, value_gradient.to(d_value.dtype.element_ty))


INTERPRETED = not any(isinstance(f, triton.JITFunction) for f in (tl.max, _walk_kernel))
"""Whether kernels run in Triton's interpreter: so if TRITON_INTERPRET=1 before it is imported."""


# Their launches, in the terms of `_fused.py`.


def tops(call: _fused.Call, x: Any, rows: Any, chunk: int) -> tuple[Any, Any]:
    """The largest projection of tokens (..., L, H), and what `FavorPlus` takes off: (..., L)."""
    top, half_norm = _new(x, x.shape[:-1]), _new(x, x.shape[:-1])
    _launch(
        _tops_kernel,
        top.numel() // chunk,
        _sizes(call, rows, chunk),
        x,
        rows,
        top,
        half_norm,
        call.num_features,
        0.5 * math.log(call.num_features),
        0.5 * call.head_dim**-0.5,
    )
    return top, half_norm


def running_max(x: Any) -> Any:
    """The maximum of each row up to each column."""
    return torch.cummax(x, dim=1).values


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
    """Add the features of tokens (P, G, L, H) to sums, chunk by chunk.

    At each chunk `sums = decay sums + sum weight phi value`, and so with the number `extra` of a
    token in place of its value.

    Returns:
        The sums before each chunk, (P, n, M, V) and (P, n, M), if causal, and the last ones.
    """
    heads, num_groups, length, _ = x.shape
    num_chunks = decay.shape[1]
    kept = _new(x, (heads, num_chunks if call.causal else 0, *first.shape[1:]))
    kept_extra = _new(x, kept.shape[:-1])
    last, last_extra = (_new(x, t.shape) for t in (first, first_extra))
    sizes = _sizes(call, rows, length // num_chunks)
    _launch(
        _walk_kernel,
        heads * (rows.shape[0] // sizes["BLOCK"]),
        sizes,
        *(x, top, weight, value, extra, decay, rows, first, first_extra),
        kept,
        kept_extra,
        last,
        last_extra,
        length,
        num_chunks,
        num_groups,
        call.num_features,
        WIDTH=value.shape[-1],
        KEEP=call.causal,
        REVERSE=reverse,
    )
    return kept, kept_extra, last, last_extra


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
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    inverse = _new(query, top_q.shape)
    _launch(
        _read_kernel,
        heads * num_groups * (length // call.query_chunk),
        _sizes(call, rows, call.query_chunk),
        *(query, top_q, key, top_k, value, log_scale, scales.row_max, scales.read_weight),
        *(rows, states, state_sums),
        output,
        inverse,
        length,
        states.shape[1],
        num_groups,
        call.num_features,
        WIDTH=value.shape[-1],
        CAUSAL=call.causal,
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
    """The gradient by the query, and if wanted that by the rows in parts (P G, n, M, H)."""
    heads, num_groups, length, _ = query.shape
    num_chunks = length // call.query_chunk
    d_query = query.new_empty(query.shape)
    d_rows = _new(query, (heads * num_groups, num_chunks if by_rows else 0, *rows.shape))
    _launch(
        _grad_query_kernel,
        heads * num_groups * num_chunks,
        _sizes(call, rows, call.query_chunk),
        *(query, top_q, key, top_k, value, log_scale, scales.row_max, scales.read_weight),
        *(rows, states, state_sums, d_output, slope, inverse),
        d_query,
        d_rows,
        length,
        states.shape[1],
        num_groups,
        call.num_features,
        WIDTH=value.shape[-1],
        CAUSAL=call.causal,
        BY_ROWS=by_rows,
    )
    return d_query, d_rows


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
    d_key, d_value = (x.new_empty(x.shape) for x in (key, value))
    d_rows = _new(key, (heads, num_chunks if by_rows else 0, *rows.shape))
    _launch(
        _grad_key_kernel,
        heads * num_chunks,
        _sizes(call, rows, call.key_chunk),
        *(query, top_q, key, top_k, value, log_scale, scales.row_max, scales.key_weight),
        *(rows, later, later_sums, d_output, slope, inverse),
        d_key,
        d_value,
        d_rows,
        length,
        later.shape[1],
        query.shape[1],
        call.num_features,
        call.head_dim**-0.5,
        WIDTH=value.shape[-1],
        CAUSAL=call.causal,
        BY_ROWS=by_rows,
    )
    return d_key, d_value, d_rows


def _new(like, shape):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _launch(kernel: Any, num_programs, sizes, *arguments, **settings):
    """Run a kernel. It takes tensors to be contiguous, so those that it fills must be already."""
    packed = (a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments)
    kernel[(num_programs,)](*packed, **sizes, **settings)


def _sizes(call, rows, chunk):
    features, head = rows.shape
    return {
        "CHUNK": chunk,
        "HEAD": head,
        "FEATURES": features,
        "BLOCK": min(_fused.FEATURE_BLOCK, features),
        "PRECISION": "ieee" if call.exact_products else "tf32",
        "num_warps": 8 if chunk * head >= 2048 else 4,
        "num_stages": 1,
    }


# The differentiable function.


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _fused.Call, *tensors: Any):
        tensors = tuple(t.contiguous() for t in tensors)  # once, not at every launch
        with torch.cuda.device_of(tensors[0]):
            results, saved = _fused.forward(_KERNELS, call, *tensors)
        ctx.call = call
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(results[-1])
        return results

    @staticmethod
    def backward(ctx: Any, *cotangents: Any):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "implementation='triton' cannot be differentiated twice: take 'auto'. Received: a "
                "backward pass with create_graph=True"
            )
        saved = ctx.saved_tensors
        by_rows = ctx.needs_input_grad[4]
        with torch.cuda.device_of(saved[0]):
            grads = _fused.backward(_KERNELS, ctx.call, saved, cotangents[:-1], by_rows)
        return (None, *grads, None, None)


def attend(call: _fused.Call, *tensors: Any) -> Any:
    """`_fused.forward` without what only the backward pass needs, differentiable."""
    return _Attend.apply(call, *tensors)


_KERNELS = sys.modules[__name__]
