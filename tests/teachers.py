"""A small model of others, to be converted."""

import keras
import keras_hub
import numpy as np

LETTERS = "ACDEFG"
TOKENS = ["<s>", "<pad>", "</s>", "<unk>", *LETTERS, "<mask>"]


def save_teacher(folder, dropout):
    """Save a RoBERTa with a token for each letter, whose weights come from no backend."""
    keras.utils.set_random_seed(1)
    tokenizer = keras_hub.models.RobertaTokenizer(
        {token: i for i, token in enumerate(TOKENS)}, merges=["#version: 0.2"]
    )
    model = keras_hub.models.RobertaMaskedLM(
        keras_hub.models.RobertaBackbone(
            vocabulary_size=len(TOKENS),
            num_layers=1,
            num_heads=2,
            hidden_dim=6,
            intermediate_dim=7,
            dropout=dropout,
            max_sequence_length=16,
        ),
        keras_hub.models.RobertaMaskedLMPreprocessor(tokenizer, sequence_length=16),
    )
    rng = np.random.default_rng(2)
    model.set_weights([0.5 * rng.normal(size=w.shape) for w in model.get_weights()])
    model.save_to_preset(str(folder))
    return rng
