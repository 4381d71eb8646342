"""Whether a model's features are up to its attention, measured while it trains."""

import importlib.util
import warnings
from typing import Any

import keras
import numpy as np

from keras_performer.callbacks._health import layer_health
from keras_performer.callbacks._step_multiples import StepMultiples, is_built, step_count
from keras_performer.layers import attention_layers
from keras_performer.layers._arguments import positive_int
from keras_performer.layers._recording import record_attention


class AttentionHealth(keras.callbacks.Callback):
    """Measure, head by head, how well features stand in for softmax attention.

    Runs a small batch through the model in inference mode and looks at the queries and keys of
    each `PerformerAttention`. The features of a head suffice while the relative variance of its
    estimates is well below 1. Above it attention is noise: once in a training this warns, naming
    the worst head and what to change.

    **Args**
        inputs: A small batch of the model's inputs: what `model(inputs)` takes.
        every: "epoch", or the number of training steps from one measurement to the next; a step is
            a step of the optimizer. With `steps_per_execution` it measures after the group of
            batches in which a multiple of `every` falls.
        log_dir: A local folder for TensorBoard, or None. Scalars are named
            `attention/<path of the layer>/head_<number>/<figure>`.
        max_tokens: Look at no more pairs of a query and a key than the square of it in each
            sequence and head. Of longer sequences it takes a random part of the queries, the same
            each time, and all keys.

    **Figures** They go to `history`, a list with a dictionary for each time, layer and head, of
    `step`, `layer` (its path), `head` and

    * `relative_variance`: the variance of an estimate of exp(q.k / sqrt(H)) over its square, by the
      formula, averaged as softmax attention weighs the keys;
    * `measured_relative_variance`: the same of the projection as drawn, an error;
    * `effective_features`: how many features carry the sums, of M;
    * `window_share`: the share of softmax attention that lies within the layer's exact window, sink
      tokens included, or, if it has none, what a window of 64 tokens would hold;
    * `total_variation`: half the sum of absolute differences between the layer's weights and
      softmax attention's: 0 is equal, 1 is disjoint.

    Pairs in an exact window have no variance. Maps that do not estimate softmax have the last and
    the third, and layers with exact attention are left out. Without a formula for a map, or with a
    trained projection, `relative_variance` is missing. Heads that are masked altogether have NaN.

    **Logs** The epoch's logs get `attention_relative_variance`, the median over heads, and
    `attention_total_variation`, their mean, from the last measurement.

    **Cost** One inference, and O(B N P (H + M)) a layer on the CPU, in float64, for P pairs a
    sequence.

    **Raises** ImportError for a `log_dir` without the package `tensorboard`; ValueError for other
    arguments that cannot be, and at the start of training for a model without feature attention.

    **Example**

    >>> attention = keras_performer.layers.PerformerAttention(2, key_dim=8)
    >>> inputs = keras.Input((5, 12))
    >>> model = keras.Model(inputs, attention(inputs, inputs))
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(6, 5, 12)).astype("float32") / 4
    >>> health = AttentionHealth(x[:2])
    >>> _ = model.fit(x, x, verbose=0, callbacks=[health])
    >>> len(health.history), sorted(health.history[0])[:3]
    (2, ['effective_features', 'head', 'layer'])

    **Source** Choromanski et al. 2021, arXiv 2009.14794, lemma 2. The figures are ours.
    """

    def __init__(
        self,
        inputs: Any,
        every: int | str = "epoch",
        log_dir: str | None = None,
        max_tokens: int = 512,
    ) -> None:
        super().__init__()
        if isinstance(every, str) and every != "epoch":
            raise ValueError(
                f"`every` must be 'epoch' or an integer above zero. Received: every={every!r}"
            )
        self.inputs = inputs
        self.every = every if isinstance(every, str) else positive_int("every", every)
        self.log_dir = log_dir
        self.max_tokens = positive_int("max_tokens", max_tokens)
        self.history: list[dict[str, Any]] = []
        if log_dir is not None and importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "`log_dir` needs the package tensorboard: pip install 'keras-performer[train]'. "
                f"Received: log_dir={log_dir!r}"
            )
        self._steps = None if isinstance(self.every, str) else StepMultiples(self.every)
        self._logs: dict[str, float] = {}
        self._writer = None
        self._has_warned = self._checked = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Begin a new history, and check that there is something to measure."""
        self._check()
        self.on_train_end()  # of a training that an exception ended
        self.history, self._logs, self._has_warned = [], {}, False
        if self.log_dir is not None:
            from keras_performer.callbacks._scalar_writer import ScalarWriter

            self._writer = ScalarWriter(self.log_dir)

    def _check(self) -> None:
        self._checked = is_built(self.model)
        layers = attention_layers(self.model)
        if self._checked and all(layer.feature_map is None for layer in layers):
            raise ValueError(
                "AttentionHealth found nothing to measure: the model has no PerformerAttention "
                f"with a feature map. Leave the callback out. Received: model {self.model.name!r}"
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Find out the step count: a checkpoint may have been restored since."""
        if self._steps is not None:
            self._steps.start(self.model)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Measure if the step count has passed a multiple of `every`."""
        if not self._checked:
            self._check()
        if self._steps is not None and self._steps.passed(self) is not None:
            self._measure()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Measure if it is due, and add what was last found to the logs."""
        if self._steps is None:
            self._measure()
        if logs is not None:
            logs.update(self._logs)

    def on_train_end(self, logs: Any = None) -> None:
        """Close the file for TensorBoard."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _measure(self) -> None:
        model = self.model
        with record_attention() as records:
            model(self.inputs, training=False)
        step, found = step_count(model), []
        for record in records:
            layer, figures = record.layer, layer_health(record, self.max_tokens)
            if not figures:
                continue
            for head in range(layer.num_heads):
                values = {name: float(per_head[head]) for name, per_head in figures.items()}
                found.append({"step": step, "layer": layer.path, "head": head, **values})
        self.history += found
        self._logs = _summary(found)
        if self._writer is not None:
            self._writer.write(_scalars(found), step)
        if not self._has_warned:
            self._warn(found)

    def _warn(self, found: list[dict[str, Any]]) -> None:
        name = "relative_variance"
        beyond = [entry for entry in found if entry.get(name, 0.0) > 1]
        if not beyond:
            return
        worst = max(beyond, key=lambda entry: entry[name])
        window = "an exact_window for near tokens"
        if "window_share" in worst:
            window += f" ({worst['window_share']:.0%} of its softmax attention is near)"
        self._has_warned = True
        warnings.warn(
            f"Head {worst['head']} of {worst['layer']} is beyond its features: the relative "
            f"variance of its estimates is {worst[name]:.3g} at step {worst['step']}, and that of "
            f"{len(beyond)} out of {len(found)} heads is above 1. Use more features "
            f"(num_features), shorter queries and keys (qk_norm=True), {window}, or "
            "feature_map='favor_plus_plus' (FavorPlusPlus).",
            stacklevel=2,
        )


def _summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """What the logs get, of the heads that have it."""
    summary = {}
    for name, average in (("relative_variance", np.median), ("total_variation", np.mean)):
        values = [entry[name] for entry in found if not np.isnan(entry.get(name, np.nan))]
        if values:
            summary[f"attention_{name}"] = float(average(values))
    return summary


def _scalars(found: list[dict[str, Any]]) -> dict[str, float]:
    """The figures by their tags in TensorBoard."""
    scalars = {}
    for entry in found:
        figures = {k: v for k, v in entry.items() if k not in ("step", "layer", "head")}
        for name, value in figures.items():
            scalars[f"attention/{entry['layer']}/head_{entry['head']}/{name}"] = value
    return scalars
