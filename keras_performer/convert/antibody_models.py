"""Trained language models of antibodies that the Python package index carries."""

import argparse
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import keras_hub

from keras_performer.convert._tensor_files import as_arrays, read_torch
from keras_performer.convert.from_hugging_face import bert_tokenizer, import_model

_ANTIBERTY = "antiberty/trained_models"
_SAPIENS = "sapiens/models/v1"
_CHAINS = {"heavy": "checkpoint_vh.pt", "light": "checkpoint_vl.pt"}
# fairseq's names, and transformers'.
_RENAMED = (
    (r"^decoder\.sentence_encoder\.", "roberta."),
    (r"^roberta\.embed_(token|position)s\.", r"roberta.embeddings.\1_embeddings."),
    (r"\.token_embeddings\.", ".word_embeddings."),
    (r"^roberta\.emb_layer_norm\.", "roberta.embeddings.LayerNorm."),
    (r"^roberta\.layers\.", "roberta.encoder.layer."),
    (r"\.self_attn\.q_proj\.", ".attention.self.query."),
    (r"\.self_attn\.k_proj\.", ".attention.self.key."),
    (r"\.self_attn\.v_proj\.", ".attention.self.value."),
    (r"\.self_attn\.out_proj\.", ".attention.output.dense."),
    (r"\.self_attn_layer_norm\.", ".attention.output.LayerNorm."),
    (r"\.fc1\.", ".intermediate.dense."),
    (r"\.fc2\.", ".output.dense."),
    (r"\.final_layer_norm\.", ".output.LayerNorm."),
    (r"^decoder\.lm_head\.weight$", "lm_head.decoder.weight"),
    (r"^decoder\.lm_head\.", "lm_head."),
)


def from_antiberty(path: str | os.PathLike[str]) -> Any:
    """Import AntiBERTy, a BERT of 26 million parameters that learned 558 million antibodies.

    Get the weights (MIT licence) with `pip download --no-deps antiberty==0.1.3`; PyTorch must be
    installed to read them. Ids: `[PAD] [UNK] [CLS] [SEP] [MASK]` are 0 to 4, and the residues
    ACDEFGHIKLMNPQRSTVWY 5 to 24; up to 512 tokens with `[CLS]` and `[SEP]`. The preprocessor takes
    residues with spaces between them. The heads for species, chain and grafting, and the pooler
    that they read, are left out.

    **Args**
        path: The wheel, or a folder with what is in it.

    **Returns** An `ExactBertMaskedLM` with a preprocessor; see `from_hugging_face`.

    **Raises** As `from_hugging_face`.

    **Example**

    >>> model = from_antiberty("antiberty-0.1.3-py3-none-any.whl")  # doctest: +SKIP

    **Source** Ruffolo et al. 2021, arXiv 2112.07782.
    """
    folder = f"{_ANTIBERTY}/AntiBERTy_md_smooth"
    source = f"{os.fspath(path)}/{folder}/pytorch_model.bin"
    config = json.loads(_read(path, f"{folder}/config.json"))
    content = _read(path, f"{folder}/pytorch_model.bin")
    tensors = {
        name: array
        for name, array in as_arrays(read_torch(content, source), source).items()
        if not re.match(r"cls\.(species|chain|graft)\.", name)
    }
    vocabulary = _read(path, f"{_ANTIBERTY}/vocab.txt").decode().split()
    return import_model(tensors, config, source, bert_tokenizer(vocabulary, lowercase=False))


def from_sapiens(path: str | os.PathLike[str], chain: str = "heavy") -> Any:
    """Import Sapiens, a small RoBERTa of the variable domains of human antibodies.

    Get the weights (MIT licence) with `pip download --no-deps sapiens==1.0.2`; PyTorch must be
    installed to read them. Ids: `<s> <pad> </s> <unk>` are 0 to 3, the residues
    ACDEFGHIKLMNPQRSTVWY 4 to 23, `<mask>` is 24; up to 144 tokens with `<s>` and `</s>`. The
    preprocessor takes plain strings of these letters; sapiens itself reads X and * as `<mask>`.

    **Args**
        path: The wheel, or a folder with what is in it.
        chain: "heavy" or "light".

    **Returns** A `keras_hub.models.RobertaMaskedLM` with a preprocessor; see `from_hugging_face`.

    **Raises** As `from_hugging_face`.

    **Example**

    >>> model = from_sapiens("sapiens-1.0.2-py3-none-any.whl", "light")  # doctest: +SKIP

    **Source** Prihoda et al. 2022, doi 10.1080/19420862.2021.2020203.
    """
    if chain not in _CHAINS:
        raise ValueError(f"chain must be one of {', '.join(_CHAINS)}. Received: chain={chain!r}")
    source = f"{os.fspath(path)}/{_SAPIENS}/{_CHAINS[chain]}"
    content = _read(path, f"{_SAPIENS}/{_CHAINS[chain]}")
    # It keeps its settings in a namespace, which holds attributes and does nothing.
    checkpoint = read_torch(content, source, allowed=[argparse.Namespace])
    if not isinstance(checkpoint, dict) or not {"args", "model"} <= checkpoint.keys():
        raise ValueError(
            f"Expected a checkpoint of fairseq, with args and model. Received: {source}"
        )
    settings = vars(checkpoint["args"])
    tensors = {
        _renamed(name): array for name, array in as_arrays(checkpoint["model"], source).items()
    }
    residues = [
        line.split()[0] for line in _read(path, f"{_SAPIENS}/dict.txt").decode().splitlines()
    ]
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *residues, "<mask>"]
    config = {
        "model_type": "roberta",
        "vocab_size": len(tokens),
        "num_hidden_layers": settings["encoder_layers"],
        "num_attention_heads": settings["encoder_attention_heads"],
        "hidden_size": settings["encoder_embed_dim"],
        "intermediate_size": settings["encoder_ffn_embed_dim"],
        "hidden_act": settings["activation_fn"],
        "hidden_dropout_prob": settings["dropout"],
        "max_position_embeddings": settings["max_positions"] + 2,
        "type_vocab_size": 0,
    }
    # Every letter is a token. keras-hub wants a line of merges, and this is the first of any file.
    tokenizer = keras_hub.models.RobertaTokenizer(
        {token: i for i, token in enumerate(tokens)}, merges=["#version: 0.2"]
    )
    return import_model(tensors, config, source, tokenizer)


def _renamed(name: str) -> str:
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _read(path: str | os.PathLike[str], name: str) -> bytes:
    """A file of a wheel, or of the folder that it was unpacked to."""
    path = Path(path)
    if path.is_dir():
        return (path / name).read_bytes()
    if path.is_file() and not zipfile.is_zipfile(path):
        raise ValueError(f"Expected a wheel, which is a zip file, or a folder. Received: {path}")
    with zipfile.ZipFile(path) as wheel:
        if name not in wheel.namelist():
            raise FileNotFoundError(
                f"Expected {name} in the wheel, which other versions of the package lack. "
                f"Received: {path}"
            )
        return wheel.read(name)
