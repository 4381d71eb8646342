import dataclasses
import json
import math

import numpy as np
import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from keras_performer.convert import from_antiberty, performerize
from training import converted
from training.benchmarks import attention_fidelity
from training.benchmarks.attention_fidelity import Data, Plan

pytestmark = pytest.mark.slow_on_jax

SMALL = Plan(
    num_features=(16, 64),
    norms=(1.0,),
    table_features=64,
    sequence_length=64,
    head_dim=16,
    num_seeds=6,
)
TINY = dataclasses.replace(
    SMALL, num_features=(16,), table_features=16, num_seeds=2, num_model_seeds=2, num_proteins=1
)


def assert_lower(results, low, high, measure="total_variation"):
    """The gap is beyond three standard errors of the difference."""
    low, high = (results[name]["64"][measure] for name in (low, high))
    spread = np.hypot(low["standard_error"], high["standard_error"])
    assert high["mean"] - low["mean"] > 3 * spread, (low, high)


def test_orthogonal_rows_are_better_than_iid_ones():
    methods = [("FAVOR+", None), ("FAVOR+, iid", None)]
    results = attention_fidelity.measure_data(Data("isotropic", 0.5), methods, (64,), SMALL)
    assert_lower(results, "FAVOR+", "FAVOR+, iid")


def test_positive_features_are_better_than_trigonometric_ones():
    methods = [("FAVOR+, iid", None), ("trigonometric, iid", None)]
    results = attention_fidelity.measure_data(Data("isotropic", 2.0), methods, (64,), SMALL)
    assert_lower(results, "FAVOR+, iid", "trigonometric, iid")
    assert_lower(results, "FAVOR+, iid", "trigonometric, iid", "kernel")


def test_errors_fall_with_the_number_of_features():
    methods = [("FAVOR+", None)]
    results = attention_fidelity.measure_data(Data("isotropic", 0.5), methods, (16, 256), SMALL)
    few, many = (results["FAVOR+"][count]["output"]["mean"] for count in ("16", "256"))
    assert 3 < few / many < 5  # four, by the square root of the number of features


def test_a_window_over_everything_is_exact():
    plan = dataclasses.replace(SMALL, num_seeds=2)
    methods = [("FAVOR+", SMALL.sequence_length)]
    results = attention_fidelity.measure_data(Data("local", 4.0), methods, (16,), plan)
    errors = results[f"FAVOR+, window {SMALL.sequence_length}"]["16"]
    assert set(errors) == {"total_variation", "output"}
    assert all(error["mean"] < 1e-5 for error in errors.values())


def test_floors_are_the_mean_and_softmax_over_the_blocks_that_the_window_sees():
    exact = np.random.default_rng(0).dirichlet(np.ones(7), size=(2, 7))
    rows = attention_fidelity.floors(exact, (2,))
    assert np.all(rows["plain mean"] == 1 / 7)
    near = rows["window 2 only"]
    np.testing.assert_allclose(near[1, 3, :6], exact[1, 3, :6] / exact[1, 3, :6].sum())
    assert np.all(near[:, 3, 6:] == 0) and np.all(near[:, 0, 4:] == 0)


@pytest.mark.parametrize("kind", ["isotropic", "anisotropic", "local"])
def test_data_have_their_norm(kind):
    query, key, value = Data(kind, 3.0).draw(4001, 16, seed=1)
    for x in (query, key):
        assert np.mean(np.sum(x**2, axis=-1)) / 16**0.5 == pytest.approx(3.0, rel=0.1)
    assert abs(np.corrcoef(query.ravel(), value.ravel())[0, 1]) < 0.02


def test_the_projection_is_not_drawn_from_the_numbers_of_the_data():
    query, *_ = Data("isotropic", 1.0).draw(8, 16, seed=0)
    feature_map = attention_fidelity.fitted("FAVOR+, iid", 8, 0, (query, query))
    rows = np.asarray(feature_map.get_weights()[0])
    assert np.abs(np.corrcoef(rows, query[0, :, 0])[:8, 8:]).max() < 0.9


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as context:
        context.setattr(attention_fidelity, "QUICK", TINY)
        context.setattr(attention_fidelity, "WINDOWED", ("FAVOR+",))
        context.setattr(attention_fidelity, "WINDOWS", {16: "--"})
        yield context


@pytest.fixture(scope="module")
def synthetic(patch):
    return attention_fidelity.measure_synthetic(TINY)


def test_every_map_is_measured_on_all_data(synthetic):
    assert set(synthetic) == {"isotropic, norm 1", "anisotropic, norm 1", "local, norm 2"}
    others = {"FAVOR+, window 16", "plain mean", "window 16 only"}
    for methods in synthetic.values():
        assert set(methods) == {*attention_fidelity.MAPS, *others}
        assert "kernel" in methods["FAVOR+"]["16"] and "kernel" not in methods["regularised"]["16"]


def check_files(folder, results):
    written = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert written["plan"]["num_features"] == [16]
    for part in ("synthetic", "antiberty"):
        assert written.get(part) == results.get(part)
    assert (folder / "fidelity.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_model_is_explained_and_the_rest_written(
    synthetic, tmp_path, monkeypatch, capsys
):
    def unavailable(name, *_):
        raise OSError(f"{name} cannot be fetched")

    monkeypatch.setattr(converted, "fetch_python_package", unavailable)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr(attention_fidelity, "measure_synthetic", lambda plan: synthetic)
    results = attention_fidelity.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "antiberty cannot be fetched" in printed and "window 16 only" in printed
    assert "antiberty" not in results
    check_files(tmp_path, results)


def test_layers_of_a_trained_model_are_measured(synthetic, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    layer = tuple(rng.standard_normal((3, 1, 31, 2, 8)).astype("float32"))
    monkeypatch.setattr(attention_fidelity, "measure_synthetic", lambda plan: synthetic)
    monkeypatch.setattr(attention_fidelity, "load_model", lambda name: None)
    monkeypatch.setattr(attention_fidelity, "performerize", lambda *_, **options: None)
    monkeypatch.setattr(attention_fidelity, "model_layers", lambda *_: [layer])
    results = attention_fidelity.main(["--quick", "--out", str(tmp_path)])
    check_files(tmp_path, results)
    (measured,) = results["antiberty"]["proteins"]
    for norm, tensor in (("query_norm", layer[0]), ("key_norm", layer[1])):
        assert measured[norm] == pytest.approx(np.mean(np.sum(tensor**2, axis=-1)) / 8**0.5)
    errors = measured["errors"]
    assert errors["FAVOR+, window 16"]["output"]["mean"] < 1e-5  # of 31 tokens all are near
    assert errors["plain mean"]["output"]["standard_error"] < 1e-9
    assert errors["FAVOR+"]["output"]["standard_error"] > 1e-3


def test_a_wheel_with_other_weights_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_PERFORMER_CACHE", str(tmp_path))
    (tmp_path / "antiberty-0.1.3.whl").write_bytes(b"not it")
    with pytest.raises(ValueError, match=r"not the package that was expected.*delete it"):
        converted.load_model("antiberty")


BERT = {
    "model_type": "bert",
    "vocab_size": 25,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 24,
    "hidden_act": "gelu",
    "max_position_embeddings": 9,
    "type_vocab_size": 2,
}


def layer_norm(x, scale, shift):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12) * scale + shift


def test_queries_keys_and_values_are_those_of_a_post_norm_bert(tmp_path):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    width, sequence = 16, "ACDBW"
    kinds = {"word": 25, "position": 9, "token_type": 2}
    shapes = {f"bert.embeddings.{n}_embeddings": (kinds[n], width) for n in kinds}
    shapes["bert.embeddings.LayerNorm"] = (width,)
    for layer in ("bert.encoder.layer.0", "bert.encoder.layer.1"):
        for part in ("query", "key", "value"):
            shapes[f"{layer}.attention.self.{part}"] = (width, width)
        shapes[f"{layer}.attention.output.dense"] = (width, width)
        shapes[f"{layer}.attention.output.LayerNorm"] = (width,)
        shapes[f"{layer}.intermediate.dense"] = (24, width)
        shapes[f"{layer}.output.dense"] = (width, 24)
        shapes[f"{layer}.output.LayerNorm"] = (width,)
    shapes["cls.predictions.transform.dense"] = (width, width)
    shapes["cls.predictions.transform.LayerNorm"] = (width,)
    arrays = {f"{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    arrays |= {
        f"{name}.bias": rng.standard_normal(shape[0])
        for name, shape in shapes.items()
        if not name.endswith("_embeddings")
    }
    arrays["cls.predictions.bias"] = np.zeros(25)
    folder = tmp_path / "antiberty" / "trained_models" / "AntiBERTy_md_smooth"
    folder.mkdir(parents=True)
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    (folder.parent / "vocab.txt").write_text("\n".join((*special, *"ACDEFGHIKLMNPQRSTVWY")))
    (folder / "config.json").write_text(json.dumps({**BERT, "hidden_size": width}))
    weights = {name: torch.tensor(array, dtype=torch.float32) for name, array in arrays.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    model = performerize(from_antiberty(tmp_path), feature_map=None)
    layers = attention_fidelity.model_layers(model, sequence + "ACDE")  # of which two fit in

    def linear(x, name):
        return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]

    def norm(x, name):
        return layer_norm(x, arrays[f"{name}.weight"], arrays[f"{name}.bias"])

    ids = [2, 5, 6, 7, 1, 23, 5, 6, 3]  # B is no residue of the vocabulary
    x = arrays["bert.embeddings.word_embeddings.weight"][ids]
    x = x + arrays["bert.embeddings.position_embeddings.weight"]
    x = norm(
        x + arrays["bert.embeddings.token_type_embeddings.weight"][0], "bert.embeddings.LayerNorm"
    )
    assert len(layers) == 2
    for number, tensors in enumerate(layers):
        layer = f"bert.encoder.layer.{number}"
        q, k, v = (linear(x, f"{layer}.attention.self.{p}") for p in ("query", "key", "value"))
        for actual, expected in zip(tensors, (q, k, v), strict=True):
            assert actual.shape == (1, 9, 8, 2)
            np.testing.assert_allclose(actual.reshape(9, width), expected, rtol=1e-4, atol=1e-4)
        heads = []
        for head in np.split(np.arange(width), 8):
            scores = q[:, head] @ k[:, head].T / 2**0.5
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            heads.append(scores / scores.sum(axis=-1, keepdims=True) @ v[:, head])
        attended = linear(np.concatenate(heads, axis=-1), f"{layer}.attention.output.dense")
        x = norm(x + attended, f"{layer}.attention.output.LayerNorm")
        hidden = linear(x, f"{layer}.intermediate.dense")
        hidden = 0.5 * hidden * (1 + np.vectorize(math.erf)(hidden / 2**0.5))
        x = norm(x + linear(hidden, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")


def test_bad_arguments_are_explained(tmp_path, capsys):
    path = tmp_path / "file"
    path.write_text("")
    for arguments, message in (
        (["--model", "nonsense"], "choose from"),
        (["--out", str(path)], "--out must name a folder"),
    ):
        with pytest.raises(SystemExit):
            attention_fidelity.main(arguments)
        assert message in capsys.readouterr().err
