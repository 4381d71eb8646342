"""Attention over a sequence whose positions are spread over devices (JAX)."""

from typing import Any

from keras import backend, ops

from keras_performer.ops._inputs import build_map
from keras_performer.ops.favor_attention import empty_favor_state, favor_attention


def sharded_favor_attention(
    query: Any,
    key: Any,
    value: Any,
    feature_map: Any,
    *,
    mesh: Any,
    sequence_axis: str,
    batch_axis: str | None = None,
    causal: bool = False,
    key_mask: Any = None,
) -> Any:
    """`favor_attention` with the positions of a sequence spread over devices, on JAX.

    Each device sums its own keys and values into a state. The states are all that devices exchange:
    added up for all of them, or causally for the devices before each. Use it for a context that is
    too long for the memory of one device. A `jax.shard_map` of your own, over batches or heads, can
    call `favor_attention` itself, with `check_vma=False`.

    **Shapes** as in `favor_attention`: B batch, T query length, S key length, N query heads, K
    key/value heads, H head size, V value head size, M features. T and S are whole lengths, each a
    multiple of the number P of devices along the sequence.

    **Args**
        query: (B, T, N, H), floating point, not scaled.
        key: (B, S, K, H).
        value: (B, S, K, V).
        feature_map: A `keras_performer.feature_maps.FeatureMap`. It is built for head size H if it
            is not yet.
        mesh: A `jax.sharding.Mesh`, such as `backend_mesh` of a `keras.distribution.DeviceMesh`.
            If its axes are of the explicit type, the inputs must be spread over them already.
        sequence_axis: The mesh's axis that positions are spread over, in their order.
        batch_axis: The mesh's axis that B is spread over. None: B is on each device.
        causal: Whether query t sees only keys 0 to t. Needs T = S.
        key_mask: None, or (B, S), True or nonzero where the key takes part.

    **Returns** The output (B, T, N, V) of the type of `query`, spread as the query is.

    **Masking** as in `favor_attention`. A device all of whose keys are masked adds nothing.

    **Precision** as in `favor_attention`. States are added on one scale, that of the largest.

    **Cost** That of `favor_attention` for T / P queries and S / P keys on each device, and their
    states once more; causally the scores within chunks too. Devices exchange O(B K M V) numbers,
    causally in 1 + log2(P) rounds.

    **Raises** NotImplementedError on other backends; ValueError if the mesh has no such axis or a
    length does not divide, and whatever `favor_attention` raises.

    **Example**

    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(1, 6, 2, 8)).astype("float32")
    >>> feature_map = keras_performer.feature_maps.FavorPlus(seed=1)
    >>> if keras.config.backend() == "jax":
    ...     import jax
    ...     mesh = jax.sharding.Mesh(jax.devices()[:1], ("sequence",))
    ...     options = {"mesh": mesh, "sequence_axis": "sequence", "causal": True}
    ...     out = sharded_favor_attention(x, x, x, feature_map, **options)

    **Source** Katharopoulos et al. 2020, arXiv 2006.16236, section 3.4: the state of causal linear
    attention, here at the borders between devices.
    """
    if backend.backend() != "jax":
        raise NotImplementedError(
            "sharded_favor_attention spreads a sequence with jax.shard_map, so it needs the JAX "
            f"backend. On another one call favor_attention. Received: {backend.backend()}"
        )
    import jax
    from jax.sharding import PartitionSpec

    query, key, value = (ops.convert_to_tensor(t) for t in (query, key, value))
    for axis in (sequence_axis, batch_axis):
        if axis is not None and axis not in mesh.shape:
            raise ValueError(
                "sequence_axis and batch_axis must name axes of the mesh. Received: "
                f"{axis!r}, and a mesh of {dict(mesh.shape)}"
            )
    num_devices = mesh.shape[sequence_axis]
    for name, tensor in (("query", query), ("key", key)):
        if tensor.shape[1] % num_devices:
            raise ValueError(
                f"The length of {name} (axis 1) must be a multiple of the {num_devices} devices "
                f"along {sequence_axis!r}: pad it, and mask the keys that pad. Received: "
                f"{name}.shape={tuple(tensor.shape)}"
            )
    build_map(feature_map, key)
    if key_mask is None:
        key_mask = ops.ones(key.shape[:2], "bool")
    key_mask = ops.cast(ops.convert_to_tensor(key_mask), "bool")

    def attend(query, key, value, key_mask):
        # One query is enough to have the state of these keys.
        _, state = favor_attention(
            query[:, :1], key, value, feature_map, key_mask=key_mask, return_state=True
        )
        if causal:
            batch, _, num_key_heads, value_dim = value.shape
            empty = empty_favor_state(
                feature_map, batch, num_key_heads, value_dim, state["kv"].dtype
            )
            before = _states_before(state, empty, sequence_axis, num_devices)
            return favor_attention(
                query, key, value, feature_map, causal=True, key_mask=key_mask, initial_state=before
            )
        largest = jax.lax.pmax(jax.lax.stop_gradient(state["log_max"]), sequence_axis)
        total = {
            name: jax.lax.psum(tensor, sequence_axis)
            for name, tensor in _rescaled(state, largest).items()
        }
        # The state holds all keys, these too; a call must have one, so it is a masked one.
        return favor_attention(
            query,
            key[:, :1],
            value[:, :1],
            feature_map,
            key_mask=ops.zeros_like(key_mask[:, :1]),
            initial_state={**total, "log_max": largest},
        )

    spread = PartitionSpec(batch_axis, sequence_axis)
    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=spread,
        out_specs=spread,
        # The loops of favor_attention start from sums that are the same on every device.
        check_vma=False,
    )(query, key, value, key_mask)


def _states_before(state: Any, empty: Any, axis: str, num_devices: int) -> Any:
    """The sum of the states of the devices before this one, `empty` on the first."""
    import jax

    index = jax.lax.axis_index(axis)

    def from_device(distance, state):
        pairs = [(i, i + distance) for i in range(num_devices - distance)]
        received = {name: jax.lax.ppermute(t, axis, pairs) for name, t in state.items()}
        return {n: ops.where(index >= distance, t, empty[n]) for n, t in received.items()}

    state, distance = from_device(1, state), 1
    while distance < num_devices:
        # Now each state is the sum over the `distance` devices before its own.
        other = from_device(distance, state)
        largest = ops.maximum(state["log_max"], other["log_max"])
        one, two = _rescaled(state, largest), _rescaled(other, largest)
        state = {"log_max": largest, **{name: one[name] + two[name] for name in one}}
        distance *= 2
    return state


def _rescaled(state: Any, log_max: Any) -> dict[str, Any]:
    """The sums of a state, on the scale `log_max`."""
    factor = ops.exp(state["log_max"] - log_max)
    return {"kv": state["kv"] * ops.expand_dims(factor, -1), "k_sum": state["k_sum"] * factor}
