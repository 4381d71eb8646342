"""What PyTorch runs by hand: the hot parts of a step, with their gradients written out.

PyTorch fuses nothing, so on a CPU most of a step's time goes to passes over arrays and to calls.
Each function here does with few of both what others do in `keras.ops`. Only the gradient is by
hand: a derivative of it is left to PyTorch, and to the function in `keras.ops`, `plain`.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from keras_performer.ops._chunks import LOG2_E, LOG_ZERO, hide
from keras_performer.ops._scan import torch_gradients_again

Tensor = torch.Tensor


def applies(*tensors: Any) -> bool:
    """Whether this module can take tensors: they are of one type, and nothing traces them."""
    return (
        len({tensor.dtype for tensor in tensors}) == 1
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
    )


def positive(values: Tensor, top: Tensor, floor: float) -> Tensor:
    """exp(max(values - top, floor)) for a floor above what underflows; `top` gets no gradient."""
    return _Positive.apply(values, top, floor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + H/2) of (..., H) by angles whose cosines and sines are (..., H/2)."""
    return _Rotate.apply(x, cos, sin)


def absorb(
    plain: Callable[..., tuple[Tensor, Tensor]],
    sums: Tensor,
    scale: Tensor,
    value: Tensor,
    phi: Tensor,
    log_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add keys to sums.

    Args:
        plain: The same in `keras.ops`, of the five tensors.
        sums: (..., M, V+1).
        scale: (..., 1, 1).
        value: (..., C, V+1).
        phi: (..., C, M).
        log_scale: (..., C, 1).

    Returns:
        The sums and their log scale.
    """
    return _Absorb.apply(plain, sums, scale, value, phi, log_scale)


def read(plain: Callable[..., Tensor], phi: Tensor, sums: Tensor) -> Tensor:
    """The outputs (..., R, V) of features (..., R, M) that see sums (..., M, V+1); see `absorb`."""
    return _Read.apply(plain, phi, sums)


def causal_step(
    plain: Callable[..., tuple[Tensor, Tensor, Tensor]],
    phi_q: Tensor,
    phi_k: Tensor,
    log_scale: Tensor,
    value: Tensor,
    sums: Tensor,
    scale: Tensor,
    count: int,
    visible: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend in E = `count` causal chunks of keys, and to the sums of those before them.

    Args:
        plain: The same in `keras.ops`, of the six tensors.
        phi_q: (B, K, E*R, M), R = G*C.
        phi_k: (B, K, E*C, M).
        log_scale: (B, K, E*C, 1).
        value: (B, K, E*C, V+1).
        sums: (B, K, M, V+1).
        scale: (B, K, 1, 1).
        count: E.
        visible: Which pairs of a chunk are, boolean (R, C).

    Returns:
        The output (B, K, E, R, V), and the sums and the log scale after the last chunk.
    """
    return _CausalStep.apply(plain, count, visible, phi_q, phi_k, log_scale, value, sums, scale)


def block_step(
    plain: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    phi_q: Tensor,
    read: Tensor,
    scale: Tensor,
    mask: Tensor,
    causal: bool,
) -> Tensor:
    """Attend to near keys exactly and to sums of features, in G blocks.

    Block g of queries is near the blocks g to g + E - G of keys.

    Args:
        plain: The same in `keras.ops`, of the six tensors.
        query: (B, K, G, R, H), R a multiple of W.
        key: (B, K, E, W, H).
        value: (B, K, E, W, V+1).
        phi_q: (B, K, G, R, M).
        read: Sums that each block reads, (B, K, G, M, V+1).
        scale: The log scale of what a row reads, (B, K, G, R, 1).
        mask: Which keys there are, boolean (B, K or 1, E, W).
        causal: Whether of the last near block a query sees its own place and those before it.

    Returns:
        The output (B, K, G, R, V).
    """
    return _BlockStep.apply(plain, mask, causal, query, key, value, phi_q, read, scale)


class _Positive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, top: Tensor, floor: float) -> Tensor:
        phi = torch.threshold_(values - top, floor, floor).exp_()
        ctx.save_for_backward(phi)
        ctx.floor = floor
        return phi

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (phi,) = ctx.saved_tensors
        # What was held at the floor has no gradient; its exponential may be an ulp or two off.
        least = math.exp(ctx.floor) * (1 + 8 * torch.finfo(phi.dtype).eps)
        d_values = grads[0] * phi
        if torch.is_grad_enabled():  # for a derivative of the gradient
            return torch.ops.aten.threshold_backward(d_values, phi, least), None, None
        torch.ops.aten.threshold_backward.grad_input(d_values, phi, least, grad_input=d_values)
        return d_values, None, None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, -1)
        rotated = x * torch.cat([cos, cos], -1)
        rotated_first, rotated_second = rotated.chunk(2, -1)
        rotated_first.addcmul_(second, sin, value=-1)
        rotated_second.addcmul_(first, sin)
        return rotated

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return rotate(grads[0], cos, -sin), None, None


class _Absorb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Any, *inputs: Tensor):
        sums, scale, value, phi, log_scale = inputs
        larger = torch.maximum(scale, log_scale.amax(-2, keepdim=True))
        kept = ((scale - larger) * LOG2_E).exp2_()
        of_key = ((log_scale - larger) * LOG2_E).exp2_()
        scaled = value * of_key
        total = sums * kept
        _add_product(total, phi.mT, scaled)
        ctx.save_for_backward(*inputs, kept, of_key, scaled)
        ctx.plain = plain
        ctx.mark_non_differentiable(larger)
        return total, larger

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a derivative of the gradient
            return (None, *torch_gradients_again(ctx.plain, grads, saved[:5]))
        phi, _, kept, of_key, scaled = saved[3:]
        d_scaled = _product(phi, grads[0])
        d_phi = _product(scaled, grads[0].mT)
        d_log_scale = (d_scaled * scaled).sum(-1, keepdim=True)
        return None, grads[0] * kept, None, d_scaled.mul_(of_key), d_phi, d_log_scale


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plain: Any, *inputs: Tensor):
        output, denominator = _normalized(_product(*inputs))
        ctx.save_for_backward(*inputs, output, denominator)
        ctx.plain = plain
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        phi, sums, output, denominator = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a derivative of the gradient
            return (None, *torch_gradients_again(ctx.plain, grads, (phi, sums)))
        d_total = _gradient_of_total(grads[0], output, denominator)
        return None, _product(d_total, sums.mT), _product(phi.mT, d_total)


class _CausalStep(torch.autograd.Function):
    """`sums_before`, `attend_chunk` and `normalize`, without segments. Below N = B*K."""

    @staticmethod
    def forward(ctx: Any, plain: Any, count: int, visible: Tensor, *inputs: Tensor):
        phi_q, phi_k, log_scale, value = (_by_chunks(x, count) for x in inputs[:4])
        sums, scale = (x.flatten(0, 1) for x in inputs[4:])
        largest = log_scale.amax(2, keepdim=True)
        edges = torch.cat([scale.unsqueeze(1), largest], 1).cummax(1).values
        before, after = edges[:, :-1], edges[:, 1:]
        row_max = torch.maximum(log_scale.cummax(2).values, before).clamp_min_(LOG_ZERO / 2)
        row_max = row_max.repeat(1, 1, phi_q.shape[2] // phi_k.shape[2], 1)
        # What the features of each pair are scaled by, and those of what is read, kept and added.
        decay = (hide(log_scale.mT, visible) - row_max).mul_(LOG2_E).exp2_()
        of_read = ((before - row_max) * LOG2_E).exp2_()
        kept = ((before - after) * LOG2_E).exp2_()
        of_key = ((log_scale - after) * LOG2_E).exp2_()
        # From the sums after each chunk to those before later ones, (N, E, E).
        across = (before.flatten(1).unsqueeze(2) - after.flatten(1).unsqueeze(1)).neg_()
        across = across.mul_(LOG2_E).exp2_().tril_(-1)
        weights = _product(phi_q, phi_k.mT).mul_(decay)
        scaled = value * of_key
        added = _product(phi_k.mT, scaled)
        added[:, 0].addcmul_(sums, kept[:, 0])
        read = torch.bmm(across, added.flatten(2)).view_as(added)  # the sums before each chunk
        read[:, 0] = sums
        last = added[:, 0] if count == 1 else torch.addcmul(added[:, -1], read[:, -1], kept[:, -1])
        total = _product(weights, value).addcmul_(_product(phi_q, read), of_read)
        output, denominator = _normalized(total)
        ctx.save_for_backward(
            *(*inputs, weights, decay, of_read, kept, of_key, across),
            *(scaled, read, output, denominator),
        )
        ctx.plain, ctx.count = plain, count
        shape = inputs[4].shape[:2]
        last_scale = edges[:, -1].unflatten(0, shape)
        ctx.mark_non_differentiable(last_scale)
        return output.unflatten(0, shape), last.unflatten(0, shape), last_scale

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # which checkpointing lets a backward pass read once
        inputs, (weights, decay, of_read, kept, of_key, across) = saved[:6], saved[6:12]
        scaled, read, output, denominator = saved[12:]
        if torch.is_grad_enabled():  # for a derivative of the gradient
            return (None, None, None, *torch_gradients_again(ctx.plain, grads, inputs))
        phi_q, phi_k, _, value = (_by_chunks(x, ctx.count) for x in inputs[:4])
        d_last = grads[1].flatten(0, 1)
        d_total = _gradient_of_total(grads[0].flatten(0, 1), output, denominator)
        d_weights = _product(d_total, value.mT)
        d_value = _product(weights.mT, d_total)
        d_log_scale = (d_weights * weights).sum(2).unsqueeze(-1)
        d_scores = d_weights.mul_(decay)
        d_phi_q, d_phi_k = _product(d_scores, phi_k), _product(d_scores.mT, phi_q)
        d_total.mul_(of_read)
        d_read = _product(phi_q.mT, d_total)
        d_first = d_read[:, 0].clone()
        d_read[:, -1].addcmul_(d_last, kept[:, -1])
        d_after = torch.bmm(across.mT, d_read.flatten(2)).view_as(d_read)
        d_after[:, -1] = d_last
        d_sums = torch.addcmul(d_first, d_after[:, 0], kept[:, 0])
        _add_product(d_phi_q, d_total, read.mT)
        _add_product(d_phi_k, scaled, d_after.mT)
        d_scaled = _product(phi_k, d_after)
        d_log_scale += (d_scaled * scaled).sum(-1, keepdim=True)
        d_value.addcmul_(d_scaled, of_key)
        found = (d_phi_q, d_phi_k, d_log_scale, d_value, d_sums)
        found = (d.reshape(x.shape) for d, x in zip(found, inputs, strict=False))
        return (None, None, None, *found, None)


class _BlockStep(torch.autograd.Function):
    """Keys weighed exactly and sums of features beside them, in G blocks.

    The blocks of all heads stand in one row, those of queries spread to E a head: the keys that are
    n blocks away then are the row from block n on, and no product needs a copy.
    """

    @staticmethod
    def forward(ctx: Any, plain: Any, mask: Tensor, causal: bool, *inputs: Tensor):
        query, key, value, phi_q, read, scale = inputs
        num_rows, (num_blocks, size) = query.shape[3], key.shape[2:4]
        distances = range(num_blocks - query.shape[2] + 1)
        count = query.shape[:2].numel() * num_blocks - distances[-1]
        # All logarithms here are of base two.
        rows = _spread(query * (query.shape[-1] ** -0.5 * LOG2_E), num_blocks)
        scale = scale * LOG2_E
        row_max = _spread(scale, num_blocks)
        key, value = key.flatten(0, 2), value.flatten(0, 2)
        hidden = torch.where(mask, key.new_zeros(()), LOG_ZERO)
        hidden = hidden.expand(*query.shape[:2], -1, -1).reshape(-1, 1, size)
        weights = [
            torch.baddbmm(
                hidden[n : n + count].expand(-1, num_rows, -1), rows[:count], key[n : n + count].mT
            )
            for n in distances
        ]
        if causal:
            weights[-1] += _behind(num_rows, size, key)
        top = row_max[:count]
        for x in weights:
            torch.maximum(top, x.amax(-1, keepdim=True), out=top)
        top.clamp_min_(LOG_ZERO / 2)
        total = rows.new_zeros((*rows.shape[:2], value.shape[-1]))
        for n, x in zip(distances, weights, strict=True):
            x.sub_(top).exp2_()
            total[:count].baddbmm_(x, value[n : n + count])
        of_read = (scale - _gathered(row_max, query, num_blocks)).exp2_()
        far = _product(phi_q, read).mul_(of_read)
        output, denominator = _normalized(_gathered(total, query, num_blocks) + far)
        ctx.save_for_backward(*inputs, rows, of_read, far, output, denominator, *weights)
        ctx.plain = plain
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a derivative of the gradient
            return (None, None, None, *torch_gradients_again(ctx.plain, grads, saved[:6]))
        query, key, value, phi_q, read, _, rows, of_read, far, output, denominator = saved[:11]
        weights, num_blocks = saved[11:], key.shape[2]
        key, value = key.contiguous(), value.contiguous()
        d_total = rows.new_zeros((*rows.shape[:2], value.shape[-1]))
        d_far = _gathered(d_total, query, num_blocks)
        _gradient_of_total(grads[0], output, denominator, out=d_far)
        d_rows, d_key, d_value = (torch.zeros_like(x) for x in (rows, key, value))
        for n, x in enumerate(weights):
            count = x.shape[0]
            near_key, near_value, d_near_key, d_near_value = (
                t.view(-1, *t.shape[3:])[n : n + count] for t in (key, value, d_key, d_value)
            )
            d_near_value.baddbmm_(x.mT, d_total[:count])
            d_logits = torch.bmm(d_total[:count], near_value.mT).mul_(x)
            d_rows[:count].baddbmm_(d_logits, near_key)
            d_near_key.baddbmm_(d_logits.mT, rows[:count], alpha=1 / LOG2_E)
        d_query = _gathered(d_rows, query, num_blocks) * query.shape[-1] ** -0.5
        d_scale = (d_far * far).sum(-1, keepdim=True)
        d_far = d_far * of_read
        d_phi_q, d_read = _product(d_far, read.mT), _product(phi_q.mT, d_far)
        return (None, None, None, d_query, d_key, d_value, d_phi_q, d_read, d_scale)


def _behind(num_rows: int, size: int, like: Tensor) -> Tensor:
    """The log of zero where a key lies behind the place of a row (R, W), else zero."""
    behind = torch.full((size, size), LOG_ZERO, dtype=like.dtype, device=like.device).triu_(1)
    return behind.repeat(num_rows // size, 1)


def _spread(x: Tensor, num_blocks: int) -> Tensor:
    """(B, K, G, ...) -> (B*K*E, ...), with zeros behind the blocks of each head."""
    spread = x.new_zeros((*x.shape[:2], num_blocks, *x.shape[3:]))
    spread[:, :, : x.shape[2]] = x
    return spread.flatten(0, 2)


def _gathered(spread: Tensor, like: Tensor, num_blocks: int) -> Tensor:
    """The reverse, a view."""
    blocks = spread.view(*like.shape[:2], num_blocks, *spread.shape[1:])
    return blocks[:, :, : like.shape[2]]


def _normalized(total: Tensor) -> tuple[Tensor, Tensor]:
    """`normalize`, and what it divides by."""
    denominator = total[..., -1:]
    denominator = torch.where(denominator > 0, denominator, math.inf)
    return total[..., :-1] / denominator, denominator


def _gradient_of_total(
    d_output: Tensor, output: Tensor, denominator: Tensor, out: Tensor | None = None
) -> Tensor:
    d_total = output.new_empty((*output.shape[:-1], output.shape[-1] + 1)) if out is None else out
    d_sums = torch.div(d_output, denominator, out=d_total[..., :-1])
    torch.sum(d_sums * output, -1, keepdim=True, out=d_total[..., -1:]).neg_()
    return d_total


def _by_chunks(x: Tensor, count: int) -> Tensor:
    """(B, K, E*L, ...) -> (N, E, L, ...)."""
    return x.flatten(0, 1).unflatten(1, (count, -1))


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    # A view, because a copy would take the sum in its place.
    total.view(-1, *total.shape[-2:]).baddbmm_(a.flatten(0, -3), b.flatten(0, -3))
