"""A stack of blocks whose training memory does not grow with depth."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_performer.layers._performer_block import PerformerBlock
from keras_performer.layers._recomputed import pure
from keras_performer.layers.performer_attention import merge_masks
from keras_performer.ops._inputs import wide_dtype
from keras_performer.ops._reversible import compiles, reversible


@keras.saving.register_keras_serializable(package="keras_performer")
class ReversibleStack(keras.layers.Layer):
    """Run Performer blocks on two residual streams that the backward pass computes again.

    Each branch of a block reads one stream and adds to the other, in turns: attention reads the
    second and adds to the first, the feed-forward part reads the first and adds to the second, and
    so on. The backward pass undoes each sum by computing its branch once more, so training keeps
    the last two streams whatever the number of blocks, for about a third more time. The function
    is not that of the same blocks in a row, so weights trained one way do not fit the other.

    **Shapes** `inputs` (B, T, D), which both streams start from; the output, the mean of both, is
    (B, T, D).

    **Args**
        blocks: `PerformerEncoderBlock`s or `PerformerDecoderBlock`s.
        **kwargs: `name` and `dtype` of the layer.

    **Masking** As in the blocks.

    **Precision** Streams are float32, or float64 for float64: undoing a sum in half precision would
    not give back what was added to. The branches compute as the blocks' dtype policy says.
    Activations come back to rounding only, and gradients with them.

    **Cost** Time of the blocks, once more in the backward pass; memory of two streams. XLA would
    order a step for speed and keep more: on JAX each branch is a conditional there, and Keras
    compiles no model with this layer on TensorFlow.

    **Raises** TypeError if a block is of another kind; ValueError if the blocks attend to an
    encoder and there is none, or the other way round.

    **Example**

    >>> blocks = [
    ...     keras_performer.layers.PerformerEncoderBlock(num_heads=2, intermediate_dim=16)
    ...     for _ in range(3)
    ... ]
    >>> tuple(ReversibleStack(blocks)(np.ones((1, 5, 8), "float32")).shape)
    (1, 5, 8)

    **Source** Gomez et al. 2017, arXiv 1707.04585; Kitaev et al. 2020, arXiv 2001.04451, section 3.
    """

    def __init__(self, blocks: Sequence[PerformerBlock], **kwargs: Any):
        super().__init__(autocast=False, **kwargs)
        for block in blocks:
            if not isinstance(block, PerformerBlock):
                raise TypeError(
                    "ReversibleStack takes PerformerEncoderBlocks and PerformerDecoderBlocks. "
                    f"Received: {block!r}"
                )
        self.supports_masking = True
        self.supports_jit = compiles()
        self.blocks = list(blocks)

    def build(
        self,
        inputs_shape: tuple[int | None, ...],
        encoder_outputs_shape: tuple[int | None, ...] | None = None,
    ) -> None:
        """Build the blocks for inputs (B, T, D) and encoder outputs (B, S, D')."""
        for block in self.blocks:
            block.check_encoder(encoder_outputs_shape)
            if block.built:
                continue
            if encoder_outputs_shape is None:
                block.build(inputs_shape)
            else:
                block.build(inputs_shape, encoder_outputs_shape)

    def call(
        self,
        inputs: Any,
        encoder_outputs: Any = None,
        padding_mask: Any = None,
        encoder_padding_mask: Any = None,
        segment_ids: Any = None,
        positions: Any = None,
        training: bool | None = None,
    ) -> Any:
        """Run the blocks; the arguments are theirs."""
        for block in self.blocks:
            block.check_encoder(encoder_outputs)
        named = {
            "key_mask": merge_masks(inputs, padding_mask),
            "encoder_padding_mask": merge_masks(encoder_outputs, encoder_padding_mask),
            "segment_ids": segment_ids,
            "positions": positions,
        }
        names = [name for name, tensor in named.items() if tensor is not None]
        extras = () if encoder_outputs is None else (encoder_outputs,)

        branches, weights, states, variables = [], [], [], []
        for block in self.blocks:
            for function, layers in _branches(block, training):
                own = [v for layer in layers for v in layer.variables]
                lasting = [v for v in own if v.trainable]
                changing = [v for v in own if not v.trainable]
                branches.append(_branch(function, lasting, changing, names))
                weights.append(tuple(ops.convert_to_tensor(v) for v in lasting))
                # Copied, because PyTorch assigns in place.
                states.append(tuple(ops.copy(v) for v in changing))
                variables.append(changing)
        stream = ops.cast(inputs, wide_dtype(inputs))
        constants = tuple(ops.convert_to_tensor(named[name]) for name in names)
        (first, second), after = reversible(
            branches, (stream, stream), weights, states, extras, constants
        )
        for group, values in zip(variables, after, strict=True) if training else ():
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)
        return ops.cast(0.5 * (first + second), self.compute_dtype)

    def call_with_state(
        self, inputs: Any, state: list[Any], padding_mask: Any = None, memories: Any = None
    ) -> tuple[Any, list[Any]]:
        """Run the next tokens of a stream in inference mode; see `PerformerDecoderBlock`.

        **Args**
            inputs: (B, T, D).
            state: The state of each block.
            padding_mask: (B, T).
            memories: With cross-attention the `encoder_memory` of each block.

        **Returns** (B, T, D) and the state after these tokens.
        """
        dtype = wide_dtype(inputs)
        both = [ops.cast(inputs, dtype)] * 2
        turn, after = 0, []

        def add(delta: Any) -> None:
            nonlocal turn
            both[turn], turn = both[turn] + ops.cast(delta, dtype), 1 - turn

        memories = memories or [None] * len(self.blocks)
        for block, before, memory in zip(self.blocks, state, memories, strict=True):
            block.check_encoder(memory)
            delta, new = block.attend(
                both[1 - turn],
                key_mask=merge_masks(inputs, padding_mask),
                initial_state=before,
                return_state=True,
                training=False,
            )
            add(delta)
            if memory is not None:
                add(block.attend_encoder(both[1 - turn], memory))
            add(block.feed_forward(both[1 - turn], training=False))
            after.append(new)
        return ops.cast(0.5 * (both[0] + both[1]), self.compute_dtype), after

    def compute_output_shape(
        self, inputs_shape: tuple[int | None, ...], encoder_outputs_shape: Any = None
    ) -> tuple[int | None, ...]:
        """Return the shape of the output, which is that of the input."""
        del encoder_outputs_shape
        return inputs_shape

    def compute_output_spec(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the symbolic output, without tracing the computation."""
        del args, kwargs
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        blocks = [keras.saving.serialize_keras_object(block) for block in self.blocks]
        return {**super().get_config(), "blocks": blocks}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ReversibleStack":
        """Make a stack of the blocks in a config."""
        config = dict(config)
        blocks = [keras.saving.deserialize_keras_object(block) for block in config.pop("blocks")]
        return cls(blocks, **config)


Function = Callable[[Any, Any, dict[str, Any]], Any]


def _branches(block: Any, training: bool | None) -> list[tuple[Function, list[Any]]]:
    """The branches of a block, functions of (x, encoder outputs, masks), and their layers."""

    def attend(x: Any, encoder_outputs: Any, named: dict[str, Any]) -> Any:
        del encoder_outputs
        options = {name: t for name, t in named.items() if name != "encoder_padding_mask"}
        return block.attend(x, training=training, **options)[0]

    def attend_encoder(x: Any, encoder_outputs: Any, named: dict[str, Any]) -> Any:
        mask = named.get("encoder_padding_mask")
        return block.attend_encoder(x, encoder_outputs, mask, training)

    def feed_forward(x: Any, encoder_outputs: Any, named: dict[str, Any]) -> Any:
        del encoder_outputs, named
        return block.feed_forward(x, training)

    gate = [] if block.feedforward_gate is None else [block.feedforward_gate]
    branches: list[tuple[Function, list[Any]]] = [
        (
            attend,
            [block.self_attention_norm, block.self_attention, block.self_attention_dropout],
        ),
        (
            feed_forward,
            [
                block.feedforward_norm,
                block.feedforward_intermediate,
                *gate,
                block.feedforward_output,
                block.feedforward_dropout,
            ],
        ),
    ]
    if block.cross_attention:
        layers = [
            block.cross_attention_norm,
            block.encoder_attention,
            block.cross_attention_dropout,
        ]
        branches.insert(1, (attend_encoder, layers))
    return branches


def _branch(function: Function, lasting: list[Any], changing: list[Any], names: list[str]) -> Any:
    """`function` with its variables as arguments, as `reversible` takes it."""
    run = pure(function, lasting, changing)

    def branch(x: Any, weights: Any, states: Any, extras: Any, constants: Any) -> Any:
        named = dict(zip(names, constants, strict=True))
        delta, after = run(states, weights, x, extras[0] if extras else None, named)
        return ops.cast(delta, x.dtype), tuple(after)

    return branch
