"""New random features while a model trains."""

import numbers
from typing import Any

import keras
import numpy as np

from keras_performer.callbacks._step_multiples import StepMultiples, is_built
from keras_performer.feature_maps import FeatureMap
from keras_performer.layers import attention_layers
from keras_performer.layers._arguments import positive_int


class RedrawFeatures(keras.callbacks.Callback):
    """Draw the random projections of a model's attention again after every few training steps.

    A model that trains against one draw learns to use its errors; new draws make it learn softmax
    attention, which the features estimate. Every layer gets a projection of its own. Training only:
    `evaluate`, `predict` and `generate` use the last draw, and so does the validation within `fit`.
    The projection is a weight, saved and restored with the model.

    **Args**
        every: Number of training steps from one draw to the next. A step is a step of the
            optimizer: a batch, or several if gradients are accumulated. With `steps_per_execution`
            features are drawn after the group of batches in which a multiple of `every` falls.
        seed: Seeds the draws, an integer of at least 0. A draw depends on the seed, the multiple of
            `every` that the step count has reached, and the layer's place in the model, so that
            every replica and every resumed run draw the same.

    **Cost** O(M H) a layer and draw, and once O(H^3) for orthogonal rows.

    **Raises** ValueError at the start of training if no layer of the model has a projection to
    draw: feature maps without one and trainable ones are left alone, and exact attention has none.

    **Example**

    >>> attention = keras_performer.layers.PerformerAttention(num_heads=2, key_dim=8)
    >>> inputs = keras.Input((5, 12))
    >>> model = keras.Model(inputs, attention(inputs, inputs))
    >>> model.compile("sgd", "mse")
    >>> x = np.ones((6, 5, 12), "float32")
    >>> before = keras.ops.convert_to_numpy(attention.feature_map.projection).copy()
    >>> _ = model.fit(x, x, batch_size=2, verbose=0, callbacks=[RedrawFeatures(every=2)])
    >>> after = keras.ops.convert_to_numpy(attention.feature_map.projection)
    >>> bool((before == after).any())
    False

    **Source** Choromanski et al. 2021, arXiv 2009.14794, whose experiments redraw features.
    """

    def __init__(self, every: int, seed: int = 0) -> None:
        super().__init__()
        self.every = positive_int("every", every)
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
            raise ValueError(f"`seed` must be an integer of at least 0. Received: seed={seed!r}")
        self.seed = int(seed)
        self._steps = StepMultiples(self.every)
        self._checked = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Check that there is something to draw."""
        self._check()

    def _check(self) -> None:
        self._checked = is_built(self.model)
        if self._checked and not _random_maps(self.model):
            raise ValueError(
                "RedrawFeatures found nothing to draw: no PerformerAttention of the model has a "
                "feature map with a random projection that is not trainable. Leave the callback "
                f"out, or use feature_map='favor_plus'. Received: model {self.model.name!r}"
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Find out the step count: a checkpoint may have been restored since."""
        self._steps.start(self.model)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Draw if the step count has passed a multiple of `every`."""
        if not self._checked:
            self._check()
        step = self._steps.passed(self)
        if step is None:
            return
        # Under JAX `fit` keeps the values outside the variables. `self.model` has put them back,
        # and `fit` reads the variables again before the next batch.
        for index, feature_map in enumerate(_random_maps(self.model)):
            feature_map.redraw(_seed_for(self.seed, step, index))


def _random_maps(model: Any) -> list[FeatureMap]:
    """The feature maps to draw, in the order of the model's layers."""
    maps = [x.feature_map for x in attention_layers(model) if x.feature_map is not None]
    return [m for m in maps if m.projection is not None and not m.trainable_projection]


def _seed_for(seed: int, step: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, step, index]).generate_state(1)[0])
