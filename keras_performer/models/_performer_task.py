"""What the tasks share: encoder or decoder bodies, and data that keras-hub does not take."""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import keras
import numpy as np

_Class = TypeVar("_Class", bound=type)


def take_loaders(cls: _Class) -> _Class:
    """Let `fit`, `evaluate` and `predict` of a keras-hub task take loaders of raw samples.

    keras-hub's take arrays, `tf.data` and grain. A `keras.utils.PyDataset` and a PyTorch
    `DataLoader` of known length are taken by `keras.Model`, but only with batches that are
    prepared: here they are preprocessed as they come. So are arrays with a `sample_weight` and no
    labels, which is what a language model is trained on, and whose weights Keras would drop without
    a word. Not a base class: Keras refuses two paths to one base in functional models.

    **Args**
        cls: A class of tasks.

    **Returns** `cls`.
    """
    fit, evaluate, predict = cls.fit, cls.evaluate, cls.predict

    @functools.wraps(fit)
    def fit_loaders(
        self: Any,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        validation_split: float | None = None,
        **kwargs: Any,
    ) -> Any:
        columns = validation_data if isinstance(validation_data, tuple) else ()
        if len(columns) == 3 and _has_weights_alone(self, *columns) and y is None:
            if _is_rows(x):
                if sample_weight is None:  # so that the way below is taken
                    sample_weight = np.ones(_num_rows(x), "float32")
            elif _prepared(self, x) is None:
                raise ValueError(
                    "Weights of validation strings without labels go with `x` as strings or as a "
                    "loader. Received: `validation_data=(strings, None, sample_weight)` and x of "
                    f"type {type(x).__name__}"
                )
        if _has_weights_alone(self, x, y, sample_weight):
            if validation_split:
                raise ValueError(
                    "Without labels, strings and their weights are not split: pass "
                    "`validation_data=(strings, None, sample_weight)`. Received: "
                    f"validation_split={validation_split}"
                )
            x, sample_weight, batch_size = _WeightedRows(x, sample_weight, batch_size), None, None
        source = _prepared(self, x)
        if source is None:
            if _prepared(self, validation_data) is not None:
                raise ValueError(
                    "`validation_data` can be a PyDataset or a DataLoader only if `x` is one too. "
                    f"Received: x of type {type(x).__name__}, validation_data of type "
                    f"{type(validation_data).__name__}"
                )
            return fit(
                self,
                x,
                y,
                batch_size,
                sample_weight,
                validation_data=validation_data,
                validation_split=validation_split,
                **kwargs,
            )
        _refuse(
            x,
            y=y,
            batch_size=batch_size,
            sample_weight=sample_weight,
            validation_split=validation_split,
        )
        if not isinstance(x, keras.utils.PyDataset):
            kwargs["shuffle"] = False  # the loader does
        validation = _prepared(self, validation_data)
        if validation is None and validation_data is not None:
            validation = _as_arrays(
                self.preprocess_samples(*keras.utils.unpack_x_y_sample_weight(validation_data))
            )
        return keras.Model.fit(self, source, validation_data=validation, **kwargs)

    @functools.wraps(evaluate)
    def evaluate_loaders(
        self: Any,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        if _has_weights_alone(self, x, y, sample_weight):
            x, sample_weight, batch_size = _WeightedRows(x, sample_weight, batch_size), None, None
        # What `fit` evaluates is prepared.
        source = None if kwargs.get("_use_cached_eval_dataset") else _prepared(self, x)
        if source is None:
            return evaluate(self, x, y, batch_size, sample_weight, **kwargs)
        _refuse(x, y=y, batch_size=batch_size, sample_weight=sample_weight)
        return keras.Model.evaluate(self, source, **kwargs)

    @functools.wraps(predict)
    def predict_loaders(
        self: Any, x: Any = None, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        source = _prepared(self, x)
        if source is None:
            return predict(self, x, batch_size, **kwargs)
        _refuse(x, batch_size=batch_size)
        return keras.Model.predict(self, source, **kwargs)

    cls.fit, cls.evaluate, cls.predict = fit_loaders, evaluate_loaders, predict_loaders
    return cls


def class_for(cls: type, backbone: Any) -> type:
    """The subclass of `cls` that is for the backbone's class, or `cls` itself.

    keras-hub finds the class that loads a preset by the class of the preset's backbone, so a task
    that takes several kinds needs a class for each.
    """
    if isinstance(backbone, cls.backbone_cls):
        return cls
    for subclass in cls.__subclasses__():
        if isinstance(backbone, subclass.backbone_cls):
            return subclass
    return cls


def rows(x: Any, start: int, stop: int) -> Any:
    """Some rows of strings, or of what a dict or a tuple holds."""
    if isinstance(x, dict):
        return {name: column[start:stop] for name, column in x.items()}
    if isinstance(x, tuple):
        return tuple(rows(segment, start, stop) for segment in x)
    return x[start:stop] if isinstance(x, list) else np.asarray(x)[start:stop].tolist()


def _prepared(task: Any, x: Any) -> keras.utils.PyDataset | None:
    if isinstance(x, keras.utils.PyDataset):
        return _PreparedDataset(x, task.preprocess_samples)
    if any(
        base.__name__ == "DataLoader" and base.__module__.startswith("torch.utils.data")
        for base in type(x).__mro__
    ):
        return _PreparedLoader(x, task.preprocess_samples)
    return None


def _is_rows(x: Any) -> bool:
    return isinstance(x, list | dict | np.ndarray)


def _has_weights_alone(task: Any, x: Any, y: Any, sample_weight: Any) -> bool:
    is_alone = y is None and sample_weight is not None
    return _is_rows(x) and is_alone and task.preprocessor is not None


def _num_rows(x: Any) -> int:
    lengths = {len(column) for column in (x.values() if isinstance(x, dict) else [x])}
    if len(lengths) != 1:
        raise ValueError(f"The columns of `x` must have one length. Received: {sorted(lengths)}")
    return lengths.pop()


class _WeightedRows(keras.utils.PyDataset):
    """Batches of an array, or of a dict of arrays, with a weight for each row and no labels."""

    def __init__(self, x: Any, sample_weight: Any, batch_size: int | None):
        super().__init__()
        self._x = x
        self._sample_weight = np.asarray(sample_weight)
        self._batch_size = batch_size or 32
        if self._sample_weight.shape != (_num_rows(x),):
            raise ValueError(
                "`sample_weight` must hold one weight for each row of `x`. Received: "
                f"sample_weight of shape {self._sample_weight.shape}, x with {_num_rows(x)} rows"
            )

    def __len__(self) -> int:
        return math.ceil(len(self._sample_weight) / self._batch_size)

    def __getitem__(self, index: int) -> Any:
        start, stop = index * self._batch_size, (index + 1) * self._batch_size
        return rows(self._x, start, stop), None, self._sample_weight[start:stop]


class _PreparedDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches are preprocessed."""

    def __init__(self, dataset: keras.utils.PyDataset, preprocess: Callable[..., Any]):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self._dataset = dataset
        self._preprocess = preprocess

    @property
    def num_batches(self) -> int | None:
        return self._dataset.num_batches

    def __len__(self) -> int:
        return len(self._dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Any:
        return _prepare(self._dataset[index], self._preprocess)

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()


class _PreparedLoader(keras.utils.PyDataset):
    """The preprocessed batches of an iterable of known length, to be read in order."""

    def __init__(self, loader: Any, preprocess: Callable[..., Any]):
        super().__init__()
        try:
            len(loader)
        except TypeError as error:
            raise ValueError(
                "A DataLoader needs a known number of batches: give its dataset a `__len__`. "
                f"Received: a {type(loader).__name__} of a dataset of type "
                f"{type(loader.dataset).__name__}"
            ) from error
        self._loader = loader
        self._preprocess = preprocess
        self._batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self._loader)

    def __getitem__(self, index: int) -> Any:
        if index == 0:
            self._batches = iter(self._loader)
        return _prepare(next(self._batches), self._preprocess)


def _refuse(x: Any, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"A {type(x).__name__} holds the labels, the weights and the batches: leave out the "
            f"other arguments. Received: {', '.join(given)}"
        )


def _prepare(batch: Any, preprocess: Callable[..., Any]) -> tuple[Any, ...]:
    # PyTorch collates samples into a list.
    batch = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    if all(isinstance(item, str | bytes) for item in batch):
        batch = (list(batch),)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    prepared = preprocess(_strings(x), y=_array(y), sample_weight=_array(sample_weight))
    return _as_arrays(prepared)


def _strings(x: Any) -> Any:
    """Lists of strings, in a tuple if there are several segments; arrays of anything else."""
    if isinstance(x, dict):
        return {name: _strings(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        if all(isinstance(item, str | bytes) for item in x):
            return list(x)
        return tuple(_strings(segment) for segment in x)
    x = np.asarray(x)
    return x.tolist() if x.dtype.kind in "USO" else x


def _array(y: Any) -> Any:
    # Not lists, which may be ragged.
    return np.asarray(y) if callable(getattr(y, "__array__", None)) else y


def _as_arrays(samples: Any) -> tuple[Any, ...]:
    samples = samples if isinstance(samples, tuple) else (samples,)
    return tuple(_as_array(item) for item in samples if item is not None)


def _as_array(x: Any) -> Any:
    if isinstance(x, dict):
        return {name: _as_array(value) for name, value in x.items()}
    if keras.ops.is_tensor(x):
        return keras.ops.convert_to_numpy(x)
    x = np.asarray(x)
    # Python's numbers have 64 bits in NumPy.
    return x.astype("float32") if x.dtype == "float64" else x


def weigh(preprocessor: Any, weights: Any, sample_weight: Any) -> Any:
    """Multiply the weights of labels (B, P) by one for each sequence (B,), if there are any.

    **Args**
        preprocessor: The keras-hub preprocessor that made the labels.
        weights: Numbers or booleans (B, P), or (P,) for one sequence.
        sample_weight: Numbers (B,), or one for one sequence; None leaves `weights` as they are.

    **Returns** The products, float32: in TensorFlow's graphs a tensor, else an array.

    **Raises** ValueError for weights of another rank.
    """
    if sample_weight is None:
        return weights
    if preprocessor._use_tf_workflow():
        import tensorflow as tf

        weights, sample_weight = (tf.cast(w, "float32") for w in (weights, sample_weight))
    else:
        weights, sample_weight = (
            np.asarray(keras.ops.convert_to_numpy(w), "float32") for w in (weights, sample_weight)
        )
    if len(sample_weight.shape) != len(weights.shape) - 1:
        raise ValueError(
            "`sample_weight` must hold one weight for each sequence. Received: sample_weight of "
            f"shape {tuple(sample_weight.shape)} for weights of labels of shape "
            f"{tuple(weights.shape)}"
        )
    return weights * sample_weight[..., None]


def refuse_labels(y: Any) -> None:
    """Raise ValueError if there are labels where the preprocessor makes them of the strings."""
    if y is not None:
        raise ValueError(
            "A language model's preprocessor makes the labels itself: pass the strings only, as "
            "`x`, and weights of sequences as `sample_weight`, in a loader "
            f"`(x, None, sample_weight)`. Received: y of type {type(y).__name__}"
        )


def check_backbone(task: str, backbone: Any, *allowed: type) -> None:
    """Raise TypeError unless `backbone` is of one of the `allowed` classes."""
    if not isinstance(backbone, allowed):
        raise TypeError(
            f"{task} needs a {' or a '.join(cls.__name__ for cls in allowed)}. Received: "
            f"backbone of type {type(backbone).__name__}"
        )


def compile_as_saved(self: Any, config: dict[str, Any]) -> None:
    """Compile as the saved model was, so that a `.keras` file resumes with its optimizer."""
    self.compile(**keras.saving.deserialize_keras_object(config))
    self.optimizer.build(self.trainable_variables)


def keep_quantized_head(cls: _Class) -> _Class:
    """Let a keras-hub task be loaded after its layers outside the backbone were quantized.

    The configs of keras-hub's backbones tell which of their layers are quantized, those of its
    tasks do not. int8 is what is tested.

    **Args**
        cls: A class of tasks.

    **Returns** `cls`, whose config then holds `quantized_head`: modes by the paths of layers.
    """
    # What a base class was given by this function is not wrapped again.
    get_config = inspect.unwrap(cls.get_config)
    from_config = inspect.unwrap(cls.from_config.__func__)

    @functools.wraps(get_config)
    def get_config_with_modes(self: Any) -> dict[str, Any]:
        modes = {
            layer.path: layer.quantization_mode
            for layer in _layers_of_head(self)
            if layer.quantization_mode is not None
        }
        return {**get_config(self), **({"quantized_head": modes} if modes else {})}

    @functools.wraps(from_config)
    def from_config_with_modes(cls: Any, config: dict[str, Any]) -> Any:
        config = dict(config)
        modes = config.pop("quantized_head", {})
        task = from_config(cls, config)
        for layer in _layers_of_head(task):
            if layer.path in modes:
                if isinstance(layer.dtype_policy, keras.dtype_policies.DTypePolicyMap):
                    # Of the backbone, whose policy keras-hub's heads share.
                    layer._dtype_policy = layer.dtype_policy.default_policy
                layer.quantize(modes[layer.path])
        return task

    cls.get_config = get_config_with_modes
    cls.from_config = classmethod(from_config_with_modes)
    return cls


def _layers_of_head(task: Any) -> list[Any]:
    """The layers of a task, at any depth, that are not of its backbone."""
    body = {id(layer) for layer in task.backbone._flatten_layers()}
    return [layer for layer in task._flatten_layers() if id(layer) not in body]
