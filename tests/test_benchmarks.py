import pytest

pytest.importorskip("rich")

from training.benchmarks import generation


def test_the_state_of_the_performer_has_one_size_and_that_of_softmax_grows():
    results = generation.main(
        ["--positions", "30", "120", "--steps", "2", "--hidden-dim", "64", "--num-layers", "1"]
    )
    assert results["performer"]["ratios"][1] == 1
    assert results["softmax"]["ratios"][1] > 3
    assert all(part[n]["seconds"] > 0 for part in results.values() for n in (30, 120))
