"""What `--distribution` means: the devices of a run, and how its work is divided among them.

On JAX `keras.distribution` does it: "data" gives every device a part of each batch, and "model:k"
also spreads the weights of the layers over k devices. On TensorFlow "data" is
`tf.distribute.MirroredStrategy`. Losses, gradients and their clipping are those of the whole batch,
so that a run on several devices is the run on one.
"""

import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from training.data.batches import Batches
from training.sections import ModelConfig, TrainingConfig

# Where a run on several hosts is described; on TPU slices JAX finds the rest itself.
PROCESS_VARIABLES = (
    "KERAS_DISTRIBUTION_JOB_ADDRESSES",
    "KERAS_DISTRIBUTION_NUM_PROCESSES",
    "JAX_COORDINATOR_ADDRESS",
)


def distribute(choice: str, training: TrainingConfig, model: ModelConfig | None) -> int:
    """Choose the devices of this process from here on. Nothing may have been computed before.

    **Args**
        choice: "data" or "model:k".
        training: Section `[training]` of the config.
        model: Section `[model]`, or None if a preset decides the shape.

    **Returns** The number of this process, 0 for the first and for the only one.

    **Raises** ValueError, in one sentence, if the backend, the devices or the config do not allow
    it.
    """
    kind, _, number = choice.partition(":")
    if not (choice == "data" or (kind == "model" and number.isdecimal() and int(number) > 1)):
        raise ValueError(
            "--distribution must be data, or model:K with K of at least 2 devices for each copy of "
            f"the model. Received: {choice}"
        )
    backend = keras.config.backend()
    if backend == "torch":
        raise ValueError(
            "--distribution needs JAX or TensorFlow, because Keras trains on one device on "
            "PyTorch: pass --backend jax, or leave the flag out."
        )
    if backend == "tensorflow":
        if kind == "model":
            raise ValueError(
                f"--distribution {choice} needs JAX, because TensorFlow copies the whole model to "
                "each device: pass --backend jax, or --distribution data."
            )
        _mirror(training)
        return 0
    return _spread(int(number or 1), training, model)


def _spread(devices_per_copy: int, training: TrainingConfig, model: ModelConfig | None) -> int:
    """Set a `keras.distribution` on JAX, and return the number of this process."""
    import jax

    if any(name in os.environ for name in PROCESS_VARIABLES):
        keras.distribution.initialize()
    devices = keras.distribution.list_devices()
    if devices_per_copy == 1:
        _check_batch(training, len(devices))
        distribution = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False)
    else:
        choice = f"--distribution model:{devices_per_copy}"
        if jax.process_count() > 1:
            raise ValueError(
                f"{choice} runs in one process, because no other could save weights that lie on "
                "several hosts: pass --distribution data."
            )
        copies, rest = divmod(len(devices), devices_per_copy)
        if rest:
            raise ValueError(
                f"{choice} needs a multiple of {devices_per_copy} devices, and there are "
                f"{len(devices)}."
            )
        sizes = ("num_heads", "hidden_dim", "intermediate_dim") if model is not None else ()
        for name in sizes:
            if getattr(model, name) % devices_per_copy:
                raise ValueError(
                    f"{choice} divides heads and widths among {devices_per_copy} devices, and "
                    f"'model.{name}' is {getattr(model, name)}, no multiple of it."
                )
        _check_batch(training, copies)
        axes = ("batch", "model")
        mesh = keras.distribution.DeviceMesh((copies, devices_per_copy), axes, devices)
        distribution = keras.distribution.ModelParallel(
            layout_map=layout_map(mesh), batch_dim_name="batch", auto_shard_dataset=False
        )
    keras.distribution.set_distribution(distribution)
    return jax.process_index()


def layout_map(mesh: keras.distribution.DeviceMesh) -> keras.distribution.LayoutMap:
    """Return how the weights of our models lie on the axis "model" of a mesh.

    Heads and the inner width of the feed-forward layers are divided, so that a block adds up twice
    between devices: after attention and after the feed-forward layers. Embeddings are divided along
    the width. What is not named is on every device, the random features among it.
    """
    layouts = keras.distribution.LayoutMap(mesh)
    layouts[".*token_embedding/embeddings"] = (None, "model")
    layouts[".*/(query|key|value)/kernel"] = (None, "model", None)
    layouts[".*/(query|key|value)/bias"] = ("model", None)
    layouts[".*/attention_output/kernel"] = ("model", None, None)
    layouts[".*/feedforward_(intermediate|gate)/kernel"] = (None, "model")
    layouts[".*/feedforward_(intermediate|gate)/bias"] = ("model",)
    layouts[".*/feedforward_output/kernel"] = ("model", None)
    return layouts


def _mirror(training: TrainingConfig) -> None:
    """Set a `MirroredStrategy` over the GPUs of this machine, or its (logical) CPUs."""
    import tensorflow as tf

    if training.precision == "mixed_float16":
        raise ValueError(
            "--distribution data does not go with mixed_float16 on TensorFlow, whose loss scaling "
            "is decided on each device: pass --set training.precision=mixed_bfloat16."
        )
    if training.accumulate > 1:
        raise ValueError(
            "--distribution data does not go with accumulated gradients on TensorFlow, whose "
            "replicas cannot meet in some steps only: pass --set training.accumulate=1. "
            f"Received: training.accumulate={training.accumulate}"
        )
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    _check_batch(training, len(devices))
    # On CPUs, which are for tests, the default waits for threads; on GPUs it is NCCL.
    on_cpu = devices[0].device_type == "CPU"
    reduction = tf.distribute.ReductionToOneDevice() if on_cpu else None
    strategy = tf.distribute.MirroredStrategy([device.name for device in devices], reduction)
    tf.distribute.experimental_set_strategy(strategy)


def _check_batch(training: TrainingConfig, replicas: int) -> None:
    if training.batch_size % replicas:
        raise ValueError(
            f"'training.batch_size' is {training.batch_size}, which {replicas} replicas cannot "
            "share equally: choose a multiple of their number."
        )


def _mirrored_replicas() -> int:
    """Return the number of replicas of a `MirroredStrategy`, 1 if there is none."""
    if keras.config.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return tf.distribute.get_strategy().num_replicas_in_sync


def num_replicas() -> int:
    """Return into how many parts a batch is divided."""
    distribution = keras.distribution.distribution()
    return _mirrored_replicas() if distribution is None else distribution.num_model_replicas


def share_work(
    batches: Batches, validation_data: Any, batch_size: int, loss: keras.losses.Loss
) -> tuple[Any, Any, int]:
    """Divide training and validation among replicas, or leave all as it is if there is one.

    Validation is cut to whole batches, so that each replica has its rows in every step.

    **Args**
        batches: Training data.
        validation_data: Arrays.
        batch_size: Rows of a batch.
        loss: On TensorFlow its reduction is set to the one that `with_unit_weights` needs.

    **Returns** What `fit` takes: training data, validation data and batch size of the validation.

    **Raises** ValueError if the validation has not a row for each replica.
    """
    replicas, mirrored = num_replicas(), _mirrored_replicas() > 1
    if replicas == 1:
        return batches, validation_data, batch_size
    rows = len(keras.tree.flatten(validation_data)[0])
    size = min(batch_size, rows - rows % replicas)
    if size == 0:
        raise ValueError(
            f"The validation has {rows} rows, fewer than the {replicas} replicas that share each "
            "batch: raise the setting validation_... of [training], pass more data, or train on "
            "fewer devices."
        )
    prepare = with_unit_weights if mirrored else own_rows

    def part(start: int) -> Any:
        rows = slice(start, start + size)
        return prepare(keras.tree.map_structure(lambda array: array[rows], validation_data))

    parts = [part(start) for start in range(0, rows - rows % size, size)]
    shared = keras.tree.map_structure(lambda *arrays: np.concatenate(arrays), *parts)
    if mirrored and len(validation_data) == 3:
        loss.reduction = "sum"
    return Prepared(batches, prepare), shared, len(keras.tree.flatten(parts[0])[0])


def own_rows(batch: Any) -> Any:
    """Return the rows of a batch of NumPy arrays that this process of several delivers (JAX)."""
    import jax

    process, processes = jax.process_index(), jax.process_count()
    return keras.tree.map_structure(lambda array: np.split(array, processes)[process], batch)


def check_same_epoch(finished_epochs: int) -> None:
    """Raise ValueError unless the processes of several hosts go on at the same epoch.

    **Args**
        finished_epochs: What the backup of this process has seen.
    """
    distribution = keras.distribution.distribution()
    if distribution is None or distribution.num_processes == 1:
        return
    from jax.experimental import multihost_utils

    epochs = multihost_utils.process_allgather(np.array(finished_epochs)).tolist()
    if len(set(epochs)) > 1:
        raise ValueError(
            "The processes must go on at the same epoch, and a kill came between their backups: "
            f"copy the output of process {epochs.index(min(epochs))} over that of the others. "
            f"Received: {epochs} finished epochs"
        )


class Prepared(keras.utils.PyDataset):
    """A walk over batches, each of which passes through a function.

    **Args**
        batches: The walk.
        prepare: The function.
    """

    def __init__(self, batches: Batches, prepare: Callable[[Any], Any]):
        super().__init__()
        self.batches = batches
        self.prepare = prepare

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        """Return the prepared batch of this index."""
        return self.prepare(self.batches[index])


def with_unit_weights(batch: Any) -> Any:
    """Return a batch, a tuple as `fit` takes, whose weights have a sum of one.

    The sum of weighted losses then is the mean over the whole batch, also if replicas add up parts
    of it. Each replica of a `MirroredStrategy` would take a weighted mean of its own otherwise.

    **Example**

    >>> with_unit_weights((None, None, np.array([[1, 0], [1, 2]])))[2].tolist()
    [[0.25, 0.0], [0.25, 0.5]]
    """
    if len(batch) < 3:
        return batch
    x, y, weights = batch
    return x, y, (weights / (weights.sum() or 1)).astype("float32")


def adamw(*arguments: Any, global_clipnorm: float, **options: Any) -> keras.optimizers.Optimizer:
    """Return AdamW, which clips the gradient of the whole batch.

    **Args**
        *arguments: Of `keras.optimizers.AdamW`.
        global_clipnorm: The norm that gradients are clipped to.
        **options: Of `keras.optimizers.AdamW`.
    """
    if keras.config.backend() != "tensorflow":
        return keras.optimizers.AdamW(*arguments, global_clipnorm=global_clipnorm, **options)
    # What each replica clips is the mean over replicas of what they add up to.
    clipnorm = global_clipnorm / _mirrored_replicas()
    return TensorFlowAdamW(*arguments, global_clipnorm=clipnorm, **options)


class TensorFlowAdamW(keras.optimizers.AdamW):
    """AdamW that clips by the norm of the gradient, which Keras does not always on TensorFlow.

    Keras takes the norm of the rows that an embedding was read at, and not of their sums, and in a
    `MirroredStrategy` that of each replica's own gradient before it adds them up.
    """

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Update variables by the gradients of this replica."""
        import tensorflow as tf

        grads = [tf.convert_to_tensor(grad) for grad in grads]
        replica = tf.distribute.get_replica_context()
        if replica is not None and replica.num_replicas_in_sync > 1:
            grads = replica.all_reduce("MEAN", grads)
        super().apply(grads, trainable_variables)


def gather(trainer: keras.Model) -> None:
    """Go on with one device after the training, if each has a copy of the whole model.

    What is predicted, saved and generated then is what one device would. Weights that are divided
    ("model:k") stay where they are: one device may be too small for them.

    **Args**
        trainer: The model that was trained.
    """
    if _mirrored_replicas() > 1:
        import tensorflow as tf

        tf.distribute.experimental_set_strategy(None)
        # A Keras model keeps the strategy that it was made in, and each replica would predict a
        # whole batch there, so another model predicts.
        alone = keras.Model(trainer.inputs, trainer.outputs)
        alone.make_predict_function()
        trainer.predict_function = alone.predict_function
    elif isinstance(keras.distribution.distribution(), keras.distribution.DataParallel):
        keras.distribution.set_distribution(None)
        for variable in trainer.variables:
            # Keras has no public way to let go of a layout.
            variable._layout = None
            variable.assign(np.asarray(variable.value))
