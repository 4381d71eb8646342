"""Sequence classifiers that are saved and loaded, or put on a pretrained body."""

import json

import keras
import keras_hub
import numpy as np
import pytest
from gradients import call
from marks import slow_on_jax
from test_sequence_classifier import TEXTS, make_backbone, make_task
from tolerances import assert_exact, to_numpy

from keras_performer.models import (
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerSequenceClassifier,
    ProteinTokenizer,
)


@pytest.mark.slow_on_tensorflow
@pytest.mark.parametrize(
    "backbone_class", [PerformerEncoderBackbone, *slow_on_jax(PerformerDecoderBackbone)]
)
def test_saved_tasks_and_presets_come_back(backbone_class, tmp_path):
    options = {"problem": "multi_label", "pooling": "last", "activation": "sigmoid",
               "dropout": 0.25, "hidden_dim": 5}  # fmt: skip
    task = make_task(backbone_class, **options)
    task.fit(TEXTS, np.eye(4)[:, :3], verbose=0)
    x = {name: to_numpy(value) for name, value in task.preprocessor(TEXTS).items()}
    expected = to_numpy(call(task, x))
    config = json.loads(json.dumps(task.get_config()))
    assert {name: config[name] for name in options} == options and config["num_classes"] == 3
    task.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert loaded.get_config() == task.get_config()
    assert int(to_numpy(loaded.optimizer.iterations)) == 1
    assert type(loaded.loss) is keras.losses.BinaryCrossentropy
    task.save_to_preset(str(tmp_path / "preset"))
    for again in (
        loaded,
        PerformerSequenceClassifier.from_preset(str(tmp_path / "preset")),
        keras_hub.models.TextClassifier.from_preset(str(tmp_path / "preset")),
    ):
        assert isinstance(again, PerformerSequenceClassifier)
        assert type(again.backbone) is backbone_class
        for new, old in zip(again.get_weights(), task.get_weights(), strict=True):
            assert_exact(new, old)
        assert_exact(again.preprocessor(TEXTS)["token_ids"], x["token_ids"])
        assert_exact(call(again, x), expected)


def test_a_pretrained_body_takes_a_new_head(tmp_path):
    body = make_backbone()
    body.token_embedding.set_weights([w + 1 for w in body.token_embedding.get_weights()])
    PerformerMaskedLM(body).save_to_preset(str(tmp_path))
    ProteinTokenizer().save_to_preset(str(tmp_path))
    for loader in (PerformerSequenceClassifier, keras_hub.models.TextClassifier):
        task = loader.from_preset(str(tmp_path), num_classes=5, pooling="first")
        assert (task.num_classes, task.pooling) == (5, "first")
        assert task.preprocessor.sequence_length == 512
        for new, old in zip(task.backbone.get_weights(), body.get_weights(), strict=True):
            assert_exact(new, old)
