import json
from pathlib import Path

import pytest
from test_memory import run_in_a_process

pytest.importorskip("rich")

pytest.importorskip("matplotlib")

from training.benchmarks import attention_speed, generation, model_speed


@pytest.mark.slow_on_jax
def test_the_state_of_the_performer_has_one_size_and_that_of_softmax_grows():
    results = generation.main(
        ["--positions", "30", "120", "--steps", "2", "--hidden-dim", "64", "--num-layers", "1"]
    )
    assert results["performer"]["ratios"][1] == 1
    assert results["softmax"]["ratios"][1] > 3
    assert all(part[n]["seconds"] > 0 for part in results.values() for n in (30, 120))


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize("bidirectional", [False, True])
def test_attention_is_timed_at_every_length_and_drawn(bidirectional, tmp_path):
    arguments = ["--lengths", "40", "70", "--rounds", "1", "--out", str(tmp_path)]
    results = attention_speed.main(arguments + ["--bidirectional"] * bidirectional)
    for part in results["seconds"].values():
        assert set(part) == {40, 70}
        for by_method in part.values():
            assert {"softmax", "64 features, window 64", "identity"} <= set(by_method)
            assert all(seconds > 0 for seconds in by_method.values())
    assert ("roofline" in results) != bidirectional
    assert json.loads((tmp_path / "metrics.json").read_text())["tokens"]["softmax"] > 0
    assert (tmp_path / "speed.png").stat().st_size > 1000


@pytest.mark.slow_on_jax
def test_the_speed_benchmark_refuses_to_time_what_is_wrong(monkeypatch):
    real = attention_speed.favor_attention

    def wrong(*arguments, **options):
        output = real(*arguments, **options)
        return output if options.get("implementation") == "reference" else 1.01 * output

    monkeypatch.setattr(attention_speed, "favor_attention", wrong)
    with pytest.raises(AssertionError):
        attention_speed.check(causal=True)


PEAKS = """
import keras
from training.benchmarks import attention_speed

def all_pairs(q, k, v):
    pairs = keras.ops.einsum("btnh,bsnh->btns", q, k)
    return keras.ops.einsum("btns,bsnh->btnh", pairs, v)

identity = attention_speed.methods(causal=True)["identity"]
peaks = [attention_speed.peak_memory(function, 2048) for function in (identity, all_pairs)]
print("PEAKS", *peaks)
"""


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone says its peak")
def test_peak_memory_is_that_of_the_pass():
    """The identity needs gradients only; a matrix of pairs needs 8 heads of 2,048 squared."""
    identity, all_pairs = map(int, run_in_a_process(PEAKS, word="PEAKS").split())
    assert identity < 4 * 8 * 2048**2 < all_pairs


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
def test_models_are_timed_against_one_without_attention():
    arguments = ["--length", "40", "--num-layers", "1", "--hidden-dim", "64", "--rounds", "1"]
    seconds = model_speed.main([*arguments, "--kinds", "64 features, window 64"])
    assert list(seconds) == ["no attention", "64 features, window 64"]
    assert all(value > 0 for value in seconds.values())
    model = model_speed.make_model("no attention", 1, 64)
    with_attention = model_speed.make_model("softmax", 1, 64)
    missing = 2 * (64 * 64 + 64) + 2 * 64  # query and key, and the scales of their norms
    assert with_attention.count_params() - model.count_params() == missing
