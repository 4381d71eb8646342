import functools
import io
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from marks import slow_on_jax
from recipes import CONFIGS, TINY, flags
from rich.console import Console
from tolerances import assert_close, assert_gradients_close, to_numpy

from keras_performer.feature_maps import FavorPlus
from keras_performer.layers import PerformerAttention
from keras_performer.models import (
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
)
from keras_performer.ops import favor_attention, sharded_favor_attention
from training import loop, residue_labels
from training.data.batches import Batches
from training.distribution import distribute
from training.sections import ModelConfig, TrainingConfig

BACKEND = keras.config.backend()
ROOT = Path(__file__).resolve().parent.parent
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="keras.distribution works on JAX")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="MirroredStrategy of TensorFlow")

TRAINING = {
    "steps": 4,
    "steps_per_epoch": 2,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "beta_2": 0.98,
    "weight_decay": 0.01,
    "clip_norm": 0.05,  # below the norms that come, above those of an eighth of them
    "precision": "float32",
    "redraw_features_every": 2,
}
SHAPE = ModelConfig(
    num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=24, num_features=8, dropout=0.0
)


LOSS = keras.losses.SparseCategoricalCrossentropy(
    from_logits=True, reduction="mean_with_sample_weight"
)


# What child processes do: their devices are chosen before anything is computed.


def start_child(call, devices=8, **variables):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_distribution as t; t.make_devices(); t.{call}"],
        cwd=ROOT,
        env={
            **os.environ,
            "KERAS_BACKEND": BACKEND,
            "NUM_DEVICES": str(devices),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen=false {flags}",
            **variables,
        },
        stdout=subprocess.PIPE,
        text=True,
    )


def result_of(child):
    """What the child printed last, as JSON."""
    output, _ = child.communicate(timeout=600)
    assert child.returncode == 0, output
    return json.loads(output.splitlines()[-1])


def make_devices():
    if BACKEND == "tensorflow":
        import tensorflow as tf

        cpu = tf.config.list_physical_devices("CPU")[0]
        devices = [tf.config.LogicalDeviceConfiguration()] * int(os.environ["NUM_DEVICES"])
        tf.config.set_logical_device_configuration(cpu, devices)


def train(output):
    """Train a small labeller whose rows have weights of unlike sums."""
    keras.utils.set_random_seed(3)
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(13, 8, name="token_embedding")(tokens)
    x = x + PerformerAttention(2, 4, num_features=8, seed=0, name="block")(x, x)
    trainer = keras.Model(tokens, keras.layers.Dense(5)(x))

    rng = np.random.default_rng(0)
    x = rng.integers(1, 13, (80, 7)).astype("int32")
    y = x % 5
    weights = (rng.random(y.shape) > np.arange(80)[:, None] / 90).astype("float32")
    training = TrainingConfig(**TRAINING)
    batches = Batches(
        np.ones(64),
        lambda i, _: (x[:64][i], y[:64][i], weights[:64][i]),
        training.batch_size,
        training.steps_per_epoch,
        seed=0,
    )
    record = loop.fit(
        trainer,
        batches,
        (x[64:], y[64:], weights[64:]),
        training,
        loss=LOSS,
        weighted_metrics=[],
        seed=0,
        output=output,
        console=Console(file=io.StringIO()),
    )
    return trainer, record, x[:3]


def copies_of(variable):
    """The values of a variable on each device."""
    if BACKEND == "jax":
        return [np.asarray(shard.data) for shard in variable.value.addressable_shards]
    return [copy.numpy() for copy in variable.value.values]


def train_on_devices(choice, output):
    seen = {}
    gather = loop.gather

    def look_and_gather(trainer):
        attention = trainer.get_layer("block")
        copies = copies_of(attention.feature_map.projection)
        query = next(w for w in attention.weights if w.path.endswith("query/kernel"))
        seen["num_copies"] = len(copies)
        seen["equal_copies"] = bool(all((copy == copies[0]).all() for copy in copies))
        seen["query_shard"] = copies_of(query)[0].shape
        gather(trainer)

    loop.gather = look_and_gather
    distribute(choice, TrainingConfig(**TRAINING), SHAPE)
    trainer, record, x = train(Path(output))
    result = {
        "history": record["history"],
        "weights": [to_numpy(w).tolist() for w in trainer.weights],
        "prediction": trainer.predict_on_batch(x).tolist(),
    }
    print(json.dumps({**seen, **result}))


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize(
    "choice, devices",
    [
        # TensorFlow traces a model once for each replica, and virtual CPUs wait for each other.
        pytest.param("data", 2, marks=on_tensorflow),
        pytest.param("data", 8, marks=[on_tensorflow, pytest.mark.slow]),
        pytest.param("data", 8, marks=on_jax),
        pytest.param("model:2", 8, marks=[on_jax, pytest.mark.slow]),
    ],
)
def test_a_run_on_several_devices_is_the_run_on_one(choice, devices, tmp_path):
    child = start_child(f"train_on_devices({choice!r}, {str(tmp_path)!r})", devices)
    (tmp_path / "one").mkdir()
    trainer, record, x = train(tmp_path / "one")
    result = result_of(child)
    for row, alone in zip(result["history"], record["history"], strict=True):
        for name in ("loss", "val_loss"):
            assert row[name] == pytest.approx(alone[name], rel=1e-5), name
    assert record["history"][1]["val_loss"] < record["history"][0]["val_loss"]
    for weight, values in zip(trainer.weights, result["weights"], strict=True):
        np.testing.assert_allclose(values, to_numpy(weight), rtol=0, atol=1e-5, err_msg=weight.path)
    assert_close(np.array(result["prediction"], "float32"), trainer.predict_on_batch(x), "layer")
    # The last draw of the features is that of the run on one device, and on every device.
    assert not np.allclose(
        to_numpy(trainer.get_layer("block").feature_map.projection), first_draw()
    )
    assert result["num_copies"] == devices and result["equal_copies"]
    assert result["query_shard"] == [8, 1 if choice == "model:2" else 2, 4]


def first_draw():
    feature_map = FavorPlus(8, seed=0)
    feature_map.build((None, 4))
    return to_numpy(feature_map.projection)


# Whole recipes.

CHAINS = {
    **TINY,
    "data.text_field": "sequence",
    "data.label_field": "labels",
    "data.sequence_length": 32,
    "data.length_multiple": 0,
    "data.bucket_batches": 1,
    "model.exact_window": 4,
    "training.steps": 6,
    "training.steps_per_epoch": 3,
    "training.warmup_steps": 1,
    "training.clip_norm": 0.05,
    "training.patience": 5,
    "training.precision": "float32",
    "training.accumulate": 1,
    "training.redraw_features_every": 2,
    "training.validation_windows": 16,
}


def chain_arguments(file, output, *more):
    config = CONFIGS / "secondary_structure.toml"
    return [f"--config={config}", f"--file={file}", f"--output={output}", *flags(CHAINS), *more]


def write_chains(path):
    rng = np.random.default_rng(0)
    states = str.maketrans("ACDEF", "HEGC-")
    sequences = ["".join(rng.choice(list("ACDEF"), rng.integers(5, 40))) for _ in range(200)]
    rows = [{"sequence": text, "labels": text.translate(states)} for text in sequences]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run_recipe(arguments, kill=False):
    get = Batches.__getitem__

    def get_or_end(self, index):
        if kill and (self.epoch, index) == (1, 1):
            os._exit(9)
        return get(self, index)

    Batches.__getitem__ = get_or_end
    print(json.dumps(residue_labels.main(arguments)))


def assert_same_run(metrics, alone):
    rows, expected = (result["training"]["history"] for result in (metrics, alone))
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "val_loss"):
            assert row[name] == pytest.approx(other[name], rel=1e-5), name
    for name in ("cross_entropy", "q3"):
        assert metrics["test"]["model"][name] == pytest.approx(
            alone["test"]["model"][name], rel=1e-5
        )
    assert metrics["reload_max_abs_difference"] <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice, devices",
    [
        pytest.param("data", 2, marks=on_tensorflow),
        pytest.param("data", 8, marks=on_jax),
        pytest.param("model:2", 8, marks=on_jax),
    ],
)
def test_a_recipe_that_is_killed_goes_on(choice, devices, tmp_path):
    file, output = write_chains(tmp_path / "chains.jsonl"), tmp_path / "several"
    arguments = chain_arguments(file, output, f"--distribution={choice}")
    killed = start_child(f"run_recipe({arguments!r}, kill=True)", devices)
    alone = residue_labels.main(chain_arguments(file, tmp_path / "one"))
    killed.communicate(timeout=600)
    assert killed.returncode == 9 and (output / "backup").is_dir()
    assert_same_run(result_of(start_child(f"run_recipe({arguments!r})", devices)), alone)
    assert (output / "preset" / "config.json").is_file() and not (output / "backup").exists()


@pytest.mark.slow
@on_jax
def test_processes_of_several_hosts_do_the_run_of_one(tmp_path):
    file, output = write_chains(tmp_path / "chains.jsonl"), tmp_path / "several"
    arguments = chain_arguments(file, output, "--distribution=data")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    children = [
        start_child(
            f"run_recipe({arguments!r})",
            devices=2,
            KERAS_DISTRIBUTION_JOB_ADDRESSES=address,
            KERAS_DISTRIBUTION_NUM_PROCESSES="2",
            KERAS_DISTRIBUTION_PROCESS_ID=str(process),
        )
        for process in range(2)
    ]
    alone = residue_labels.main(chain_arguments(file, tmp_path / "one"))
    for child in children:
        assert_same_run(result_of(child), alone)
    for folder in (output, output / "process_1"):
        assert (folder / "preset" / "config.json").is_file() and not (folder / "backup").exists()


REFUSED = {
    "torch": [("data", [], "because Keras trains on one device on PyTorch: pass --backend jax")],
    "tensorflow": [
        ("model:2", [], "needs JAX, because TensorFlow copies the whole model"),
        ("data", ["training.precision=mixed_float16"], "precision=mixed_bfloat16"),
        ("data", ["training.accumulate=3"], r"Received: training\.accumulate=3"),
        ("data", ["training.batch_size=12"], "is 12, which 8 replicas cannot share equally"),
    ],
    "jax": [
        ("data", ["training.batch_size=12"], "is 12, which 8 replicas cannot share equally"),
        ("model:2", ["training.batch_size=6"], "is 6, which 4 replicas cannot share equally"),
        ("model:3", [], "needs a multiple of 3 devices, and there are 8"),
        ("model:4", [], r"among 4 devices, and 'model\.num_heads' is 2, no multiple"),
    ],
}[BACKEND]


@pytest.mark.parametrize(
    "choice, changes, message",
    [
        *REFUSED,
        ("rows", [], r"must be data, or model:K.*Received: rows"),
        ("model:1", [], r"K of at least 2.*Received: model:1"),
    ],
)
def test_what_cannot_be_distributed_is_refused_before_data_are_read(
    choice, changes, message, monkeypatch, tmp_path
):
    if BACKEND == "jax":
        monkeypatch.setattr(keras.distribution, "list_devices", lambda: ["cpu:0"] * 8)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [None] * 8)
    more = [f"--distribution={choice}", *(f"--set={change}" for change in changes)]
    with pytest.raises(SystemExit, match=message) as error:
        residue_labels.main(chain_arguments("no_such_file.jsonl", tmp_path, *more))
    assert re.match("error: [^\n]*$", str(error.value))


# A sequence spread over devices.


def attention_and_gradients(attend, causal):
    """A function of query, key and value (JAX): the output, and the gradients of a weighted sum."""
    import jax

    _, _, _, mask, cotangent = long_inputs()
    built = feature_map()

    def weighted_sum(query, key, value):
        output = attend(query, key, value, built, causal=causal, key_mask=mask)
        return (output * cotangent).sum(), output

    return jax.jit(jax.value_and_grad(weighted_sum, argnums=(0, 1, 2), has_aux=True))


def feature_map():
    built = FavorPlus(16, seed=1)
    built.build((None, 5))
    return built


def long_inputs():
    """37 tokens for each of eight devices; the second holds nothing but padding in one row."""
    rng = np.random.default_rng(0)
    length = 8 * 37
    query, key, value, cotangent = (
        rng.normal(size=(2, length, *heads)).astype("float32")
        for heads in ((4, 5), (2, 5), (2, 3), (4, 3))
    )
    key[:, :40] *= 6  # so that the scales of the devices differ
    mask = rng.random((2, length)) > 0.3
    mask[0, :80] = False
    return query, key, value, mask, cotangent


def attend_over_shards(causal):
    import jax

    mesh = jax.sharding.Mesh(jax.devices(), ("sequence",))
    attend = functools.partial(sharded_favor_attention, mesh=mesh, sequence_axis="sequence")
    call = attention_and_gradients(attend, causal)
    inputs = long_inputs()[:3]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "sequence"))
    compiled = call.lower(*(jax.device_put(x, sharding) for x in inputs)).compile()
    (_, output), gradients = compiled(*(jax.device_put(x, sharding) for x in inputs))
    exchanged = re.findall(
        r"= (\S+|\(.*?\)) (all-reduce|collective-permute|all-gather|all-to-all|reduce-scatter)",
        compiled.as_text(),
    )
    result = {
        "output": np.asarray(output).tolist(),
        "gradients": [np.asarray(gradient).tolist() for gradient in gradients],
        "devices": len(output.sharding.device_set),
        "shard": output.addressable_shards[0].data.shape,
        "exchanged": [shape for shapes, _ in exchanged for shape in re.findall(r"\[.*?\]", shapes)],
    }
    print(json.dumps(result))


@on_jax
@pytest.mark.parametrize("causal", [*slow_on_jax(False), True])
def test_devices_along_a_sequence_exchange_its_state_only(causal):
    child = start_child(f"attend_over_shards({causal})")
    call = attention_and_gradients(favor_attention, causal)
    (_, output), gradients = call(*long_inputs()[:3])
    result = result_of(child)
    assert_close(np.array(result["output"], "float32"), output, "layer")
    received = [np.array(gradient, "float32") for gradient in result["gradients"]]
    assert_gradients_close(received, list(gradients))
    assert result["devices"] == 8 and result["shard"] == [2, 37, 4, 3]
    # Batch, key heads, features and value size; and the scalar sum of this test.
    sizes = {"[2,2,16,3]", "[2,2,16]", "[]"}
    assert "[2,2,16,3]" in result["exchanged"] and set(result["exchanged"]) <= sizes


def test_a_sequence_that_cannot_be_spread_is_refused():
    x = np.ones((1, 7, 2, 5), "float32")
    if BACKEND != "jax":
        with pytest.raises(NotImplementedError, match="needs the JAX backend"):
            sharded_favor_attention(x, x, x, feature_map(), mesh=None, sequence_axis="sequence")
        return
    import jax

    mesh = jax.sharding.AbstractMesh((2,), ("sequence",))
    with pytest.raises(ValueError, match=r"multiple of the 2 devices.*query\.shape=\(1, 7, 2, 5\)"):
        sharded_favor_attention(x, x, x, feature_map(), mesh=mesh, sequence_axis="sequence")
    with pytest.raises(ValueError, match="must name axes of the mesh"):
        sharded_favor_attention(x, x, x, feature_map(), mesh=mesh, sequence_axis="length")


# Other machines.


def masked_lm():
    encoder = PerformerEncoderBackbone(
        **SHAPE.arguments(), vocabulary_size=13, seed=1, dtype="mixed_bfloat16"
    )
    model = PerformerMaskedLM(encoder)
    tokens, places = np.ones((4, 24), "int32"), np.ones((4, 3), "int32")
    x = {"token_ids": tokens, "padding_mask": tokens, "mask_positions": places}
    return keras.Model(model.input, model.output), (x, places, places.astype("float32"))


def causal_lm_step():
    arguments = {**SHAPE.arguments(), "exact_window": 4, "dropout": 0.1}
    decoder = PerformerDecoderBackbone(**arguments, vocabulary_size=13, seed=1)
    packed = decoder.packed()
    logits = decoder.token_embedding(packed.output, reverse=True)
    tokens = np.ones((4, 24), "int32")
    x = {name: tokens for name in (tensor.name for tensor in packed.inputs)}
    return keras.Model(packed.input, logits), (x, tokens, tokens.astype("float32"))


@on_jax
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
@pytest.mark.parametrize("make", [masked_lm, causal_lm_step])
def test_a_training_step_is_lowered_for_other_machines(make, platform):
    import jax

    trainer, batch = make()
    trainer.compile(keras.optimizers.AdamW(1e-3, global_clipnorm=1.0), loss=LOSS)
    trainer.optimizer.build(trainer.trainable_variables)
    state = [
        [variable.value for variable in variables]
        for variables in (
            trainer.trainable_variables,
            trainer.non_trainable_variables,
            trainer.optimizer.variables,
            trainer.metrics_variables,
        )
    ]
    exported = jax.export.export(jax.jit(trainer.train_step), platforms=[platform])(state, batch)
    assert exported.platforms == (platform,)
    module = exported.mlir_module()
    assert module.count("dot_general") > 20 and ("bf16" in module) == (make is masked_lm)
    # Nothing is left to a library of this machine, nor to one of the other.
    assert not re.findall(r"custom_call @\w+", module)
