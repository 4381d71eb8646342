"""Runs of recipes that are killed in the middle of an epoch, and then repeated."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from training.data.batches import Batches

ROOT = Path(__file__).resolve().parent.parent
# Epoch and step. The first epoch is in the backup then, and two steps of the second are lost.
KILLED_AT = (1, 2)
needs_kill = pytest.mark.skipif(os.name != "posix", reason="there is no kill -9 here")


def killed_and_whole(recipe, options, folder):
    """Return the metrics of a run whose first process got kill -9, and of one that had one process.

    Both are done in this process, from where the killed one left off and from the start.
    """
    command = [sys.executable, __file__, recipe, *options, f"--output={folder / 'killed'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KERAS_BACKEND": keras.config.backend()}
    assert subprocess.run(command, env=environment).returncode == -9
    history = folder / "killed" / "history.jsonl"
    assert history.read_text(encoding="utf-8").count("\n") == KILLED_AT[0]
    main = importlib.import_module(f"training.{recipe}").main
    return [main([*options, f"--output={folder / name}"]) for name in ("killed", "whole")]


def assert_same_curves(killed, whole):
    rows, expected = (metrics["training"]["history"] for metrics in (killed, whole))
    assert len(rows) == len(expected) > KILLED_AT[0] + 1
    # Something was learned, so that a run from other weights or data would have another curve.
    assert abs(expected[0]["val_loss"] - expected[-1]["val_loss"]) > 1e-3
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "val_loss"):
            assert abs(row[name] - other[name]) <= 1e-5, (row["epoch"], name)


def _run_and_die(recipe, arguments):
    get = Batches.__getitem__

    def get_or_die(self, index):
        if (self.epoch, index) == KILLED_AT:
            os.kill(os.getpid(), 9)
        return get(self, index)

    Batches.__getitem__ = get_or_die
    importlib.import_module(f"training.{recipe}").main(arguments)


if __name__ == "__main__":
    _run_and_die(sys.argv[1], sys.argv[2:])
