import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from recipes import CONFIGS, TINY, flags

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from training import compare

BACKEND = keras.config.backend()
ROOT = Path(__file__).parent.parent
SMALL = {
    **TINY,
    "data.sequence_length": 24,
    "model.far_bias": 0.0,
    "training.steps": 6,
    "training.steps_per_epoch": 2,
    "training.accumulate": 1,
    "training.precision": "float32",
    "training.warmup_steps": 1,
}


def write_labelled(path):
    """Proteins whose letters tell their states, and whose first letter tells their class."""
    rng = np.random.default_rng(2)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(160):
            sequence = "".join(rng.choice(list("ACDEFGHI"), rng.integers(8, 40)))
            states = sequence.translate(str.maketrans("ACDEFGHI", "HGIEBTSC"))
            row = {"sequence": sequence, "labels": states, "class": str(sequence[0] < "E")}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def proteins(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("data") / "p.jsonl")


def command(recipe, config, output, *options, **changes):
    config = f"--config={CONFIGS / config}"
    return [f"--recipe={recipe}", config, f"--output={output}", *flags(SMALL | changes), *options]


def residue_labels(proteins, output, *attentions, **changes):
    options = [f"--file={proteins}", "--lengths", "24", "8", "--attentions", *attentions]
    return command("residue_labels", "secondary_structure.toml", output, *options, **changes)


@pytest.fixture
def parts(monkeypatch):
    """Do the work of child processes in this one, and return a list of what they were to do."""
    done = []

    def run_here(argv, *part):
        done.append(part)
        return compare.main([*argv, "--part", *part])

    monkeypatch.setattr(compare, "run_in_child", run_here)
    monkeypatch.setattr(compare, "_end_with_parent", lambda: None)
    return done


@pytest.mark.slow_on_jax
@pytest.mark.slow_on_tensorflow
def test_attentions_are_compared_once_and_more_can_be_added(proteins, tmp_path, parts, eager):
    output = tmp_path / "comparison"
    results = compare.main(residue_labels(proteins, output, "softmax"))
    assert parts == [("time",), ("memory", "softmax"), ("train", "softmax")]
    parts.clear()
    assert compare.main(residue_labels(proteins, output, "softmax")) == results
    assert parts == []

    results = compare.main(residue_labels(proteins, output, "softmax", "performer"))
    assert parts[-1] == ("train", "performer") and ("train", "softmax") not in parts
    assert json.loads((output / "comparison.json").read_text(encoding="utf-8")) == results
    assert results["headline"] == {"figure": "q8", "better": "higher"}
    page = (output / "comparison.md").read_text(encoding="utf-8")
    assert f"| tokens, at most | {6 * 16 * 24:,} |" in page
    for name in ("softmax", "performer"):
        metrics = json.loads((output / name / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["config"]["model"]["attention"] == name
        run, rows = results["runs"][name], metrics["training"]["history"]
        assert {figure: run[figure] for figure in ("q8", "q3", "cross_entropy")} == {
            figure: metrics["test"]["model"][figure] for figure in ("q8", "q3", "cross_entropy")
        }
        assert f" {run['q8']:.4f} |" in page and f" {run['parameters']:,} |" in page
        assert (run["steps"], run["tokens"]) == (6, 6 * 16 * 24)
        assert [value for _, value in run["curve"]] == [row["val_accuracy"] for row in rows]
        seconds = [second for second, _ in run["curve"]]
        assert 0 < seconds[0] < seconds[1] < seconds[2] == run["seconds"]
        assert run["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
        assert all(0 < row["training_seconds"] < row["seconds"] for row in rows)
        assert run["peak_bytes"] == metrics["training"]["peak_bytes"]
        assert (run["peak_bytes"] or 0) > 2**26 or sys.platform != "linux"
        assert min(results["step"]["seconds"][name]) > 0
    # Ascending, so that the higher peak comes last.
    assert results["step"]["lengths"] == [8, 24]
    # The same weights but for the projection of 8 features of two heads of 8.
    counts = [results["runs"][name]["parameters"] for name in ("performer", "softmax")]
    assert counts[0] - counts[1] in (8 * 8, 2 * 8 * 8)
    assert (output / "comparison.png").stat().st_size > 10_000

    record = output / "softmax" / "run.json"
    changed = json.loads(record.read_text(encoding="utf-8")) | {"data_sha256": "other"}
    record.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(SystemExit, match="had different data, so they cannot be compared"):
        compare.main(residue_labels(proteins, output, "softmax", "performer"))
    with pytest.raises(SystemExit, match=r"holds runs with another config or other arguments"):
        compare.main(residue_labels(proteins, output, "softmax", **{"training.steps": 8}))


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--set=model.attention=softmax"], "name what it compares with --attentions"),
        (["--set=model.attentions=softmax"], "no key 'model.attentions'"),
        (["--set=training.steps=7"], "'training.steps' must be a multiple"),
        (["--lengths", "0"], "--lengths must be above 0"),
        (["--config=nothing.toml"], "nothing.toml: there is no such config"),
        (["--file=nothing.jsonl"], "nothing.jsonl: there is no such file"),
        (["--preset=performer_tiny"], "A preset has the attention that it was trained with"),
    ],
)
def test_bad_arguments_end_with_one_sentence_before_any_work(
    proteins, tmp_path, monkeypatch, flags, message
):
    monkeypatch.setattr(compare, "run_in_child", lambda *_: pytest.fail("work started"))
    with pytest.raises(SystemExit, match=message) as error:
        compare.main([*residue_labels(proteins, tmp_path / "c", "softmax"), *flags])
    assert re.match("error: [^\n]*$", str(error.value))
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("flags", [["--fasta=p.fasta"], ["--attention", "softmax"]])
def test_flags_that_the_recipe_does_not_know_are_refused(proteins, tmp_path, capsys, flags):
    with pytest.raises(SystemExit):
        compare.main([*residue_labels(proteins, tmp_path / "c", "softmax"), *flags])
    assert f"unrecognized arguments: {flags[0]}" in capsys.readouterr().err


def test_an_output_that_cannot_be_written(proteins, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(SystemExit, match="output folder cannot be written"):
        compare.main(residue_labels(proteins, tmp_path / "file" / "c", "softmax"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, config, changes, headline",
    [
        ("protein_masked_lm", "protein_masked_lm.toml", {}, "perplexity"),
        ("causal_lm", "text_causal_lm.toml", {}, "bits_per_byte"),
        (
            "classification",
            "localisation.toml",
            {"data.text_field": "sequence", "data.label_field": "class"},
            "accuracy",
        ),
    ],
)
def test_every_recipe_can_be_compared(recipe, config, changes, headline, proteins, tmp_path, parts):
    source = proteins
    rows = [json.loads(line) for line in proteins.read_text(encoding="utf-8").splitlines()]
    flag = "--file"
    if recipe == "protein_masked_lm":
        flag, source = "--fasta", tmp_path / "p.fasta"
        lines = (f">P{i}\n{row['sequence']}\n" for i, row in enumerate(rows))
        source.write_text("".join(lines), encoding="utf-8")
    elif recipe == "causal_lm":
        source = tmp_path / "t.txt"
        source.write_text("\n".join(row["sequence"] for row in rows), encoding="utf-8")
    options = [f"{flag}={source}", "--attentions", "performer", "sliding_window"]
    results = compare.main(command(recipe, config, tmp_path / "c", *options, **changes))
    assert results["headline"]["figure"] == headline
    assert set(results["runs"]) == {"performer", "sliding_window"}
    values = [run[headline] for run in results["runs"].values()]
    assert np.isfinite([*values, results["baseline"][headline]]).all()
    assert results["step"]["lengths"] == [6, 12, 24]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone tells which child a process has")
def test_a_comparison_that_is_killed_goes_on(proteins, tmp_path):
    """The child must end with its parent: an orphan would write into the folder of the next."""

    def start(name):
        changes = {"training.steps": 100}
        flags = residue_labels(proteins, tmp_path / name, "performer", **changes)
        return subprocess.Popen([sys.executable, "-m", "training.compare", *flags], cwd=ROOT)

    killed = start("killed")
    history = tmp_path / "killed" / "performer" / "history.jsonl"
    while killed.poll() is None and not (history.is_file() and history.read_text().count("\n") > 2):
        time.sleep(0.05)
    child = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()[0]
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    deadline = time.monotonic() + 30
    while Path("/proc", child).exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path("/proc", child).exists()
    cost = tmp_path / "killed" / "cost.json"
    measured = cost.read_text(encoding="utf-8")
    assert 0 < history.read_text().count("\n") < 50
    curves = []
    for name in ("killed", "whole"):
        assert start(name).wait() == 0
        results = json.loads((tmp_path / name / "comparison.json").read_text(encoding="utf-8"))
        curves.append([value for _, value in results["runs"]["performer"]["curve"]])
    assert cost.read_text(encoding="utf-8") == measured
    assert len(curves[0]) == 50
    np.testing.assert_allclose(curves[0], curves[1], rtol=0, atol=1e-5)
