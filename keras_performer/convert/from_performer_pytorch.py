"""Checkpoints of performer-pytorch."""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_performer.convert._tensor_files import as_arrays, read_safetensors, read_torch
from keras_performer.convert._weight_transfer import WeightTransfer
from keras_performer.convert.performer_pytorch_backbone import PerformerPytorchBackbone
from keras_performer.convert.performer_pytorch_lm import PerformerPytorchLM
from keras_performer.feature_maps import FavorPlus, GeneralizedKernel

_REQUIRED = ("num_tokens", "max_seq_len", "dim", "depth", "heads")
# The defaults of `PerformerLM`, of what its outputs depend on.
_DEFAULTS: dict[str, Any] = {
    "dim_head": 64,
    "local_attn_heads": 0,
    "causal": False,
    "ff_mult": 4,
    "nb_features": None,
    "reversible": False,
    "ff_glu": False,
    "emb_dropout": 0.0,
    "ff_dropout": 0.0,
    "attn_dropout": 0.0,
    "generalized_attention": False,
    "kernel_fn": "relu",
    "use_scalenorm": False,
    "use_rezero": False,
    "cross_attend": False,
    "no_projection": False,
    "tie_embed": False,
    "rotary_position_emb": True,
    "axial_position_emb": False,
    "axial_position_shape": None,
    "qkv_bias": False,
    "attn_out_bias": False,
    "shift_tokens": False,
}
# How the model was trained and run; outputs are the same.
_IGNORED = ("local_window_size", "feature_redraw_interval", "ff_chunks", "auto_check_redraw")
_REFUSED = {
    "local_attn_heads": "heads with windowed softmax attention have no counterpart here",
    "cross_attend": "the blocks that attend to a context have no counterpart here",
    "no_projection": "queries and keys that are normalised by softmax have no counterpart here",
}
_NESTED = ("model_state_dict", "state_dict", "model")
_NET = "performer.net."
_NET_AGAIN = "performer.proj_updater.instance."
_EPSILONS = (1e-4, 1e-6)


def from_performer_pytorch(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    config: Mapping[str, Any],
    *,
    legacy_epsilon: bool = True,
) -> PerformerPytorchLM:
    """Import a `PerformerLM` of performer-pytorch, encoder or decoder.

    Rotary, absolute and axial positions, GLU, scalenorm, rezero, token shift, generalized
    attention, reversible blocks, tied embeddings and biases are taken; local attention heads,
    cross-attention and `no_projection` are refused. Without padding logits are those of the source,
    to rounding. With padding they differ: there masked keys still count in the denominator, and
    here they do not.

    A state dict does not tell all options, so `config` repeats the constructor's arguments.
    scBERT, which annotates single cells, is stored in this way, with gene2vec in the place of
    absolute positions: a token is the binned expression of a gene, its position is the gene.
    Its configuration:

        dict(num_tokens=7, max_seq_len=16907, dim=200, depth=6, heads=10,
             rotary_position_emb=False, attn_out_bias=True)

    For cell types put a head of your own on `model.backbone`, as scBERT does.

    **Args**
        checkpoint: A file of PyTorch or safetensors with a state dict, alone or under
            "model_state_dict", "state_dict" or "model"; or the state dict's arrays by name.
        config: The arguments of `PerformerLM`, by its names; its defaults stand for the rest.
            `kernel_fn` is the name of a Keras activation.
        legacy_epsilon: Whether attention keeps the epsilons of performer-pytorch, and a maximum
            over the whole sequence that comes with them, for equal outputs. In causal models later
            tokens then reach earlier outputs, as they do there. False computes the same attention
            without them; see `FavorPlus`. With random weights that moved the logits of small
            models by 0.01 to 0.02 % in relative RMS, and those of a model of scBERT's size by 2 %.
            Generalized attention has no such epsilon.

    **Returns** A `PerformerPytorchLM`.

    **Raises** ValueError for options that are unknown, missing or refused, for a file of anything
    but tensors, and for tensors that are missing, unknown or misshaped, which it names;
    ImportError for a PyTorch file without PyTorch.

    **Example**

    >>> config = {"num_tokens": 7, "max_seq_len": 20, "dim": 8, "depth": 1, "heads": 2}
    >>> model = from_performer_pytorch("performer.pt", config)  # doctest: +SKIP

    **Source** performer-pytorch 1.1.4; scBERT: Yang et al. 2022, doi 10.1038/s42256-022-00534-z.
    """
    options = _check(config)
    source = "the state dict" if isinstance(checkpoint, Mapping) else os.fspath(checkpoint)
    weights = WeightTransfer(_arrays(checkpoint, source), source)
    model = PerformerPytorchLM(_backbone(options, legacy_epsilon), tie_weights=options["tie_embed"])
    backbone = model.backbone
    weights.leave(r"performer\.(proj_updater\.)?calls_since_last_redraw")
    weights.move("token_emb.weight", backbone.token_embedding.embeddings)
    positions = _take_positions(weights, options)
    weights.assign(backbone.position_embedding.position_embeddings, positions)
    for i, block in enumerate(backbone.transformer_layers):
        _fill_block(weights, options, i, block)
    weights.norm("norm", backbone.final_norm)
    if model.output_dense is not None:
        weights.dense("to_out", model.output_dense)
    weights.finish(model)
    return model


def _check(config: Mapping[str, Any]) -> dict[str, Any]:
    """All options, or a ValueError for what cannot be honoured."""
    known = {*_REQUIRED, *_DEFAULTS, *_IGNORED}
    missing, unknown = [n for n in _REQUIRED if n not in config], sorted(config.keys() - known)
    if missing or unknown:
        raise ValueError(
            "config holds the arguments of PerformerLM. Received: config without "
            f"{missing} and with the unknown {unknown}"
        )
    options = {**_DEFAULTS, **config}
    for name, why in _REFUSED.items():
        if np.any(options[name]):
            raise ValueError(
                f"A PerformerLM with {name} cannot be imported: {why}. "
                f"Received: {name}={options[name]!r}"
            )
    if options["nb_features"] is None:
        options["nb_features"] = int(options["dim_head"] * math.log(options["dim_head"]))
    if options["axial_position_shape"] is None:
        options["axial_position_shape"] = (math.ceil(options["max_seq_len"] / 64), 64)
    return options


def _arrays(checkpoint: Any, source: str) -> dict[str, np.ndarray]:
    """The arrays of a state dict, each once."""
    if isinstance(checkpoint, Mapping):
        arrays = {name: np.asarray(value) for name, value in checkpoint.items()}
    elif Path(checkpoint).suffix == ".safetensors":
        arrays = read_safetensors(Path(checkpoint).read_bytes(), source)
    else:
        content = read_torch(Path(checkpoint).read_bytes(), source)
        nested = [n for n in _NESTED if isinstance(content, dict) and n in content]
        arrays = as_arrays(content[nested[0]] if nested else content, source)
    once = dict(arrays)
    for name in arrays:
        # The module that redraws projections refers to the blocks, which are listed again.
        original = name.replace(_NET_AGAIN, _NET)
        if original != name and np.array_equal(arrays.get(original, ()), arrays[name]):
            del once[name]
    return once


def _backbone(options: dict[str, Any], legacy_epsilon: bool) -> PerformerPytorchBackbone:
    if options["generalized_attention"]:
        feature_map: Any = GeneralizedKernel(
            options["kernel_fn"],
            options["nb_features"],
            projection="orthogonal",
            scale_inputs=True,
        )
    else:
        feature_map = FavorPlus(
            options["nb_features"], legacy_epsilon=_EPSILONS if legacy_epsilon else None
        )
    norm = "scale" if options["use_scalenorm"] else "rezero" if options["use_rezero"] else "layer"
    return PerformerPytorchBackbone(
        vocabulary_size=options["num_tokens"],
        max_sequence_length=options["max_seq_len"],
        num_layers=options["depth"],
        num_heads=options["heads"],
        hidden_dim=options["dim"],
        key_dim=options["dim_head"],
        intermediate_dim=options["dim"] * options["ff_mult"],
        causal=options["causal"],
        norm=norm,
        gated=options["ff_glu"],
        shift_tokens=options["shift_tokens"],
        rotary=options["rotary_position_emb"],
        use_bias=options["qkv_bias"] or options["attn_out_bias"],
        reversible=options["reversible"],
        feature_map=feature_map,
        embedding_dropout=options["emb_dropout"],
        attention_dropout=options["attn_dropout"],
        feedforward_dropout=options["ff_dropout"],
    )


def _take_positions(weights: WeightTransfer, options: dict[str, Any]) -> np.ndarray:
    """The table of what is added to the tokens (max_seq_len, dim)."""
    length, width = options["max_seq_len"], options["dim"]
    if options["rotary_position_emb"]:
        size = options["dim_head"]
        rotation = weights.take("layer_pos_emb.emb", (length, size))
        frequency = 10000.0 ** -(np.arange(0, size, 2) / size)
        angle = np.arange(length)[:, None] * frequency
        if not np.allclose(rotation, np.hstack([np.sin(angle), np.cos(angle)]), atol=1e-3):
            weights.problem("layer_pos_emb.emb holds other angles than those of wavelength 10000")
        return weights.take("pos_emb.emb", (length, width))
    if not options["axial_position_emb"]:
        return weights.take("pos_emb.emb.weight", (length, width))
    shape = tuple(options["axial_position_shape"])
    table = np.zeros((*shape, width), "float32")
    for axis, size in enumerate(shape):
        # Older versions of axial-positional-embedding have an underscore.
        name = f"pos_emb.weights_{axis}"
        name = name if name in weights else f"pos_emb.weights.{axis}"
        ones = [1] * len(shape)
        table = table + weights.take(name, (1, *ones[:axis], size, *ones[axis + 1 :], width))[0]
    table = table.reshape(-1, width)
    if len(table) < length:
        weights.problem(f"axial_position_shape={shape} has fewer places than {length}")
        table = np.zeros((length, width), "float32")
    return table[:length]


def _fill_block(weights: WeightTransfer, options: dict[str, Any], index: int, block: Any) -> None:
    if options["reversible"]:
        branches = [f"{_NET}blocks.{index}.{part}.net" for part in ("f", "g")]
    else:
        branches = [f"{_NET}layers.{index}.{part}" for part in (0, 1)]
    for branch, norm in zip(branches, (block.attention_norm, block.feedforward_norm), strict=True):
        if block.norm == "layer":
            weights.norm(f"{branch}.norm", norm)
        else:
            shape = (1,) if block.norm == "scale" else ()
            weights.assign(norm, weights.take(f"{branch}.g", shape).reshape(()))
    inner = ".fn.fn" if options["shift_tokens"] else ".fn"
    attention, feed_forward = branches[0] + inner, f"{branches[1]}{inner}.fn"

    heads, size = options["heads"], options["dim_head"]
    order = np.arange(heads * size).reshape(heads, size)
    columns = np.arange(size)
    if options["rotary_position_emb"]:
        # There dimension 2i turns with 2i + 1, here with i + H/2.
        columns = np.concatenate([columns[::2], columns[1::2]])
    bias = options["qkv_bias"]
    layer = block.attention
    for part in ("query", "key"):
        weights.dense(
            f"{attention}.to_{part[0]}",
            getattr(layer, f"{part}_dense"),
            bias=bias,
            order=order[:, columns].ravel(),
        )
    weights.dense(f"{attention}.to_v", layer.value_dense, bias=bias)
    weights.dense(
        f"{attention}.to_out", layer.output_dense, num_inputs=2, bias=options["attn_out_bias"]
    )
    projection = weights.take(
        f"{attention}.fast_attention.projection_matrix", (options["nb_features"], size)
    )
    weights.assign(layer.feature_map.projection, projection[:, columns])
    weights.dense(f"{feed_forward}.w1", block.feedforward_intermediate)
    weights.dense(f"{feed_forward}.w2", block.feedforward_output)
