"""keras-hub's own test helpers, on our backbones, tasks and preprocessors.

They skip precision and quantization on PyTorch; tests of our own cover those there.
"""

import keras
import numpy as np
import pytest

pytest.importorskip("tensorflow", reason="keras-hub's helpers feed tf.data")
test_case = pytest.importorskip("keras_hub.src.tests.test_case")

from keras_performer.models import (  # noqa: E402  (only where the helpers import)
    ByteTokenizer,
    PerformerCausalLM,
    PerformerCausalLMPreprocessor,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    PerformerSeq2SeqBackbone,
    PerformerSequenceClassifier,
    PerformerSequenceClassifierPreprocessor,
    ProteinTokenizer,
)

SIZES = {
    "vocabulary_size": 30,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
    "num_features": 16,
    "seed": 1,
}
PROTEINS = ["MKTAYIAK", "MSDNG", "MKV", "GGPSD"]
BACKBONES = {
    "encoder": (PerformerEncoderBackbone, {}),
    "window": (PerformerEncoderBackbone, {"exact_window": 2, "num_sink_tokens": 1}),
    "decoder": (PerformerDecoderBackbone, {"exact_window": 2}),
    "reversible": (PerformerDecoderBackbone, {"reversible": True}),
}


# One backend in the short run: the others compile for minutes.
if keras.config.backend() != "torch":
    pytestmark = pytest.mark.slow


class TestKerasHub(test_case.TestCase):
    def backbone(self, kind, **options):
        backbone_class, own = BACKBONES[kind]
        return backbone_class(**{**SIZES, **own, **options})

    def test_backbones(self):
        data = {
            "token_ids": np.ones((2, 5), "int32"),
            "padding_mask": np.ones((2, 5), "int32"),
        }
        for backbone_class, options in BACKBONES.values():
            self.run_backbone_test(
                cls=backbone_class,
                init_kwargs={**SIZES, **options},
                input_data=data,
                expected_output_shape=(2, 5, 8),
            )

    def test_encoder_decoder_backbone(self):
        names = [f"{part}_{x}" for part in ("encoder", "decoder") for x in ("ids", "mask")]
        names = [n.replace("ids", "token_ids").replace("mask", "padding_mask") for n in names]
        self.run_backbone_test(
            cls=PerformerSeq2SeqBackbone,
            init_kwargs=SIZES,
            input_data={name: np.ones((2, 5), "int32") for name in names},
            expected_output_shape={
                "encoder_sequence_output": (2, 5, 8),
                "decoder_sequence_output": (2, 5, 8),
            },
        )

    def test_backbones_are_saved(self):
        data = {"token_ids": np.ones((2, 5), "int32"), "padding_mask": np.ones((2, 5), "int32")}
        for backbone_class, options in BACKBONES.values():
            self.run_model_saving_test(
                cls=backbone_class, init_kwargs={**SIZES, **options}, input_data=data
            )

    def test_masked_language_model(self):
        # Masks are drawn afresh at every call; these can only be everywhere.
        preprocessor = PerformerMaskedLMPreprocessor(
            ProteinTokenizer(),
            sequence_length=12,
            mask_selection_rate=1.0,
            mask_token_rate=1.0,
            random_token_rate=0.0,
        )
        self.run_task_test(
            cls=PerformerMaskedLM,
            init_kwargs={"preprocessor": preprocessor, "backbone": self.backbone("window")},
            train_data=(PROTEINS,),
        )

    def test_causal_language_model(self):
        preprocessor = PerformerCausalLMPreprocessor(ProteinTokenizer(), sequence_length=12)
        self.run_task_test(
            cls=PerformerCausalLM,
            init_kwargs={"preprocessor": preprocessor, "backbone": self.backbone("decoder")},
            train_data=(PROTEINS,),
            expected_output_shape=(4, 12, 30),
        )

    def test_sequence_classifier(self):
        preprocessor = PerformerSequenceClassifierPreprocessor(
            ProteinTokenizer(), sequence_length=12
        )
        self.run_task_test(
            cls=PerformerSequenceClassifier,
            init_kwargs={
                "preprocessor": preprocessor,
                "backbone": self.backbone("encoder"),
                "num_classes": 3,
            },
            train_data=(PROTEINS, [0, 1, 2, 0]),
            expected_output_shape=(4, 3),
        )

    def test_preprocessors(self):
        for preprocessor_class, data in (
            (PerformerCausalLMPreprocessor, (PROTEINS,)),
            (PerformerSequenceClassifierPreprocessor, (PROTEINS, [0, 1, 2, 0])),
        ):
            for tokenizer in (ProteinTokenizer(), ByteTokenizer()):
                self.init_kwargs = {"tokenizer": tokenizer, "sequence_length": 12}
                self.run_preprocessor_test(
                    cls=preprocessor_class, init_kwargs=self.init_kwargs, input_data=data
                )
