"""A training step of a whole model, against the same model without attention.

Run `python -m training.benchmarks.model_speed` (`KERAS_BACKEND` chooses the backend). The model is
the paper's regular one: 8 heads, 6 layers, width 512, feed-forward width 2,048. "No attention" is
the paper's line X: every layer passes its values on, so what is left is what a Transformer costs
beside attention.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import keras
from rich.table import Table

from keras_performer.layers import PerformerEncoderBlock
from keras_performer.models import PerformerEncoderBackbone
from training.command import make_console, start_keras
from training.timing import VOCABULARY, interleaved, token_model, token_step


class ValuesOnly(keras.layers.Layer):
    """The projections of values and outputs, and nothing between them."""

    def __init__(self, num_heads: int, key_dim: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.value = keras.layers.Dense(num_heads * key_dim, name="value")
        self.attention_output = keras.layers.Dense(num_heads * key_dim, name="attention_output")

    def build(self, shape: tuple[Any, ...], _: Any = None) -> None:
        """Create both projections."""
        self.value.build(shape)
        self.attention_output.build(shape)
        self.built = True

    def call(
        self,
        query: Any,
        value: Any,
        key_mask: Any = None,
        use_causal_mask: bool = False,
        segment_ids: Any = None,
        positions: Any = None,
        initial_state: Any = None,
        return_state: bool = False,
    ) -> Any:
        """Project values twice; masks and positions mean nothing here."""
        del query, key_mask, use_causal_mask, segment_ids, positions, initial_state, return_state
        return self.attention_output(self.value(value))


class BlockWithoutAttention(PerformerEncoderBlock):
    """An encoder block of `ValuesOnly`."""

    def _build_attention(self, name: str, query_shape: Any, value_shape: Any) -> Any:
        layer = ValuesOnly(
            self.num_heads, query_shape[-1] // self.num_heads, dtype=self.dtype_policy, name=name
        )
        layer.build(query_shape)
        return layer


class BackboneWithoutAttention(PerformerEncoderBackbone):
    """An encoder of such blocks."""

    block_class = BlockWithoutAttention


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "no attention": (BackboneWithoutAttention, {}),
    "64 features": (PerformerEncoderBackbone, {"num_features": 64}),
    "64 features, window 64": (
        PerformerEncoderBackbone,
        {"num_features": 64, "exact_window": 64},
    ),
    "256 features": (PerformerEncoderBackbone, {"num_features": 256}),
    "softmax": (PerformerEncoderBackbone, {"attention": "softmax"}),
}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and return seconds by kind."""
    parser = argparse.ArgumentParser(description="A training step against one without attention.")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--num-layers", type=int, default=6)
    parser.add_argument("--hidden-dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="timings to take the median of")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--policy", default="float32", help="such as mixed_bfloat16")
    arguments = parser.parse_args(argv)
    start_keras(None, seed=0)
    keras.config.set_dtype_policy(arguments.policy)
    length = arguments.length
    runs = {}
    for kind in dict.fromkeys(["no attention", *arguments.kinds]):
        model = make_model(kind, arguments.num_layers, arguments.hidden_dim)
        runs[kind] = functools.partial(token_step, model, length)
    seconds = interleaved(runs, arguments.rounds)
    title = f"Training step, batch 1, T = {length:,}, {keras.config.backend()}, {arguments.policy}"
    table = Table(title=title)
    for column in ("attention", "seconds", "times no attention"):
        table.add_column(column, justify="right")
    for kind, found in seconds.items():
        table.add_row(kind, f"{found:.2f}", f"{found / seconds['no attention']:.2f}")
    make_console().print(table)
    return seconds


def make_model(kind: str, num_layers: int, hidden_dim: int) -> keras.Model:
    """Return a compiled model that predicts its own tokens."""
    backbone_class, options = KINDS[kind]
    backbone = backbone_class(
        vocabulary_size=VOCABULARY,
        num_layers=num_layers,
        num_heads=max(1, hidden_dim // 64),
        hidden_dim=hidden_dim,
        intermediate_dim=4 * hidden_dim,
        seed=0,
        **options,
    )
    return token_model(backbone, keras.optimizers.Adam(1e-4))


if __name__ == "__main__":
    main()
