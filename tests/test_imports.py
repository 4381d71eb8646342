"""Imported models give the outputs of the libraries that they come from; bad files are refused.

The expected outputs are those of transformers, of performer-pytorch and of plain PyTorch, see
golden/README.md.
"""

import argparse
import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import keras
import keras_hub
import numpy as np
import pytest
from tolerances import assert_exact, relative_rms, to_numpy

from keras_performer.convert import (
    ExactBertBackbone,
    ExactBertMaskedLM,
    PerformerExactBertMaskedLM,
    PerformerPytorchLM,
    conversion_report,
    from_antiberty,
    from_hugging_face,
    from_performer_pytorch,
    from_sapiens,
    performerize,
)
from training.converted import MODELS, load_model
from training.data.registry import fetch_python_package

FOLDER = Path(__file__).parent / "golden" / "imports"
KEPT, EVERY = 4, 8  # which logits the files keep: see make_import_golden.py
PARITY = 1e-4
TASKS = {
    "bert": ExactBertMaskedLM,
    "roberta": keras_hub.models.RobertaMaskedLM,
    "esm": keras_hub.models.ESMMaskedPLM,
}
LATER = pytest.mark.slow_on_jax
PERFORMERS = sorted(p.stem for p in FOLDER.glob("performer_pytorch_*.npz"))


class Golden:
    """A file of weights, inputs and outputs."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz") as arrays:
            self.config = json.loads(str(arrays["config"]))
            self.token_ids, self.logits = arrays["token_ids"], arrays["logits"]
            shapes, flat = json.loads(str(arrays["shapes"])), arrays["weights"]
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
        parts = np.split(flat, ends[:-1])
        self.weights = {n: p.reshape(shapes[n]) for n, p in zip(shapes, parts, strict=True)}


def write_safetensors(path, weights):
    header, data = {}, b""
    for name, array in weights.items():
        begin, data = len(data), data + array.astype("<f4").tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [begin, len(data)],
        }
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)


def write_folder(folder, golden, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(golden.config))
    weights = {name: a for name, a in {**golden.weights, **changes}.items() if a is not None}
    write_safetensors(folder / "model.safetensors", weights)
    return folder


def masked_lm_inputs(token_ids, every):
    """Inputs that ask for the logits of every so many tokens."""
    positions = np.arange(0, token_ids.shape[1], every)
    return {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "mask_positions": np.tile(positions, (len(token_ids), 1)),
    }


def logits_of(model, token_ids):
    inputs = masked_lm_inputs(token_ids, KEPT)
    return to_numpy(model({tensor.name: inputs[tensor.name] for tensor in model.inputs}))


def lm_logits(model, token_ids):
    inputs = {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}
    return to_numpy(model(inputs))[:, ::KEPT]


# Hugging Face transformers.


@pytest.fixture(scope="module", params=TASKS)
def imported(request, tmp_path_factory):
    golden = Golden(request.param)
    folder = write_folder(tmp_path_factory.mktemp(request.param), golden)
    return request.param, golden, from_hugging_face(folder)


def test_logits_are_those_of_transformers(imported):
    name, golden, model = imported
    assert type(model) is TASKS[name]
    assert np.abs(golden.logits).max() > 1
    assert np.abs(logits_of(model, golden.token_ids) - golden.logits).max() < PARITY


def test_performerize_takes_what_was_imported(imported):
    _, golden, model = imported
    performer = performerize(model, num_features=8, exact_window=32, seed=0)
    assert len(conversion_report(performer)) == golden.config["num_hidden_layers"]
    assert np.abs(logits_of(performer, golden.token_ids) - golden.logits).max() < PARITY


@pytest.mark.slow_on_jax
def test_padding_changes_nothing(imported):
    name, golden, model = imported
    if name == "esm":
        pytest.skip("keras-hub's ESM lets padding take part under TensorFlow and JAX.")
    ids = golden.token_ids[:2]
    padded = masked_lm_inputs(np.pad(ids, ((0, 0), (0, 3)), constant_values=1), KEPT)
    padded["padding_mask"][:, -3:] = 0
    padded["mask_positions"] = padded["mask_positions"][:, : golden.logits.shape[1]]
    assert np.abs(to_numpy(model(padded)) - golden.logits[:2]).max() < PARITY


def test_exact_bert_survives_presets_and_conversion(tmp_path):
    golden = Golden("bert")
    model = from_hugging_face(write_folder(tmp_path / "source", golden))
    performer = performerize(model, num_features=8, seed=0)
    assert type(performer) is PerformerExactBertMaskedLM
    for saved in (model, performer):
        saved.save_to_preset(str(tmp_path / "preset"))
        loaded = type(saved).from_preset(str(tmp_path / "preset"))
        assert type(loaded) is type(saved)
        assert_exact(logits_of(loaded, golden.token_ids), logits_of(saved, golden.token_ids))
        assert loaded.masked_lm_head._intermediate_layer_norm.epsilon == 1e-12


def test_a_checkpoint_without_head_gives_a_backbone(tmp_path):
    golden = Golden("bert")
    golden.weights = {
        name.removeprefix("bert."): a
        for name, a in golden.weights.items()
        if not name.startswith("cls.")
    }
    pooler = {"pooler.dense.weight": np.zeros((16, 16)), "pooler.dense.bias": np.zeros(16)}
    backbone = from_hugging_face(write_folder(tmp_path, golden, **pooler))
    assert type(backbone) is ExactBertBackbone


def test_old_names_of_normalisations(tmp_path):
    golden = Golden("bert")
    golden.weights = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): a
        for name, a in golden.weights.items()
    }
    model = from_hugging_face(write_folder(tmp_path, golden))
    assert np.abs(logits_of(model, golden.token_ids) - golden.logits).max() < PARITY


def test_esm_without_token_dropout_is_not_scaled(tmp_path):
    golden = Golden("esm")
    golden.config["token_dropout"] = False
    model = from_hugging_face(write_folder(tmp_path, golden))
    table = golden.weights["esm.embeddings.word_embeddings.weight"]
    assert_exact(model.backbone.token_embedding.embeddings, table)


def test_a_preprocessor_comes_with_the_vocabulary(tmp_path):
    golden = Golden("bert")
    # The last is what some take for the end of a line.
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRST", "e", "\x85"]
    golden.config["vocab_size"] = len(tokens)
    for name, array in golden.weights.items():
        if len(array) == 23:
            golden.weights[name] = np.concatenate([array, array[:1]])
    folder = write_folder(tmp_path, golden)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    uncased = from_hugging_face(folder).preprocessor
    assert uncased.tokenizer.vocabulary_size() == len(tokens)
    assert np.array(uncased.tokenizer("E é")).tolist() == [22, 22]
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    preprocessor = from_hugging_face(folder).preprocessor
    assert np.array(preprocessor.tokenizer("A C [MASK] x")).tolist() == [5, 6, 4, 1]
    assert preprocessor.sequence_length == 20
    x, _, _ = preprocessor(["A C D E F G H"])
    assert {"token_ids", "padding_mask", "mask_positions"} <= set(x)
    assert x["token_ids"].shape == (1, 20)


# What is refused.

WORD = "bert.embeddings.word_embeddings.weight"
BAD_TENSORS = {
    "missing": (
        {"bert.encoder.layer.1.output.dense.bias": None},
        r"bert\.encoder\.layer\.1\.output\.dense\.bias \(16,\) is missing",
    ),
    "unknown": ({"classifier.bias": np.zeros(3)}, r"classifier\.bias \(3,\) is unknown"),
    "misshaped": (
        {"bert.encoder.layer.0.intermediate.dense.weight": np.zeros((16, 24))},
        r"intermediate\.dense\.weight has shape \(16, 24\), expected \(24, 16\)",
    ),
    "untied": (
        {"cls.predictions.decoder.weight": np.zeros((23, 16))},
        r"cls\.predictions\.decoder\.weight differs from the weight that it must share",
    ),
}


@pytest.mark.parametrize("bad", BAD_TENSORS)
def test_bad_tensors_are_named(bad, tmp_path):
    changes, message = BAD_TENSORS[bad]
    with pytest.raises(ValueError, match=message):
        from_hugging_face(write_folder(tmp_path, Golden("bert"), **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "model_type='t5'"),
        ({"hidden_act": "gelu_new"}, "hidden_act='gelu_new'"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps=1e-05"),
        ({"num_hidden_layers": 1}, r"bert\.encoder\.layer\.1\.\S+ \(16, 16\) is unknown"),
        ({"vocab_size": None}, "lacks vocab_size"),
    ],
)
def test_other_configurations_are_refused(change, message, tmp_path):
    golden = Golden("bert")
    golden.config.update(change)
    golden.config = {name: value for name, value in golden.config.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_hugging_face(write_folder(tmp_path, golden))


def test_a_folder_without_weights(tmp_path):
    write_folder(tmp_path, Golden("bert"))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors, pytorch_model\.bin"):
        from_hugging_face(tmp_path)


def sharded_folder(tmp_path, **changes):
    golden = Golden("bert")
    whole = write_folder(tmp_path, golden) / "model.safetensors"
    whole.unlink()
    names = list(golden.weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        write_safetensors(tmp_path / file, {name: golden.weights[name] for name in part})
    files = {name: file for file, part in parts.items() for name in part}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**files, **changes}}))
    return golden, names


def test_a_checkpoint_in_several_files_is_read(tmp_path):
    golden, _ = sharded_folder(tmp_path)
    logits = logits_of(from_hugging_face(tmp_path), golden.token_ids)
    assert np.abs(logits - golden.logits).max() < PARITY


def test_files_that_are_not_what_their_index_says_are_refused(tmp_path):
    _, names = sharded_folder(tmp_path, more="a.safetensors")
    with pytest.raises(ValueError, match="differ from it in more"):
        from_hugging_face(tmp_path)
    sharded_folder(tmp_path, **{names[0]: "../a.safetensors"})
    with pytest.raises(ValueError, match="beside the index"):
        from_hugging_face(tmp_path)
    sharded_folder(tmp_path, **{names[0]: "c.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"c\.safetensors"):
        from_hugging_face(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="weight_map"):
        from_hugging_face(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0not JSON", b"\xff" * 100])
def test_damaged_safetensors_are_refused(content, tmp_path):
    write_folder(tmp_path, Golden("bert"))
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="Expected a safetensors file"):
        from_hugging_face(tmp_path)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def torch_folder(tmp_path, content):
    golden = Golden("bert")
    write_folder(tmp_path, golden)
    (tmp_path / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (tmp_path / "pytorch_model.bin").write_bytes(content)
    else:
        torch = pytest.importorskip("torch")
        torch.save(content(golden, torch), tmp_path / "pytorch_model.bin")
    return golden


def test_torch_files_are_read(tmp_path):
    golden = torch_folder(
        tmp_path, lambda g, torch: {n: torch.from_numpy(a) for n, a in g.weights.items()}
    )
    model = from_hugging_face(tmp_path)
    assert np.abs(logits_of(model, golden.token_ids) - golden.logits).max() < PARITY


@pytest.mark.parametrize("kind", ["torch", "pickle", "damaged", "empty"])
def test_files_that_are_not_plain_tensors_are_not_loaded(kind, tmp_path):
    pytest.importorskip("torch")
    trap = tmp_path / "trap"
    content = {
        "torch": lambda golden, torch: {"model": Trap(trap)},
        "pickle": pickle.dumps(Trap(trap), protocol=2),
        "damaged": b"PK\x03\x04" + b"\0" * 100,
        "empty": b"",
    }[kind]
    torch_folder(tmp_path, content)
    with pytest.raises(ValueError, match="Expected a PyTorch file of plain tensors"):
        from_hugging_face(tmp_path)
    assert not trap.exists()


def test_a_torch_file_with_more_than_tensors(tmp_path):
    torch_folder(tmp_path, lambda golden, torch: {"epoch": 3})
    with pytest.raises(ValueError, match=r"Expected a state dict.*\['epoch'\]"):
        from_hugging_face(tmp_path)


def test_torch_files_need_torch_and_say_so(tmp_path, monkeypatch):
    torch_folder(tmp_path, b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs PyTorch \(`pip install torch`\)"):
        from_hugging_face(tmp_path)


# Antibodies: the real weights, from wheels.


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_antibody_models(name):
    try:
        fetch_python_package(*MODELS[name].package)
    except OSError as error:
        pytest.skip(str(error))
    pytest.importorskip("torch")
    model = load_model(name)
    with np.load(FOLDER / f"{name.replace('-', '_')}.npz") as arrays:
        token_ids, logits = arrays["token_ids"].astype("int32"), arrays["logits"]
    mask = token_ids >= 0
    inputs = masked_lm_inputs(np.where(mask, token_ids, 1), EVERY)
    inputs["padding_mask"] = mask.astype("int32")
    kept = mask[:, ::EVERY]
    assert len(token_ids) == 10
    assert np.abs(to_numpy(model(inputs))[kept] - logits[kept]).max() < PARITY
    # Its tokenizer knows the letters: where nothing is masked, it finds the same ids.
    letters = "QVQLVESGGG" if name == "sapiens-heavy" else "DIQMTQSPSS"
    text = " ".join(letters) if name == "antiberty" else letters
    ids = np.array(model.preprocessor.tokenizer(text))
    assert model.preprocessor.tokenizer.detokenize(ids).replace(" ", "") == letters
    vocabulary = model.preprocessor.tokenizer.vocabulary_size()
    assert vocabulary == model.backbone.vocabulary_size == 25


def test_the_layout_of_antiberty(tmp_path):
    torch = pytest.importorskip("torch")
    golden = Golden("bert")
    models = tmp_path / "antiberty" / "trained_models"
    folder = models / "AntiBERTy_md_smooth"
    folder.mkdir(parents=True)
    letters = "ACDEFGHIKLMNPQRSTV"
    (models / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n" + "\n".join(letters))
    (folder / "config.json").write_text(json.dumps(golden.config))
    heads = {f"cls.{name}.bias": np.zeros(2) for name in ("species", "chain", "graft")}
    weights = {n: torch.from_numpy(a.copy()) for n, a in {**golden.weights, **heads}.items()}
    torch.save(weights, folder / "pytorch_model.bin")
    model = from_antiberty(tmp_path)
    assert np.abs(logits_of(model, golden.token_ids) - golden.logits).max() < PARITY
    assert np.array(model.preprocessor.tokenizer("[CLS] A [MASK] V")).tolist() == [2, 5, 4, 22]


FAIRSEQ = {
    "roberta.embeddings.word_embeddings": "decoder.sentence_encoder.embed_tokens",
    "roberta.embeddings.position_embeddings": "decoder.sentence_encoder.embed_positions",
    "roberta.embeddings.LayerNorm": "decoder.sentence_encoder.emb_layer_norm",
    "roberta.encoder.layer": "decoder.sentence_encoder.layers",
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
    "lm_head.decoder.weight": "lm_head.weight",
    "lm_head": "decoder.lm_head",
}


@pytest.mark.parametrize("chain", ["heavy", pytest.param("light", marks=LATER)])
def test_the_layout_of_sapiens(chain, tmp_path):
    torch = pytest.importorskip("torch")
    golden = Golden("roberta")
    segment = golden.weights.pop("roberta.embeddings.token_type_embeddings.weight")
    golden.weights["roberta.embeddings.position_embeddings.weight"] += segment
    del golden.weights["lm_head.decoder.bias"]
    weights = {}
    for name, array in golden.weights.items():
        for theirs, fairseq in FAIRSEQ.items():
            name = name.replace(theirs, fairseq)
        weights[name] = torch.from_numpy(array)
    settings = argparse.Namespace(
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_embed_dim=16,
        encoder_ffn_embed_dim=24,
        activation_fn="gelu",
        dropout=0.1,
        max_positions=20,
    )
    folder = tmp_path / "sapiens" / "models" / "v1"
    folder.mkdir(parents=True)
    (folder / "dict.txt").write_text("".join(f"{letter} 1\n" for letter in "ACDEFGHIKLMNPQRSTV"))
    name = {"heavy": "checkpoint_vh.pt", "light": "checkpoint_vl.pt"}[chain]
    torch.save({"args": settings, "model": weights}, folder / name)
    model = from_sapiens(tmp_path, chain)
    assert np.abs(logits_of(model, golden.token_ids) - golden.logits).max() < PARITY
    assert np.array(model.preprocessor.tokenizer("AC<mask>V")).tolist() == [4, 5, 22, 21]
    x, y, _ = model.preprocessor(["ACDEFGHIKL"])
    assert x["token_ids"][0, 0] == 0 and 2 in x["token_ids"][0]
    assert set(np.array(y).ravel().tolist()) <= set(range(22))


def test_other_wheels_are_refused(tmp_path):
    path = tmp_path / "antiberty-1.0.0-py3-none-any.whl"
    path.write_bytes(b"no zip file")
    with pytest.raises(ValueError, match="Expected a wheel"):
        from_antiberty(path)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("antiberty/__init__.py", "")
    with pytest.raises(FileNotFoundError, match=r"AntiBERTy_md_smooth/config\.json in the wheel"):
        from_antiberty(path)


def test_sapiens_has_two_chains(tmp_path):
    with pytest.raises(ValueError, match="chain='kappa'"):
        from_sapiens(tmp_path, "kappa")


# performer-pytorch.


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if "rotary" in name else LATER) for name in PERFORMERS],
)
def test_logits_are_those_of_performer_pytorch(name):
    golden = Golden(name)
    model = from_performer_pytorch(golden.weights, golden.config)
    assert np.abs(lm_logits(model, golden.token_ids) - golden.logits).max() < PARITY


def test_every_kind_of_performer_is_there():
    assert len(PERFORMERS) == 9
    configs = [Golden(name).config for name in PERFORMERS]
    for option in (
        "causal",
        "ff_glu",
        "tie_embed",
        "qkv_bias",
        "attn_out_bias",
        "axial_position_emb",
        "use_scalenorm",
        "use_rezero",
        "shift_tokens",
        "generalized_attention",
        "reversible",
    ):
        assert any(config.get(option) for config in configs), option


@pytest.mark.slow_on_jax
@pytest.mark.parametrize("name", ["rotary_decoder", "scbert"])
def test_the_epsilons_can_be_switched_off(name):
    golden = Golden(f"performer_pytorch_{name}")
    model = from_performer_pytorch(golden.weights, golden.config, legacy_epsilon=False)
    error = relative_rms(lm_logits(model, golden.token_ids), golden.logits)
    assert 1e-5 < error < 0.02


@pytest.mark.slow_on_jax
def test_without_the_epsilons_the_future_does_not_matter():
    golden = Golden("performer_pytorch_rotary_decoder")
    later = golden.token_ids.copy()
    later[:, -1] = (later[:, -1] + 1) % 11
    for legacy in (True, False):
        model = from_performer_pytorch(golden.weights, golden.config, legacy_epsilon=legacy)
        before, after = (lm_logits(model, ids)[:, :-1] for ids in (golden.token_ids, later))
        assert np.array_equal(before, after) is not legacy


def test_performers_survive_saving(tmp_path):
    golden = Golden("performer_pytorch_scalenorm_decoder")
    model = from_performer_pytorch(golden.weights, golden.config)
    expected = lm_logits(model, golden.token_ids)
    model.save(tmp_path / "model.keras")
    model.save_to_preset(str(tmp_path / "preset"))
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        PerformerPytorchLM.from_preset(str(tmp_path / "preset")),
    ):
        assert_exact(lm_logits(loaded, golden.token_ids), expected)


@pytest.mark.slow_on_jax
def test_padding_is_no_key():
    golden = Golden("performer_pytorch_scbert")
    model = from_performer_pytorch(golden.weights, golden.config)
    ids = golden.token_ids[:2]
    other = ids.copy()
    other[:, -3:] = 6 - other[:, -3:]
    mask = np.ones_like(ids)
    mask[:, -3:] = 0
    outputs = [to_numpy(model({"token_ids": x, "padding_mask": mask})) for x in (ids, other)]
    assert_exact(outputs[0][:, :-3], outputs[1][:, :-3])


@pytest.mark.parametrize(
    "kind", ["alone", *(pytest.param(x, marks=LATER) for x in ("nested", "safetensors"))]
)
def test_performers_are_read_from_files(kind, tmp_path):
    golden = Golden("performer_pytorch_scbert")
    if kind == "safetensors":
        path = tmp_path / "model.safetensors"
        write_safetensors(path, golden.weights)
    else:
        torch = pytest.importorskip("torch")
        path = tmp_path / "model.pth"
        weights = {name: torch.from_numpy(a.copy()) for name, a in golden.weights.items()}
        # As performer-pytorch saves it, and older versions did.
        weights["performer.calls_since_last_redraw"] = torch.tensor(3)
        inner = "layers.0.0.fn.to_q.weight"
        weights[f"performer.proj_updater.instance.{inner}"] = weights[f"performer.net.{inner}"]
        torch.save({"epoch": 3, "model_state_dict": weights} if kind == "nested" else weights, path)
    model = from_performer_pytorch(path, golden.config)
    assert np.abs(lm_logits(model, golden.token_ids) - golden.logits).max() < PARITY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local_attn_heads": 1}, "local_attn_heads=1"),
        ({"cross_attend": True}, "cross_attend=True"),
        ({"no_projection": True}, "no_projection=True"),
        ({"num_heads": 2}, "unknown \\['num_heads'\\]"),
        ({"depth": 1}, r"performer\.net\.layers\.1\.\S+ \S+ is unknown"),
        ({"depth": 3}, r"performer\.net\.layers\.2\.\S+ \S+ is missing"),
        (
            {"dim_head": 4, "heads": 3},
            r"layer_pos_emb\.emb has shape \(20, 6\), expected \(20, 4\)",
        ),
        ({"use_rezero": True}, r"performer\.net\.layers\.0\.0\.g \(\) is missing"),
        ({"ff_glu": True}, r"w1\.weight has shape \(24, 12\), expected \(48, 12\)"),
    ],
)
def test_performers_that_do_not_fit_are_refused(change, message):
    golden = Golden("performer_pytorch_rotary_encoder")
    with pytest.raises(ValueError, match=message):
        from_performer_pytorch(golden.weights, {**golden.config, **change})
