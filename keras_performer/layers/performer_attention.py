"""Multi-head attention at a cost linear in length."""

import numbers
import string
from typing import Any

import keras
from keras import constraints, initializers, ops, regularizers
from keras.src.backend import get_keras_mask

from keras_performer import feature_maps
from keras_performer.layers._arguments import (
    check_near_field,
    dropout_rate,
    optional_int,
    positive_int,
    seed_of,
)
from keras_performer.layers._recording import record, recorded
from keras_performer.layers.rotary import rotate
from keras_performer.ops import (
    empty_favor_state,
    empty_softmax_state,
    favor_attention,
    favor_attention_weights,
    softmax_attention,
    softmax_weights,
)
from keras_performer.ops._chunks import run_indices
from keras_performer.ops._inputs import differ, fits
from keras_performer.ops._near_field import positions_of


@keras.saving.register_keras_serializable(package="keras_performer")
class PerformerAttention(keras.layers.Layer):
    """A drop-in for `keras.layers.MultiHeadAttention` whose cost is linear in length.

    Queries, keys and values are projected as there; attention weighs keys by phi(q).phi(k) of a
    feature map instead of exp(q.k / sqrt(H)), see `keras_performer.ops.favor_attention`. The
    sublayers `query`, `key`, `value`, `gate` and `attention_output` have the names and weight
    shapes of that layer, in its order; weights of our own (`query_norm`, `key_norm`, `feature_map`)
    come after them. `from_attention` takes over a trained layer.

    **Args** The arguments of `keras.layers.MultiHeadAttention` (Keras 3.15) keep their meaning.
    What differs, and what is new:

        dropout: Drops whole keys, from numerator and denominator alike, afresh for each head and
            step, since there is no matrix of weights to drop from. A query whose keys are all
            dropped gives zeros. With `exact_window`, or with segments and a state, the first key
            of a row or segment stays, and with a state the last one of a row.
        attention_axes: One axis; `None` on inputs of three axes. Several axes are refused.
        sliding_window: Attention becomes softmax attention within that band, exactly, in linear
            time; the feature map is not used then.
        flash_attention: None or False. True is refused: there is no softmax to fuse.
        num_features: Number of features M of a map given by name. None takes H ln(H), rounded up
            to a multiple of eight, at least eight (272 for H = 64).
        feature_map: "favor_plus", "favor_plus_plus", "hedgehog", "relu", "elu", or a
            `keras_performer.feature_maps.FeatureMap`, whose configuration is copied. None is exact
            softmax attention at quadratic cost: the baseline with the same arguments and weights.
        exact_window: W, to weigh keys in the query's own and the neighbouring blocks of W tokens
            exactly and only the others through features, see `favor_attention`. It makes few
            features go a long way; it is for self-attention, and maps that estimate softmax.
        num_sink_tokens: Number of leading tokens that every query weighs exactly; needs an
            `exact_window`.
        far_bias: Start of a learned bias for each key and value head, which is added to the scores
            of keys beyond the `exact_window`, which it needs. In a long sequence these are so many
            that without it a model from scratch starts by averaging them: -4 lets it start from
            its window. None is no bias.
        num_key_value_heads: Number K of key and value heads, a divisor of `num_heads`, each shared
            by a group of query heads. None is `num_heads`.
        qk_norm: Whether queries and keys are divided by their root mean square and multiplied by
            learned scales, which start where scores differ by about one between keys. Features
            alone estimate such scores poorly, and models learned faster from there all the same
            (zoo/README.md). Off here, so that weights carry over; on in our own models.
        rotary_max_wavelength: If set, rotary positions are applied to queries and keys, of even
            `key_dim`; 10000 is usual.
        seed: Seeds the projection and the dropout.

    **Call arguments** query (B, T, D), value (B, S, D'), key (B, S, D'') or None for `value`;
    `attention_mask`, only as a mask of keys: (1, S), (B, 1, S), (B, 1, 1, S), or (B, K, 1, S)
    for each head; `key_mask` and `value_mask` (B, S); `use_causal_mask`; `return_attention_scores`;
    `training`; and of our own `segment_ids`, integers (B, T), whose runs of equal ids are
    sequences packed into one row, and `positions`, integers (T,) or (B, T), for rotary positions.
    Positions default to the distance from each row's first unmasked token, so left padding
    does not matter; for packed rows pass positions that restart. `initial_state`, from
    `initial_state()` or an earlier call, stands for the tokens before these: with
    `use_causal_mask` the sequence goes on after them, and otherwise every query sees them too.
    With `return_state` the state after these tokens is returned as well; its size is fixed.

    **Returns** (B, T, D), or D replaced by `output_shape`; with `return_attention_scores=True` also
    this layer's own normalised weights (B, N, T, S), at a cost of O(T S N M): for short inputs.

    **Masking** A masked key takes no part, whatever it holds. A query that sees no key gives zeros
    (before the output projection), where `MultiHeadAttention` averages what it must not see. The
    mask of the query passes on to the output.

    **Precision** Attention is computed in float32 under every policy but "float64"; see
    `keras_performer.ops.favor_attention`.

    **Cost** O(T N M (2 H + V)) multiply-adds beside the projections; memory linear in T.

    **Raises** ValueError for what cannot be honoured, with the reason.

    **Example**

    >>> layer = PerformerAttention(num_heads=2, key_dim=8)
    >>> x = np.ones((1, 16, 12), "float32")
    >>> tuple(layer(x, x, use_causal_mask=True).shape)
    (1, 16, 12)

    **Source** Choromanski et al. 2021, arXiv 2009.14794. The query and key scales are those of
    Henry et al. 2020, arXiv 2010.04245, with a root mean square in place of the norm.
    """

    def __init__(
        self,
        num_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        dropout: float = 0.0,
        use_bias: bool = True,
        output_shape: int | tuple[int, ...] | None = None,
        attention_axes: int | tuple[int, ...] | None = None,
        sliding_window: int | None = None,
        flash_attention: bool | None = None,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        kernel_regularizer: Any = None,
        bias_regularizer: Any = None,
        activity_regularizer: Any = None,
        kernel_constraint: Any = None,
        bias_constraint: Any = None,
        use_gate: bool = False,
        num_features: int | None = None,
        feature_map: Any = "favor_plus",
        exact_window: int | None = None,
        num_sink_tokens: int = 0,
        far_bias: float | None = None,
        num_key_value_heads: int | None = None,
        qk_norm: bool = False,
        rotary_max_wavelength: float | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        # The sublayers cast their inputs. A state is never cast: it would lose what it has summed.
        super().__init__(autocast=False, **kwargs)
        num_heads, key_dim = positive_int("num_heads", num_heads), positive_int("key_dim", key_dim)
        value_dim = optional_int("value_dim", value_dim)
        sliding_window = optional_int("sliding_window", sliding_window)
        num_key_value_heads = optional_int("num_key_value_heads", num_key_value_heads)
        if num_heads % (num_key_value_heads or num_heads):
            raise ValueError(
                "num_key_value_heads must divide num_heads. Received: num_heads="
                f"{num_heads}, num_key_value_heads={num_key_value_heads}"
            )
        exact_window = optional_int("exact_window", exact_window)
        check_near_field(exact_window, num_sink_tokens, far_bias)
        dropout = dropout_rate("dropout", dropout)
        if flash_attention:
            raise ValueError(
                "flash_attention=True fuses a softmax over pairs, which linear attention does not "
                "form: leave it None. Received: flash_attention=True"
            )
        if attention_axes is not None:
            axes = attention_axes if isinstance(attention_axes, list | tuple) else [attention_axes]
            if len(axes) != 1 or not isinstance(axes[0], numbers.Integral):
                raise ValueError(
                    "Linear attention runs along one axis, in whose order states are summed: pass "
                    "one attention axis, an integer, or reshape the others into it. "
                    f"Received: attention_axes={attention_axes!r}"
                )
            attention_axes = (int(axes[0]),)
        if rotary_max_wavelength is not None and (rotary_max_wavelength <= 0 or key_dim % 2):
            raise ValueError(
                "Rotary positions turn pairs of dimensions: rotary_max_wavelength must be positive "
                f"and key_dim even. Received: rotary_max_wavelength={rotary_max_wavelength}, "
                f"key_dim={key_dim}"
            )
        if isinstance(output_shape, int):
            output_shape = (output_shape,)
        self.supports_masking = True
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.value_dim = value_dim or key_dim
        self.num_key_value_heads = num_key_value_heads or num_heads
        self.dropout = dropout
        self.use_bias = use_bias
        self.use_gate = use_gate
        self.attention_axes = attention_axes
        self.sliding_window = sliding_window
        self.qk_norm = qk_norm
        self.rotary_max_wavelength = rotary_max_wavelength
        self.num_features = optional_int("num_features", num_features)
        self.exact_window = exact_window
        self.num_sink_tokens = int(num_sink_tokens)
        self.far_bias = None if far_bias is None else float(far_bias)
        self.seed = seed
        self._output_shape = tuple(output_shape) if output_shape else None
        self._kernel_initializer = initializers.get(kernel_initializer)
        self._bias_initializer = initializers.get(bias_initializer)
        self._kernel_regularizer = regularizers.get(kernel_regularizer)
        self._bias_regularizer = regularizers.get(bias_regularizer)
        # The sublayers apply it, as in `MultiHeadAttention`; this layer's output is the last one's.
        self._activity_regularizer = regularizers.get(activity_regularizer)
        self._kernel_constraint = constraints.get(kernel_constraint)
        self._bias_constraint = constraints.get(bias_constraint)
        self._given_num_key_value_heads = num_key_value_heads
        # Kept as a config: an instance would become a sublayer, and its weights this layer's.
        if isinstance(feature_map, feature_maps.FeatureMap):
            feature_map = keras.saving.serialize_keras_object(feature_map)
        self._given_feature_map = feature_map
        self._is_exact = feature_map is None or sliding_window is not None
        if feature_map is not None:
            made = self._make_feature_map()  # refuses here what build would refuse
            if exact_window and not made.estimates_softmax:
                raise ValueError(
                    "exact_window weighs near keys by exp(q.k), which this feature map does not "
                    "estimate: use 'favor_plus', or exact_window=None. Received: feature_map="
                    f"{feature_map!r}, exact_window={exact_window}"
                )
        if exact_window and self._is_exact:
            raise ValueError(
                "exact_window is the exact part of feature attention, and this layer's attention "
                "is exact: leave it None. Received: exact_window="
                f"{exact_window}, feature_map={feature_map!r}, sliding_window={sliding_window}"
            )
        self._feature_map = None
        self._seed_generator = keras.random.SeedGenerator(seed_of(seed)) if dropout > 0 else None

    @classmethod
    def from_attention(
        cls, attention: keras.layers.MultiHeadAttention, **options: Any
    ) -> "PerformerAttention":
        """Make a layer with the configuration and, if it is built, the weights of `attention`.

        **Args**
            attention: A `keras.layers.MultiHeadAttention`. It is not changed.
            **options: Arguments of this class that `attention` lacks, such as `num_features`, or
                that replace its own, such as `name`.

        **Raises** TypeError for another kind of layer; ValueError where the options change the
        shape of a weight, which then could not be taken over.

        **Example**

        >>> softmax = keras.layers.MultiHeadAttention(2, 8)
        >>> softmax.build((None, None, 12), (None, None, 12))
        >>> layer = PerformerAttention.from_attention(softmax, num_features=32)
        >>> bool((layer.get_weights()[0] == softmax.get_weights()[0]).all())
        True
        """
        if not isinstance(attention, keras.layers.MultiHeadAttention):
            raise TypeError(
                "from_attention takes over a keras.layers.MultiHeadAttention. "
                f"Received: {attention!r}"
            )
        config = attention.get_config()
        config["dtype"] = attention.dtype_policy
        layer = cls.from_config({**config, **options})
        if not attention.built:
            return layer
        shapes = attention.get_build_config()["shapes_dict"]
        layer.build(shapes["query_shape"], shapes["value_shape"], shapes.get("key_shape"))
        for ours, theirs in zip(layer._projections(), _mha_projections(attention), strict=True):
            expected = [tuple(w.shape) for w in theirs.weights]
            received = [tuple(w.shape) for w in ours.weights]
            if expected != received:
                raise ValueError(
                    f"The weights of {theirs.name!r} cannot be taken over: they have the shapes "
                    f"{expected}, and with these options the layer needs {received}. "
                    f"Received: options={options}"
                )
            ours.set_weights(theirs.get_weights())
        return layer

    def build(
        self,
        query_shape: tuple[Any, ...],
        value_shape: tuple[Any, ...],
        key_shape: tuple[Any, ...] | None = None,
    ) -> None:
        """Create the sublayers for inputs of these shapes."""
        key_shape = value_shape if key_shape is None else key_shape
        rank = len(query_shape)
        if rank < 3 or len(value_shape) != rank or len(key_shape) != rank:
            raise ValueError(
                "query, value and key must have one number of axes, at least three: (batch, ..., "
                f"length, features). Received: query_shape={query_shape}, "
                f"value_shape={value_shape}, key_shape={key_shape}"
            )
        if tuple(value_shape[1:-1]) != tuple(key_shape[1:-1]):
            raise ValueError(
                "value and key must agree in all axes but the last. "
                f"Received: value_shape={value_shape}, key_shape={key_shape}"
            )
        axis = self._axis(rank)
        if not 1 <= axis < rank - 1:
            raise ValueError(
                "The attention axis must lie between the batch and the feature axis. "
                f"Received: attention_axes={self.attention_axes} for query_shape={query_shape}"
            )
        heads, groups = self.num_heads, self.num_key_value_heads
        self._query_dense = self._dense("query", query_shape, (heads, self.key_dim))
        self._key_dense = self._dense("key", key_shape, (groups, self.key_dim))
        if self.use_gate:
            self._gate_dense = self._dense(
                "gate", query_shape, (heads, self.value_dim), activation="sigmoid"
            )
        self._value_dense = self._dense("value", value_shape, (groups, self.value_dim))
        self._output_dense = self._dense(
            "attention_output",
            (*query_shape[:-1], heads, self.value_dim),
            self._output_shape or (query_shape[-1],),
            num_contracted=2,
        )
        if self.qk_norm:
            options = {"epsilon": 1e-6, "dtype": self.dtype_policy}
            self._query_norm = _QueryKeyNorm(name="query_norm", **options)
            self._query_norm.build((None, None, heads, self.key_dim))
            self._key_norm = _QueryKeyNorm(name="key_norm", **options)
            self._key_norm.build((None, None, groups, self.key_dim))
            for norm in (self._query_norm, self._key_norm):
                norm.supports_masking = True  # as in `_dense`
        if self.far_bias is not None:
            self._far_bias = _FarBias(self.far_bias, name="far_bias", dtype=self.dtype_policy)
            self._far_bias.build((None, None, groups, self.key_dim))
        # The last sublayer, so that the weights before it are those of `MultiHeadAttention`.
        if not self._is_exact:
            self._feature_map = self._make_feature_map()
            self._feature_map.build((None, None, groups, self.key_dim))
        self.built = True

    @recorded
    def call(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: Any = None,
        positions: Any = None,
        initial_state: dict[str, Any] | None = None,
        return_state: bool = False,
    ) -> Any:
        """Attend from query to value; see the class."""
        del query_mask  # it concerns the output's mask alone, which Keras passes on
        key = value if key is None else key
        same_tokens = query is value and query is key
        rank, axis = len(query.shape), self._axis(len(query.shape))
        streams = initial_state is not None or return_state
        if positions is not None:
            positions = ops.convert_to_tensor(positions)
        one_line = streams and self.rotary_max_wavelength is not None
        _check_places(rank, segment_ids, positions, query.shape, value.shape, one_line)
        gate = self._gate_dense(query) if self.use_gate else None
        outer_shape = None
        if rank > 3:
            _check_outer_axes(query.shape, value.shape, key.shape, axis)
        query, key, value = self._query_dense(query), self._key_dense(key), self._value_dense(value)
        if self.qk_norm:
            query, key = self._query_norm(query), self._key_norm(key)
        if rank > 3:
            moved = [_batch_outer_axes(x, axis) for x in (query, key, value)]
            outer_shape = moved[0][1]
            query, key, value = (x for x, _ in moved)
        mask = self._merge_key_masks(key, [value_mask, key_mask], attention_mask, rank)
        next_position = None
        if streams:
            self._check_state_options(
                rank, return_attention_scores, initial_state, return_state, training
            )
            start, next_position = _continue(key, mask, initial_state)
            positions = start if positions is None else positions
        if self.rotary_max_wavelength is not None:
            query, key = _rotate(query, key, mask, positions, self.rotary_max_wavelength)
        dropped = self._drop_keys(key, mask, segment_ids, training, streams)
        key_length = ops.shape(key)[1]
        if use_causal_mask and not same_tokens:
            key, value, dropped = _align_lengths(query, key, value, dropped)
        options = {"causal": use_causal_mask, "key_mask": dropped, "segment_ids": segment_ids}
        carried = {"initial_state": initial_state, "return_state": return_state}
        record(self, query, key, dropped, use_causal_mask, segment_ids)
        if self._is_exact:
            options["sliding_window"] = self.sliding_window
            output = softmax_attention(query, key, value, **options, **carried)
            if return_attention_scores:
                scores = softmax_weights(query, key, **options)
        else:
            options |= self.near_field()
            feature_map: Any = self._feature_map
            output = favor_attention(query, key, value, feature_map, **options, **carried)
            if return_attention_scores:
                scores = favor_attention_weights(query, key, feature_map, **options)
            if training and feature_map.trainable:
                # After the attention, which must not see this step's tokens in the statistics.
                feature_map.update_statistics(query, key, dropped)
        if return_state:
            output, state = output
            state["position"] = next_position
        if outer_shape is not None:
            output = _unbatch_outer_axes(output, outer_shape, axis)
        output = self._output_dense(output if gate is None else output * gate)
        if return_state:
            return output, state
        if not return_attention_scores:
            return output
        scores = _with_length(scores, 3, key_length)
        if outer_shape is not None:
            scores = ops.reshape(scores, (*outer_shape, *ops.shape(scores)[1:]))
        return output, scores

    def initial_state(self, batch_size: Any, max_length: int | None = None) -> dict[str, Any]:
        """The state before the first token, to start a stream or a decoding loop from.

        A stream with `segment_ids` starts from None: this state is of no segment.

        **Args**
            batch_size: B.
            max_length: Number of tokens that exact attention (`feature_map=None`) must be able to
                look back on. Feature attention and a sliding window need none.

        **Returns** A dictionary of tensors with the batch first: `position` (B,), the number of
        tokens seen, and those of `favor_attention` or `softmax_attention`.

        **Raises** ValueError if the layer is not built, or needs `max_length`.
        """
        if not self.built:
            raise ValueError(
                "The layer is not built, so the size of its state is unknown. Call it or `build` "
                f"it first. Received: layer {self.name!r}"
            )
        heads = self.num_key_value_heads
        if not self._is_exact:
            state = empty_favor_state(
                self._feature_map,
                batch_size,
                heads,
                self.value_dim,
                self._state_dtype(),
                exact_window=self.exact_window,
                num_sink_tokens=self.num_sink_tokens,
            )
        else:
            capacity = max_length
            if self.sliding_window is not None:
                capacity = max(1, self.sliding_window - 1)
            if capacity is None:
                raise ValueError(
                    "Exact attention remembers every key: say for how many tokens with max_length. "
                    "Received: max_length=None"
                )
            state = empty_softmax_state(
                batch_size, capacity, heads, self.key_dim, self.value_dim, self.compute_dtype
            )
        return {**state, "position": ops.zeros((batch_size,), "int32")}

    def memory(self, value: Any, key_mask: Any = None) -> dict[str, Any]:
        """Absorb keys and values once, for queries that come later through `read`.

        Calling the layer on all queries is `read(query, memory(value, key_mask))`: a decoder that
        generates token by token builds the memory of the encoder's outputs once.

        **Args**
            value: (B, S, D'), from which keys and values are projected.
            key_mask: (B, S), True or not 0 where a key takes part. The Keras mask of `value` counts
                too.

        **Returns** A dictionary of tensors with the batch first. With a feature map its size does
        not depend on S.

        **Raises** ValueError with rotary positions, which a memory has none of.
        """
        self._check_memory()
        key_mask = merge_masks(value, key_mask)
        key, value = self._key_dense(value), self._value_dense(value)
        if self.qk_norm:
            key = self._key_norm(key)
        batch, length = ops.shape(key)[:2]
        if key_mask is None:
            key_mask = ops.ones((1, 1), "bool")
        _check_key_mask(key_mask, key)
        key_mask = ops.broadcast_to(key_mask, (batch, length))
        if self._is_exact:
            mask = ops.expand_dims(key_mask, (2, 3))
            key, value = (ops.where(mask, x, ops.zeros_like(x)) for x in (key, value))
            return {"key": key, "value": value, "key_mask": key_mask}
        query = ops.zeros((batch, 1, self.num_heads, self.key_dim), self.compute_dtype)
        return favor_attention(
            query, key, value, self._feature_map, key_mask=key_mask, return_state=True
        )[1]

    def read(self, query: Any, memory: dict[str, Any]) -> Any:
        """Attend from query (B, T, D) to a memory made by `memory`; see there."""
        self._check_memory()
        gate = self._gate_dense(query) if self.use_gate else None
        query = self._query_dense(query)
        if self.qk_norm:
            query = self._query_norm(query)
        # A masked key stands in for the new keys, of which there are none.
        nothing = (ops.shape(query)[0], 1, self.num_key_value_heads)
        key = ops.zeros((*nothing, self.key_dim), self.compute_dtype)
        value = ops.zeros((*nothing, self.value_dim), self.compute_dtype)
        options = {"key_mask": ops.zeros(nothing[:2], "bool"), "initial_state": memory}
        if self._is_exact:
            output = softmax_attention(query, key, value, **options)
        else:
            output = favor_attention(query, key, value, self._feature_map, **options)
        return self._output_dense(output if gate is None else output * gate)

    def _check_memory(self) -> None:
        positional = self.rotary_max_wavelength or self.sliding_window or self.exact_window
        if not self.built or positional:
            raise ValueError(
                "`memory` and `read` are for cross-attention: the layer must be built, and have "
                "neither rotary positions nor a window. Received: "
                f"built={self.built}, rotary_max_wavelength={self.rotary_max_wavelength}, "
                f"sliding_window={self.sliding_window}, exact_window={self.exact_window}"
            )

    def near_field(self) -> dict[str, Any]:
        """The arguments of `favor_attention` on what is near, weighed exactly, and what is far."""
        return {
            "exact_window": self.exact_window,
            "num_sink_tokens": self.num_sink_tokens,
            "far_bias": None if self.far_bias is None else self._far_bias.bias,
        }

    def _state_dtype(self) -> str:
        return "float64" if self.compute_dtype == "float64" else "float32"

    def _check_state_options(
        self,
        rank: int,
        return_attention_scores: bool,
        initial_state: Any,
        return_state: bool,
        training: bool | None,
    ) -> None:
        if rank > 3 or return_attention_scores:
            raise ValueError(
                "A state goes with inputs of three axes and without attention scores. Received: "
                f"inputs of {rank} axes, return_attention_scores={return_attention_scores}"
            )
        if self._is_exact and training and self.dropout:
            raise ValueError(
                "Exact attention with a state remembers whole keys, which dropout cannot take: "
                "pass training=False, or make the layer with dropout=0. Received: "
                f"dropout={self.dropout}, training=True"
            )
        if return_state:
            self._check_start(initial_state)

    def _check_start(self, initial_state: Any) -> None:
        if self._is_exact and initial_state is None:
            raise ValueError(
                "Exact attention needs a state to start from, which says how many keys it can "
                "hold: pass initial_state=layer.initial_state(batch_size, max_length). "
                "Received: initial_state=None, return_state=True"
            )

    def compute_output_shape(
        self,
        query_shape: tuple[Any, ...],
        value_shape: tuple[Any, ...],
        key_shape: tuple[Any, ...] | None = None,
    ) -> tuple[Any, ...]:
        """The query's shape, its last axis replaced by `output_shape` if that is set."""
        del value_shape, key_shape
        return (*query_shape[:-1], *(self._output_shape or (query_shape[-1],)))

    def compute_output_spec(
        self,
        query: Any,
        value: Any,
        key: Any = None,
        query_mask: Any = None,
        value_mask: Any = None,
        key_mask: Any = None,
        attention_mask: Any = None,
        return_attention_scores: bool = False,
        training: bool | None = None,
        use_causal_mask: bool = False,
        segment_ids: Any = None,
        positions: Any = None,
        initial_state: dict[str, Any] | None = None,
        return_state: bool = False,
    ) -> Any:
        """The symbolic output, without tracing the computation."""
        del key, query_mask, value_mask, key_mask, attention_mask
        del training, positions
        output = keras.KerasTensor(
            self.compute_output_shape(query.shape, value.shape), dtype=self.compute_dtype
        )
        if return_state:
            return output, self.compute_state_spec(
                query.shape[0], initial_state, use_causal_mask, segment_ids
            )
        if not return_attention_scores:
            return output
        axis = self._axis(len(query.shape))
        outer = [query.shape[i] for i in range(len(query.shape) - 1) if i != axis]
        shape = (*outer, self.num_heads, query.shape[axis], value.shape[axis])
        return output, keras.KerasTensor(shape, dtype=self.compute_dtype)

    def compute_state_spec(
        self,
        batch_size: Any,
        initial_state: dict[str, Any] | None = None,
        use_causal_mask: bool = False,
        segment_ids: Any = None,
    ) -> dict[str, Any]:
        """The symbolic state that a call returns."""
        self._check_start(initial_state)
        if initial_state is None:
            initial_state = self.initial_state(1)
            if not use_causal_mask:
                # Without a window to go on from, all keys are in the sums.
                initial_state = {
                    n: initial_state[n] for n in ("kv", "k_sum", "log_max", "position")
                }
        state = {
            name: keras.KerasTensor(
                (batch_size, *x.shape[1:]), keras.backend.standardize_dtype(x.dtype)
            )
            for name, x in initial_state.items()
            if name != "segment_id"
        }
        if segment_ids is not None:
            dtype = keras.backend.standardize_dtype(segment_ids.dtype)
            state["segment_id"] = keras.KerasTensor((batch_size,), dtype)
        return state

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "output_shape": self._output_shape,
            "attention_axes": self.attention_axes,
            "sliding_window": self.sliding_window,
            "kernel_initializer": initializers.serialize(self._kernel_initializer),
            "bias_initializer": initializers.serialize(self._bias_initializer),
            "kernel_regularizer": regularizers.serialize(self._kernel_regularizer),
            "bias_regularizer": regularizers.serialize(self._bias_regularizer),
            "activity_regularizer": regularizers.serialize(self._activity_regularizer),
            "kernel_constraint": constraints.serialize(self._kernel_constraint),
            "bias_constraint": constraints.serialize(self._bias_constraint),
            "use_gate": self.use_gate,
            "num_features": self.num_features,
            "feature_map": self._given_feature_map,
            "exact_window": self.exact_window,
            "num_sink_tokens": self.num_sink_tokens,
            "far_bias": self.far_bias,
            "num_key_value_heads": self._given_num_key_value_heads,
            "qk_norm": self.qk_norm,
            "rotary_max_wavelength": self.rotary_max_wavelength,
            "seed": self.seed,
        }

    @property
    def query_dense(self) -> keras.layers.EinsumDense:
        """The projection of the query, as `MultiHeadAttention` names it."""
        return self._query_dense

    @property
    def key_dense(self) -> keras.layers.EinsumDense:
        """The projection of the key."""
        return self._key_dense

    @property
    def value_dense(self) -> keras.layers.EinsumDense:
        """The projection of the value."""
        return self._value_dense

    @property
    def output_dense(self) -> keras.layers.EinsumDense:
        """The projection of the output."""
        return self._output_dense

    @property
    def feature_map(self) -> feature_maps.FeatureMap | None:
        """The layer's own feature map; None before `build` and with a sliding window."""
        return self._feature_map

    def _axis(self, rank: int) -> int:
        """The attention axis of inputs with `rank` axes."""
        if self.attention_axes is None:
            if rank > 3:
                raise ValueError(
                    f"Inputs of {rank} axes have several axes between batch and features, and "
                    "linear attention runs along one: pass attention_axes, or reshape the others "
                    "into it. Received: attention_axes=None"
                )
            return 1
        axis = self.attention_axes[0]
        return axis if axis >= 0 else rank + axis

    def _dense(
        self,
        name: str,
        input_shape: tuple[Any, ...],
        output_dims: tuple[int, ...],
        num_contracted: int = 1,
        activation: str | None = None,
    ) -> keras.layers.EinsumDense:
        """A dense layer over the last axes, with the kernel shape of `MultiHeadAttention`'s."""
        letters = iter(string.ascii_lowercase)
        free = "".join(next(letters) for _ in range(len(input_shape) - num_contracted))
        contracted = "".join(next(letters) for _ in range(num_contracted))
        produced = "".join(next(letters) for _ in output_dims)
        dense = keras.layers.EinsumDense(
            f"{free}{contracted},{contracted}{produced}->{free}{produced}",
            output_shape=(*(None for _ in free[1:]), *output_dims),
            bias_axes=produced if self.use_bias else None,
            activation=activation,
            # Initializers keep state, so each sublayer has its own.
            kernel_initializer=self._kernel_initializer.clone(),
            bias_initializer=self._bias_initializer.clone(),
            kernel_regularizer=self._kernel_regularizer,
            bias_regularizer=self._bias_regularizer,
            activity_regularizer=self._activity_regularizer,
            kernel_constraint=self._kernel_constraint,
            bias_constraint=self._bias_constraint,
            dtype=self.dtype_policy,
            name=name,
        )
        dense.build(tuple(input_shape))
        # Else Keras warns that it drops the mask of its input, which `call` has read already.
        dense.supports_masking = True
        return dense

    def _make_feature_map(self) -> feature_maps.FeatureMap:
        feature_map = feature_maps.get(
            self._given_feature_map,
            num_features=self.num_features,
            seed=self.seed,
            dtype=self.dtype_policy,
        )
        feature_map.name = "feature_map"  # part of the paths of weights
        return feature_map

    def _projections(self) -> list[keras.layers.EinsumDense]:
        layers = [self._query_dense, self._key_dense]
        layers += [self._gate_dense] if self.use_gate else []
        return [*layers, self._value_dense, self._output_dense]

    def _merge_key_masks(
        self, key: Any, key_masks: list[Any], attention_mask: Any, rank: int
    ) -> Any:
        """All masks as one of keys, (B, S) or (B, K, S), or None."""
        masks = [ops.cast(m, "bool") for m in key_masks if m is not None]
        if rank > 3:
            masks = [self._batch_key_mask(m, rank) for m in masks]
        for mask in masks:
            _check_key_mask(mask, key)
        if attention_mask is not None:
            if rank > 3:
                raise ValueError(
                    "attention_mask is supported for inputs of three axes. For more, mask the "
                    "inputs (Keras masks) or fold the outer axes into the batch. Received: "
                    f"attention_mask of shape {tuple(attention_mask.shape)}"
                )
            masks.append(self._as_key_mask(ops.convert_to_tensor(attention_mask), key))
        per_head = any(len(m.shape) == 3 for m in masks)
        merged = None
        for mask in masks:
            if per_head and len(mask.shape) == 2:
                mask = ops.expand_dims(mask, 1)
            merged = mask if merged is None else ops.logical_and(merged, mask)
        if merged is None:
            return None
        # A mask may be shared by the rows of the batch.
        shape = ops.shape(merged)
        return ops.broadcast_to(merged, (ops.shape(key)[0], *shape[1:-1], ops.shape(key)[1]))

    def _batch_key_mask(self, mask: Any, rank: int) -> Any:
        """A mask of the tokens of an input with several axes, (B, ..., S, ...), as (B', S)."""
        if len(mask.shape) != rank - 1:
            raise ValueError(
                f"For inputs of {rank} axes value_mask and key_mask must have the {rank - 1} axes "
                f"before the features. Received: a mask of shape {tuple(mask.shape)}"
            )
        axis = self._axis(rank)
        mask = ops.moveaxis(mask, axis, -1)
        return ops.reshape(mask, (-1, ops.shape(mask)[-1]))

    def _as_key_mask(self, mask: Any, key: Any) -> Any:
        shape = tuple(mask.shape)
        batch, length = key.shape[:2]
        rank = len(shape)
        fits = 2 <= rank <= 4 and shape[-1] in (length, None, 1)
        fits = fits and (shape[0] in (1, None) or batch is None or shape[0] == batch)
        # Two axes are queries and keys to `MultiHeadAttention`.
        fits = fits and shape[-2] == 1
        fits = fits and (rank < 4 or shape[1] in (1, self.num_key_value_heads))
        if not fits:
            raise ValueError(
                "Linear attention sums over keys once for all queries, so attention_mask can only "
                f"be a mask of keys: (batch, 1, {length}), (batch, 1, 1, {length}) or (batch, "
                f"{self.num_key_value_heads}, 1, {length}). Pass a mask of shape (batch, {length}) "
                "as key_mask. For a mask that depends on the query use use_causal_mask=True, "
                "segment_ids for packed sequences, or sliding_window. Received: attention_mask of "
                f"shape {shape}"
            )
        mask = ops.cast(mask, "bool")
        if rank == 4:
            mask = ops.squeeze(mask, 2)
            return mask if shape[1] == self.num_key_value_heads > 1 else ops.squeeze(mask, 1)
        return ops.squeeze(mask, 1) if rank == 3 else mask

    def _drop_keys(
        self, key: Any, mask: Any, segment_ids: Any, training: bool | None, streams: bool
    ) -> Any:
        """The mask of keys, less those that dropout takes, (B, S) or (B, K, S), or None."""
        if not training or self._seed_generator is None:
            return mask
        batch, length, num_heads, _ = ops.shape(key)
        draw = keras.random.uniform(
            (batch, num_heads, length), dtype="float32", seed=self._seed_generator
        )
        kept = draw >= self.dropout
        if self.exact_window or (streams and segment_ids is not None):
            # The blocks of a row and of a segment begin where its first key is, and those of the
            # next call go on where the last one is. With a state, masked keys are padding, and of
            # the segment before them.
            borders = _borders(mask, segment_ids, kept, streams)
            kept = ops.logical_or(kept, ops.expand_dims(borders, 1))
        if mask is None:
            return kept
        return ops.logical_and(kept, mask if len(mask.shape) == 3 else ops.expand_dims(mask, 1))


class _QueryKeyNorm(keras.layers.RMSNormalization):
    """Divides by the root mean square and H^(1/4); its scale begins at H^(1/4), and undoes that.

    So queries and keys begin as long as without norms.
    """

    def build(self, input_shape: Any) -> None:
        head_dim = input_shape[-1]
        self.axis = [self.axis]  # as RMSNormalization keeps it
        self.scale = self.add_weight(
            name="scale", shape=(head_dim,), initializer=initializers.Constant(head_dim**0.25)
        )
        self.built = True

    def call(self, x: Any) -> Any:
        scale = self.scale * x.shape[-1] ** -0.25  # a few numbers, where the output has many
        return ops.rms_normalization(x, scale=scale, axis=self.axis, epsilon=self.epsilon)


class _FarBias(keras.layers.Layer):
    """Holds a bias for each key head (axis 2 of keys).

    A sublayer, so that its weight comes after those of the projections.
    """

    def __init__(self, start: float, **kwargs: Any):
        super().__init__(**kwargs)
        self._start = start

    def build(self, input_shape: Any) -> None:
        self.bias = self.add_weight(
            name="bias",
            shape=(input_shape[2],),
            initializer=initializers.Constant(self._start),
            autocast=False,
        )
        self.built = True


def attention_layers(model: keras.Model) -> list[PerformerAttention]:
    """Return every `PerformerAttention` in a model, in the order of its layers.

    A layer that `fit` makes with the first batch is not there before.

    **Args**
        model: A model, whose layers may hold attention at any depth.

    **Returns** The layers; [] if there is none.

    **Example**

    >>> inputs = keras.Input((7, 4))
    >>> outputs = PerformerAttention(num_heads=2, key_dim=8, name="first")(inputs, inputs)
    >>> [layer.name for layer in attention_layers(keras.Model(inputs, outputs))]
    ['first']
    """
    return [x for x in model._flatten_layers() if isinstance(x, PerformerAttention)]


def _check_outer_axes(query_shape: Any, value_shape: Any, key_shape: Any, axis: int) -> None:
    """Raise ValueError unless inputs agree in the axes that attention does not run along."""
    for place in range(len(query_shape) - 1):
        sizes = [shape[place] for shape in (query_shape, value_shape, key_shape)]
        if place != axis and any(differ(sizes[0], size) for size in sizes[1:]):
            raise ValueError(
                "query, value and key must agree in all axes but the last and that of attention, "
                f"here {axis}. Received: query of shape {tuple(query_shape)}, value of shape "
                f"{tuple(value_shape)}, key of shape {tuple(key_shape)}"
            )


def _check_key_mask(mask: Any, key: Any) -> None:
    """Raise ValueError for a mask of keys (B, S, K, H) that is not (B, S), or as many times one."""
    batch, length = key.shape[:2]
    if not any(fits(mask.shape, (rows, keys)) for rows in (batch, 1) for keys in (length, 1)):
        raise ValueError(
            f"A mask of keys must have one row for each of the batch, {batch}, or one for all, and "
            f"in it one place for each key, {length}. Received: a mask of shape "
            f"{tuple(mask.shape)}"
        )


def _check_places(
    rank: int, segment_ids: Any, positions: Any, query_shape: Any, key_shape: Any, one_line: bool
) -> None:
    """Raise ValueError for segments and positions that these inputs cannot have.

    `one_line` says that queries and keys share their positions even if none are given.
    """
    if rank > 3 and (segment_ids is not None or positions is not None):
        raise ValueError(
            "segment_ids and positions go with inputs of three axes: fold the outer ones into the "
            f"batch. Received: inputs of {rank} axes"
        )
    batch, length = query_shape[:2]
    if (positions is not None or one_line) and differ(length, key_shape[1]):
        raise ValueError(
            "positions, and rotary ones that go on from a state, are those of queries and keys, "
            f"which must be of one length. Received: {length} queries, {key_shape[1]} keys"
        )
    if positions is None:
        return
    shape = tuple(positions.shape)
    if not (fits(shape, (length,)) or fits(shape, (batch, length))):
        raise ValueError(
            f"positions must be integers of shape ({length},) or ({batch}, {length}), one for each "
            f"token. Received: positions of shape {shape}"
        )


def _rotate(
    query: Any, key: Any, mask: Any, positions: Any, max_wavelength: float
) -> tuple[Any, Any]:
    """Rotate by `positions`, or by the distance from each row's first unmasked key."""
    if positions is not None:
        return rotate(query, positions, max_wavelength), rotate(key, positions, max_wavelength)

    def place(x: Any) -> Any:
        return _distances(ops.shape(x)[1], None if mask is None else _first(mask))

    return rotate(query, place(query), max_wavelength), rotate(key, place(key), max_wavelength)


def _distances(length: Any, first: Any) -> Any:
    """0, 1, ... less the place of each row's first token, (T,) or (B, T)."""
    index = ops.arange(length, dtype="int32")
    return index if first is None else ops.expand_dims(index, 0) - ops.expand_dims(first, -1)


def _first(mask: Any) -> Any:
    """The place of each row's first unmasked key (B,); 0 if there is none."""
    mask = ops.any(mask, axis=1) if len(mask.shape) == 3 else mask
    return ops.cast(ops.argmax(ops.cast(mask, "int32"), axis=1), "int32")


def _borders(mask: Any, segment_ids: Any, like: Any, with_last: bool) -> Any:
    """The first unmasked keys of rows and segments (B, S), and if wanted the last ones of rows.

    `mask` is (B, S) or (B, K, S), or None for keys shaped `like` (B, K, S) that all take part.
    """
    mask = ops.ones_like(like) if mask is None else mask
    mask = ops.any(mask, axis=1) if len(mask.shape) == 3 else mask
    runs = None if segment_ids is None else run_indices(ops.convert_to_tensor(segment_ids))
    first = ops.logical_and(mask, ops.equal(positions_of(mask, runs, None), 0))
    if not with_last:
        return first
    length = ops.shape(mask)[1]
    last = length - 1 - _first(ops.flip(mask, axis=1))
    slots = ops.arange(length, dtype="int32")
    return ops.logical_or(first, ops.equal(slots, ops.expand_dims(last, -1)))


def _continue(key: Any, mask: Any, state: dict[str, Any] | None) -> tuple[Any, Any]:
    """The positions of these tokens (B, T) after `state`, and that of the next one (B,).

    The next one follows a row's last unmasked token, so rows may be padded at their end.
    """
    batch, length = ops.shape(key)[:2]
    seen = ops.zeros((batch,), "int32") if state is None else state["position"]
    if mask is None:
        return _distances(length, -seen), ops.cast(seen + length, "int32")
    mask = ops.any(mask, axis=1) if len(mask.shape) == 3 else mask
    last = length - _first(ops.flip(mask, axis=1))
    # A row that has begun goes on; one that has not begins at its first token.
    first = ops.where(seen > 0, -seen, _first(mask))
    following = ops.where(ops.any(mask, axis=1), last - first, seen)
    return _distances(length, first), ops.cast(following, "int32")


def _mha_projections(attention: Any) -> list[keras.layers.EinsumDense]:
    layers = [attention.query_dense, attention.key_dense]
    # The gate of MultiHeadAttention has no public name.
    layers += [attention._gate_dense] if attention.get_config().get("use_gate") else []
    return [*layers, attention.value_dense, attention.output_dense]


def _batch_outer_axes(x: Any, axis: int) -> tuple[Any, tuple[Any, ...]]:
    """(B, ..., T, ..., N, H) -> (B', T, N, H), and the outer shape B, ..."""
    outer = [i for i in range(len(x.shape) - 2) if i != axis]
    x = ops.transpose(x, (*outer, axis, len(x.shape) - 2, len(x.shape) - 1))
    shape = ops.shape(x)
    return ops.reshape(x, (-1, *shape[-3:])), tuple(shape[:-3])


def _unbatch_outer_axes(x: Any, outer_shape: tuple[Any, ...], axis: int) -> Any:
    x = ops.reshape(x, (*outer_shape, *ops.shape(x)[1:]))
    return ops.moveaxis(x, len(outer_shape), axis)


def _align_lengths(query: Any, key: Any, value: Any, mask: Any) -> tuple[Any, Any, Any]:
    """Give keys the length of queries: later keys are never seen, missing ones are masked."""
    length, key_length = ops.shape(query)[1], ops.shape(key)[1]
    if isinstance(length, int) and length == key_length:
        return key, value, mask
    if mask is None:
        mask = ops.ones((ops.shape(key)[0], key_length), "bool")
    mask = _with_length(mask, len(mask.shape) - 1, length)
    return _with_length(key, 1, length), _with_length(value, 1, length), mask


def _with_length(x: Any, axis: int, length: Any) -> Any:
    """Cut an axis to a length, or fill it up with zeros."""
    shape = [*ops.shape(x)]
    if not (isinstance(length, int) and isinstance(shape[axis], int)):
        shape[axis] = ops.maximum(length - shape[axis], 0)
    elif length == shape[axis]:
        return x
    else:
        shape[axis] = max(length - shape[axis], 0)
    dtype = keras.backend.standardize_dtype(x.dtype)
    x = ops.concatenate([x, ops.zeros(shape, dtype)], axis=axis)
    return x[(slice(None),) * axis + (slice(None, length),)]


def merge_masks(inputs: Any, padding_mask: Any) -> Any:
    """What takes part by `padding_mask` and by the Keras mask of `inputs`, or None for all."""
    masks = [m for m in (padding_mask, get_keras_mask(inputs)) if m is not None]
    masks = [ops.cast(mask, "bool") for mask in masks]
    return ops.logical_and(*masks) if len(masks) == 2 else masks[0] if masks else None
