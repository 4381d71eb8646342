"""What the generative tasks share: the loop over tokens, and how they are compiled."""

from collections.abc import Callable
from typing import Any

import keras_hub
from keras import ops


def generate_tokens(
    model: Any,
    read: Callable[[Any, Any, Any], tuple[Any, Any, Any]],
    token_ids: Any,
    padding_mask: Any,
    state: Any,
    stop_token_ids: Any,
) -> tuple[Any, Any]:
    """Continue a batch of prompts with the model's sampler.

    **Args**
        model: A compiled `keras_hub.models.CausalLM`.
        read: Called as `read(token_ids, mask, state)` on (B, t) tokens; returns logits
            (B, t, vocabulary), hidden states and the state after the tokens in the mask.
        token_ids: (B, T), prompts padded on the right to the length at which generation ends.
        padding_mask: (B, T).
        state: Before the first token.
        stop_token_ids: Tokens that end a row, or None to go on to T.

    **Returns** The tokens (B, T), and a mask that ends after the first token that stops a row.

    **Raises** ValueError if learned positions end before T.
    """
    length = ops.shape(token_ids)[1]
    limit = getattr(model.backbone, "max_sequence_length", None)
    if limit is not None and isinstance(length, int) and length > limit:
        raise ValueError(
            f"This model has learned positions for {limit} tokens. Received: a length of {length}. "
            "Pass a smaller max_length, or a model with more positions."
        )
    known = ops.cast(padding_mask, "bool")
    # The loop starts where the shortest prompt ends; it keeps the tokens of longer prompts.
    index = ops.min(ops.sum(ops.cast(known, "int32"), axis=-1))
    before = ops.expand_dims(ops.arange(length, dtype="int32") < index - 1, 0)
    _, hidden_states, state = read(token_ids, ops.broadcast_to(before, ops.shape(token_ids)), state)

    def next(prompt: Any, cache: Any, index: Any) -> tuple[Any, Any, Any]:
        # Beams multiply the batch.
        last = ops.slice(prompt, [0, index - 1], [ops.shape(prompt)[0], 1])
        logits, hidden, cache = read(last, ops.ones_like(last, "bool"), cache)
        return ops.squeeze(logits, axis=1), ops.squeeze(hidden, axis=1), cache

    token_ids = model.sampler(
        next=next,
        prompt=token_ids,
        cache=state,
        index=index,
        mask=padding_mask,
        stop_token_ids=stop_token_ids,
        hidden_states=hidden_states,
        model=model,
    )
    if stop_token_ids is None:
        return token_ids, ops.ones_like(token_ids, "bool")
    stops = ops.zeros_like(token_ids, "bool")
    for token_id in stop_token_ids:
        stops = ops.logical_or(stops, ops.equal(token_ids, token_id))
    # A stop token in the prompt does not end it.
    stops = ops.cast(ops.logical_and(stops, ops.logical_not(known)), "int32")
    return token_ids, ops.equal(ops.cumsum(stops, axis=-1) - stops, 0)


def generate_step(self: Any, inputs: dict[str, Any], stop_token_ids: Any = None) -> dict[str, Any]:
    """Generate after a batch of prompts; the compiled part of a decoder's `generate`.

    **Args**
        inputs: A dict of `token_ids` and `padding_mask` (B, T): prompts, padded on the right to the
            length T at which generation ends.
        stop_token_ids: Tokens that end a row, or None to always go on to T.

    **Returns** A dict of the same, with the tokens generated, and a mask that ends after the first
    token that stops a row.
    """
    backbone = self.backbone

    def read(token_ids: Any, mask: Any, state: Any) -> tuple[Any, Any, Any]:
        chunk = {"token_ids": token_ids, "padding_mask": mask}
        hidden, state = backbone.call_with_state(chunk, state)
        return backbone.token_embedding(hidden, reverse=True), hidden, state

    batch_size, length = ops.shape(inputs["token_ids"])
    token_ids, padding_mask = generate_tokens(
        self,
        read,
        inputs["token_ids"],
        inputs["padding_mask"],
        backbone.initial_state(batch_size, length),
        stop_token_ids,
    )
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def compile_config(config: dict[str, Any] | None, sampler: Any) -> dict[str, Any]:
    """Return what `compile_as_saved` needs: how a task was compiled, with its sampler."""
    return {**config, "sampler": keras_hub.samplers.serialize(sampler)} if config else {}
