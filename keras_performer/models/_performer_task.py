"""What the tasks share: encoder or decoder bodies, and data that keras-hub does not take."""

import functools
import inspect
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import keras
import numpy as np

_Class = TypeVar("_Class", bound=type)


def take_loaders(cls: _Class) -> _Class:
    """Let `fit`, `evaluate` and `predict` of a keras-hub task take raw samples as Keras takes data.

    keras-hub makes one array of all strings, as wide as the longest, does not shuffle it, drops a
    `sample_weight` without labels, and takes no `keras.utils.PyDataset`, PyTorch `DataLoader` or
    rows of labels that differ in length. Here strings are shuffled for each epoch unless
    `shuffle=False`, and they and loaders of known length are preprocessed batch by batch. `tf.data`
    and grain are left to keras-hub. Not a base class: Keras refuses two paths to one base in
    functional models.

    **Args**
        cls: A class of tasks.

    **Returns** `cls`.
    """
    fit, evaluate, predict = cls.fit, cls.evaluate, cls.predict

    @functools.wraps(fit)
    def fit_samples(
        self: Any,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        validation_data: Any = None,
        validation_split: float | None = None,
        **kwargs: Any,
    ) -> Any:
        if _is_raw(self, validation_data) and not isinstance(validation_data, tuple):
            validation_data = (validation_data,)
        takes_validation = (
            validation_data is None
            or isinstance(validation_data, tuple)
            or _is_loader(validation_data)
            or is_tf_dataset(validation_data)
        )
        if _is_raw(self, x) and takes_validation:
            if validation_split and validation_data is None:
                (x, y, sample_weight), validation_data = _split(
                    (x, y, sample_weight), validation_split
                )
            kwargs.setdefault("validation_batch_size", batch_size)
            x = _Rows(self, x, y, sample_weight, batch_size, kwargs.pop("shuffle", True))
            y = sample_weight = batch_size = validation_split = None
            kwargs["shuffle"] = False
        source = _prepared(self, x)
        if source is None:
            if _is_loader(validation_data):
                raise ValueError(
                    "`validation_data` can be a PyDataset or a DataLoader only if `x` is one too, "
                    f"or strings. Received: x of type {type(x).__name__}, validation_data of type "
                    f"{type(validation_data).__name__}"
                )
            _refuse_weights_alone(self, x, y, sample_weight)
            columns = validation_data if isinstance(validation_data, tuple) else ()
            if len(columns) == 3 and columns[1] is None and columns[2] is not None:
                raise ValueError(  # keras-hub would drop them
                    "Weights of validation strings without labels go with `x` as strings or as a "
                    f"loader. Received: x of type {type(x).__name__}"
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
        validation = _prepared_validation(self, validation_data)
        return keras.Model.fit(self, source, validation_data=validation, **kwargs)

    @functools.wraps(evaluate)
    def evaluate_samples(
        self: Any,
        x: Any = None,
        y: Any = None,
        batch_size: int | None = None,
        sample_weight: Any = None,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("_use_cached_eval_dataset"):  # what `fit` evaluates is prepared
            return evaluate(self, x, y, batch_size, sample_weight, **kwargs)
        if _is_raw(self, x):
            x = _Rows(self, x, y, sample_weight, batch_size)
            y = sample_weight = batch_size = None
        source = _prepared(self, x)
        if source is None:
            _refuse_weights_alone(self, x, y, sample_weight)
            return evaluate(self, x, y, batch_size, sample_weight, **kwargs)
        _refuse(x, y=y, batch_size=batch_size, sample_weight=sample_weight)
        return keras.Model.evaluate(self, source, **kwargs)

    @functools.wraps(predict)
    def predict_samples(
        self: Any, x: Any = None, batch_size: int | None = None, **kwargs: Any
    ) -> Any:
        if _is_raw(self, x):
            x, batch_size = _Rows(self, x, None, None, batch_size), None
        source = _prepared(self, x)
        if source is None:
            return predict(self, x, batch_size, **kwargs)
        _refuse(x, batch_size=batch_size)
        return keras.Model.predict(self, source, **kwargs)

    cls.fit, cls.evaluate, cls.predict = fit_samples, evaluate_samples, predict_samples
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


def _is_loader(x: Any) -> bool:
    return isinstance(x, keras.utils.PyDataset) or any(
        base.__name__ == "DataLoader" and base.__module__.startswith("torch.utils.data")
        for base in type(x).__mro__
    )


def is_tf_dataset(x: Any) -> bool:
    """Whether x is of `tf.data`, told without an import of TensorFlow."""
    return hasattr(x, "element_spec")


def _refuse_weights_alone(task: Any, x: Any, y: Any, sample_weight: Any) -> None:
    """Raise ValueError for weights that keras-hub would drop."""
    if sample_weight is not None and y is None and task.preprocessor is not None:
        raise ValueError(
            "Weights of strings without labels go with strings in a list or an array, or in a "
            f"loader. Received: x of type {type(x).__name__}"
        )


def _prepared(task: Any, x: Any) -> keras.utils.PyDataset | None:
    if isinstance(x, keras.utils.PyDataset):
        return _PreparedDataset(x, task)
    return _PreparedLoader(x, task) if _is_loader(x) else None


def _prepared_validation(task: Any, data: Any) -> Any:
    loader = _prepared(task, data)
    if loader is not None or data is None:
        return loader
    return data.map(task.preprocess_samples) if is_tf_dataset(data) else _prepare(data, task)


def _is_raw(task: Any, x: Any) -> bool:
    """Whether there are strings in lists or arrays, and a preprocessor to read them."""
    return task.preprocessor is not None and _has_strings(x)


def _has_strings(x: Any) -> bool:
    if isinstance(x, dict):
        return any(map(_has_strings, x.values()))
    if isinstance(x, tuple):
        return any(map(_has_strings, x))
    if isinstance(x, np.ndarray):
        x = x.tolist() if x.dtype.kind in "USO" else ()
    return isinstance(x, list) and any(isinstance(item, str | bytes) for item in x)


def _leaves(x: Any) -> list[Any]:
    if isinstance(x, dict):
        return [leaf for column in x.values() for leaf in _leaves(column)]
    if isinstance(x, tuple):
        return [leaf for column in x for leaf in _leaves(column)]
    return [] if x is None else [x]


def _take(x: Any, indices: Any) -> Any:
    """Some rows of lists and arrays, or of what a dict or a tuple holds."""
    if isinstance(x, dict):
        return {name: _take(column, indices) for name, column in x.items()}
    if isinstance(x, tuple):
        return tuple(_take(column, indices) for column in x)
    if x is None or isinstance(x, np.ndarray):
        return x if x is None else x[indices]
    return [x[i] for i in indices]


def _num_rows(columns: Any) -> int:
    lengths = {len(leaf) for leaf in _leaves(columns)}
    if len(lengths) != 1:
        raise ValueError(
            "Samples, labels and weights must be as many, in whatever columns they are. Received: "
            f"columns of {sorted(lengths)} rows"
        )
    return lengths.pop()


def _split(columns: Any, share: float) -> tuple[Any, Any]:
    """The first rows, and the last of this share, which Keras validates with."""
    columns = tuple(_array(column) for column in columns)
    count = _num_rows(columns)
    first = math.floor(count * (1 - share))
    if not 0 < first < count:
        raise ValueError(
            "`validation_split` must leave rows to train on and to validate with. Received: "
            f"validation_split={share} of {count} rows"
        )
    return _take(columns, np.arange(first)), _take(columns, np.arange(first, count))


class _Rows(keras.utils.PyDataset):
    """Batches of samples, labels and weights, in a new order for each epoch or in their own."""

    def __init__(
        self,
        task: Any,
        x: Any,
        y: Any,
        sample_weight: Any,
        batch_size: int | None,
        shuffle: bool = False,
    ):
        super().__init__()
        _check_labels(task, y)  # before a step, and not in the batch that has the wrong one
        self._columns = (_strings(x), _array(y), _array(sample_weight))
        self._order = np.arange(_num_rows(self._columns))
        self._batch_size = batch_size or 32
        self._shuffle = shuffle
        self.on_epoch_begin()

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._batch_size)

    def __getitem__(self, index: int) -> Any:
        start = index * self._batch_size
        return _take(self._columns, self._order[start : start + self._batch_size])

    def on_epoch_begin(self) -> None:
        if self._shuffle:
            self._order = np.random.permutation(self._order)


class _PreparedDataset(keras.utils.PyDataset):
    """A `PyDataset` whose batches are preprocessed."""

    def __init__(self, dataset: keras.utils.PyDataset, task: Any):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=dataset.use_multiprocessing,
            max_queue_size=dataset.max_queue_size,
        )
        self._dataset = dataset
        self._task = task

    @property
    def num_batches(self) -> int | None:
        return self._dataset.num_batches

    def __len__(self) -> int:
        return len(self._dataset)  # pyright: ignore[reportArgumentType]

    def __getitem__(self, index: int) -> Any:
        return _prepare(self._dataset[index], self._task)

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()


class _PreparedLoader(keras.utils.PyDataset):
    """The preprocessed batches of an iterable of known length, to be read in order."""

    def __init__(self, loader: Any, task: Any):
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
        self._task = task
        self._batches: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return len(self._loader)

    def __getitem__(self, index: int) -> Any:
        if index == 0:
            self._batches = iter(self._loader)
        return _prepare(next(self._batches), self._task)


def _refuse(x: Any, **arguments: Any) -> None:
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise ValueError(
            f"A {type(x).__name__} holds the labels, the weights and the batches: leave out the "
            f"other arguments. Received: {', '.join(given)}"
        )


def _prepare(batch: Any, task: Any) -> tuple[Any, ...]:
    # PyTorch collates samples into a list.
    batch = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    if all(isinstance(item, str | bytes) for item in batch):
        batch = (list(batch),)
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    _check_labels(task, y)
    prepared = task.preprocess_samples(
        _strings(x), y=_array(y), sample_weight=_array(sample_weight)
    )
    return _as_arrays(prepared)


def _check_labels(task: Any, y: Any) -> None:
    """Raise ValueError for labels of classes that there are not: JAX makes some loss of them."""
    loss, num_classes = getattr(task, "loss", None), getattr(task, "num_classes", None)
    if isinstance(loss, str):
        loss = keras.losses.get(loss)
    by_class = loss is keras.losses.sparse_categorical_crossentropy
    by_class = by_class or isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
    if num_classes is None or not by_class or y is None or not len(y):
        return
    y = _array(y)
    one_array = isinstance(y, np.ndarray) and y.dtype != object
    labels = np.ravel(y) if one_array else np.concatenate([np.ravel(row) for row in y])
    # What a token classifier's preprocessor leaves out, and the loss.
    for holder, name in ((task.preprocessor, "ignored_label"), (loss, "ignore_class")):
        labels = labels[labels != getattr(holder, name, None)]
    wrong = labels
    if labels.dtype.kind in "biuf":
        wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.size:
        raise ValueError(
            f"Labels must be numbers of classes, from 0 to {num_classes - 1}. Received: a label "
            f"of {wrong[0]!r}, num_classes={num_classes}"
        )


def _strings(x: Any) -> Any:
    """Lists of strings, in a tuple if there are several segments; arrays of anything else."""
    if isinstance(x, dict):
        return {name: _strings(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        # Something else among them is for the tokenizer to refuse.
        if any(isinstance(item, str | bytes) for item in x):
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


def check_parts(task: str, backbone: Any, preprocessor: Any, *allowed: type) -> None:
    """Raise for parts that do not go together.

    TypeError unless `backbone` is of one of the `allowed` classes, ValueError if the tokenizer of
    the preprocessor has more tokens than the backbone: an index that is out of an embedding is an
    error on some backends, and NaN on JAX.
    """
    if not isinstance(backbone, allowed):
        raise TypeError(
            f"{task} needs a {' or a '.join(cls.__name__ for cls in allowed)}. Received: "
            f"backbone of type {type(backbone).__name__}"
        )
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is None:
        return
    try:
        count = tokenizer.vocabulary_size()
    except ValueError:  # from a file that keras-hub reads after this
        return
    if count > backbone.vocabulary_size:
        raise ValueError(
            f"{task} needs a backbone with a place for each token of its tokenizer: make it with "
            f"vocabulary_size=tokenizer.vocabulary_size(). Received: a {type(tokenizer).__name__} "
            f"of {count} tokens, a backbone with vocabulary_size={backbone.vocabulary_size}"
        )


def token_loss() -> keras.losses.Loss:
    """Cross-entropy from logits, the mean over the tokens that count.

    Keras's default divides by all of them, so it falls with the number of padded places.
    """
    return keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, reduction="mean_with_sample_weight"
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
