"""Peak memory of a causal training step, measured in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytest.importorskip("resource", reason="peak memory is read with a Unix call")

SCRIPT = r"""
import json, resource, sys
import numpy as np
import keras
from keras import ops
from keras_performer.layers import PerformerAttention

layer = PerformerAttention(num_heads=8, key_dim=64, num_features=256, seed=1)
layer.build((None, None, 512), (None, None, 512))

def loss(x):
    return ops.sum(ops.square(layer(x, x, use_causal_mask=True)))

def step(x):
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        @tf.function
        def run(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                value = loss(x)
            return tape.gradient(value, [x, *(v.value for v in layer.trainable_variables)])

        return run(tf.constant(x))
    if backend == "jax":
        import jax

        def run(weights, x):
            return ops.sum(ops.square(layer.stateless_call(
                weights, [v.value for v in layer.non_trainable_variables], x, x,
                use_causal_mask=True)[0]))

        weights = [v.value for v in layer.trainable_variables]
        return jax.block_until_ready(jax.jit(jax.grad(run, argnums=(0, 1)))(weights, x))
    import torch

    x = torch.tensor(x, requires_grad=True)
    loss(x).backward()
    return x.grad

peaks = []
for length in map(int, sys.argv[1:]):
    step(np.random.default_rng(0).standard_normal((1, length, 512)).astype("float32"))
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
print("PEAKS", json.dumps(peaks))
"""


def run_in_a_process(script, *arguments, word):
    """What the script prints after `word`, run by itself on this backend."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith(word))
    return line.removeprefix(word)


def peaks_in_gib(*lengths):
    return json.loads(run_in_a_process(SCRIPT, *lengths, word="PEAKS"))


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_a_causal_step_of_16384_tokens_adds_less_than_one_gib():
    start, long = peaks_in_gib(512, 16384)
    assert long - start < 1.0, f"{start:.2f} GiB at 512 tokens, {long:.2f} GiB at 16,384"


@pytest.mark.slow
def test_memory_grows_linearly_to_65536_tokens():
    start, quarter, full = peaks_in_gib(512, 16384, 65536)
    growth = (full - start) / (quarter - start)
    assert growth < 4.6, f"memory grows {growth:.2f} times from 16,384 to 65,536 tokens"


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux alone forgets a peak on demand"
)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("option", ["remat", "reversible"])
def test_a_model_step_of_32768_tokens_fits_in_8_gib(option):
    """The whole process: a decoder of bytes with 6 layers of width 512, its optimizer included."""
    pytest.importorskip("rich")
    from training.benchmarks.model_memory import measure

    peak = measure(option, 6, 512, 32768)["process_bytes"] / 2**30
    print(f"{keras.config.backend()}, {option}: {peak:.2f} GiB")
    assert peak < 8, f"{peak:.2f} GiB with {option}=True"


@linux
@pytest.mark.slow
def test_memory_of_a_reversible_step_does_not_grow_with_depth():
    """Above what is held between steps, which has the weights and the optimizer's state."""
    pytest.importorskip("rich")
    from training.benchmarks.model_memory import measure

    # A graph of TensorFlow holds some 2 MiB a block to run it, at any length.
    length = 131072 if keras.config.backend() == "tensorflow" else 16384
    peaks = [measure("reversible", n, 64, length)["step_bytes"] / 2**20 for n in (4, 24)]
    print(f"{peaks[0]:.0f} MiB with 4 blocks, {peaks[1]:.0f} MiB with 24")
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.slow_on_torch
@linux
@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_the_memory_benchmark_tells_each_step_and_its_growth(tmp_path):
    pytest.importorskip("rich")
    from training.benchmarks import model_memory

    arguments = "--kinds plain --depths 1 --length 3000 --long 0 --out"
    results = model_memory.main([*arguments.split(), str(tmp_path)])
    assert json.loads((tmp_path / "metrics.json").read_text()) == results
    (step,) = results["steps"]
    assert step["num_layers"] == 1 and results["growth"] == {"plain": 1}
    # A plain step keeps at least the logits and the feed-forward part's intermediate results.
    assert 4 * 3000 * (261 + 256) < step["step_bytes"] < step["process_bytes"]
