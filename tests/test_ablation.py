"""The comparison of small encoders keeps its figures, and knows what they are of."""

import json
from types import SimpleNamespace

import keras
import pytest
from recipes import CONFIGS

from zoo.build import ablation


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The overrides of the runs that are made, a short and a long one for each variant."""
    runs = []

    def run(overrides, backend, console):
        runs.append(list(overrides))
        row = {"training_seconds": 10.0, "val_loss": 1.5, "val_accuracy": 0.25}
        return SimpleNamespace(count_params=lambda: 1234), [row] * 2

    monkeypatch.setattr(ablation, "CONFIG", CONFIGS / "secondary_structure.toml")
    monkeypatch.setattr(ablation, "OUTPUT", tmp_path)
    monkeypatch.setattr(ablation, "VARIANTS", {"first": (), "second": ("seed=2",)})
    monkeypatch.setattr(ablation, "run", run)
    return runs


def test_a_variant_is_measured_again_only_if_its_settings_are_others(
    trained, tmp_path, monkeypatch, capsys
):
    def repeated(*argv):
        """Return the number of variants that a command trains."""
        trained.clear()
        ablation.main(argv)
        return len(trained) // 2

    assert repeated() == 2
    assert "seed=2" not in trained[1] and "seed=2" in trained[3]
    assert "| second | 1,234 | 360 | 0.3 | 1.500 | 25.0 |" in capsys.readouterr().out
    assert repeated("--backend", keras.config.backend()) == 0
    assert repeated("--minutes", "2") == 2
    assert repeated("--minutes", "2") == 0

    for name, overrides in (("second", ("seed=3",)), ("renamed", ("seed=3",))):
        monkeypatch.setattr(ablation, "VARIANTS", {"first": (), name: overrides})
        assert repeated("--minutes", "2") == 1
        assert f"| {name} |" in capsys.readouterr().out

    # Figures of another backend, and of another config.
    for key, value in (("backend", "other"), ("config", {})):
        row = json.loads((tmp_path / "0.json").read_text(encoding="utf-8"))
        row["settings"][key] = value
        (tmp_path / "0.json").write_text(json.dumps(row), encoding="utf-8")
        assert repeated("--minutes", "2") == 1
