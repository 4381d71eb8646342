"""What the README shows is run as it stands there."""

import re
from pathlib import Path

import pytest
from marks import slow_on_torch

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
SECTION = README.split("\n## Tutorials\n")[1].split("\n## ")[0]
TUTORIALS = dict(re.findall(r"\*\*([^*]+)\.\*\* [^`]*```python\n(.*?)```", SECTION, re.DOTALL))


def test_every_block_is_found():
    assert len(TUTORIALS) == SECTION.count("```python") >= 2


@pytest.mark.slow_on_tensorflow
@pytest.mark.slow_on_jax
@pytest.mark.parametrize(
    "title", ["Masked residues", *slow_on_torch(*(t for t in TUTORIALS if t != "Masked residues"))]
)
def test_a_tutorial_runs(title, tmp_path, monkeypatch, eager, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(TUTORIALS[title], title, "exec"), names)
    if title == "Masked residues":
        assert names["logits"].shape[::2] == (2, 30)
        assert (tmp_path / "my_proteins.tflite").stat().st_size > 10_000
    if title == "Secondary structure":
        protein, printed = names["protein"], capsys.readouterr().out.splitlines()
        states = printed[printed.index(protein) + 1]
        assert len(protein) == len(states) and set(states) <= set("HGIEBTSC")
        assert (tmp_path / "my_labeller.tflite").is_file()
    if title == "Documents":
        assert "[1 0]" in capsys.readouterr().out and names["vectors"].shape == (2, 64)
        assert (tmp_path / "my_saved_model" / "saved_model.pb").is_file()
    if title == "Text":
        assert "The people of the United States" in capsys.readouterr().out
        assert (tmp_path / "my_writer_lite" / "model.tflite").is_file()
        assert (tmp_path / "my_writer_lite" / "example.py").is_file()
    if title == "A converted model":
        assert "CAASGFTFSS" in capsys.readouterr().out  # as in nearly every antibody
        assert (tmp_path / "my_saved_filler" / "saved_model.pb").is_file()
