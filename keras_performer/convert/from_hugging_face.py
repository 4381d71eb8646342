"""BERT, RoBERTa and ESM checkpoints in the format of Hugging Face transformers."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras_hub
import numpy as np

from keras_performer.convert._tensor_files import read_sharded_tensors, read_tensors
from keras_performer.convert._weight_transfer import WeightTransfer
from keras_performer.convert.exact_bert_backbone import ExactBertBackbone
from keras_performer.convert.exact_bert_masked_lm import ExactBertMaskedLM

_FILES = ("model.safetensors", "pytorch_model.bin")
# A large checkpoint is in several files, which an index names.
_READERS = {
    **{name: read_tensors for name in _FILES},
    **{f"{name}.index.json": read_sharded_tensors for name in _FILES},
}
_NEEDED = (
    "vocab_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
)
# Of ESM, in training: the share of tokens that was chosen, times that of them that was masked.
_ESM_MASKED = 0.15 * 0.8


def from_hugging_face(folder: str | os.PathLike[str]) -> Any:
    """Import a BERT, RoBERTa or ESM checkpoint from a local folder.

    The folder holds `config.json` and `model.safetensors` or `pytorch_model.bin` (for which PyTorch
    must be installed), or the index of several such files and the files. With a masked-LM head the
    result is a masked-LM task that `performerize` takes; its inputs are `token_ids` (B, T),
    `padding_mask` (B, T), but for ESM, and `mask_positions` (B, P), its outputs logits (B, P,
    vocabulary). Without a head it is the backbone. In inference outputs are those of the source, to
    rounding.

    | model_type | task and backbone |
    |---|---|
    | bert | `ExactBertMaskedLM` and `ExactBertBackbone`, BERT's encoder |
    | roberta | `keras_hub.models.RobertaMaskedLM` and `RobertaBackbone` |
    | esm | `keras_hub.models.ESMMaskedPLM` and `ESMBackbone` |

    What these have no place for is left out: BERT's pooler, next-sentence head and second segment
    (the embedding of the first one becomes part of the positions), RoBERTa's pooler, ESM's contact
    head and pooler. ESM-2 rescales the embeddings of each row by its share of mask tokens; here the
    factor is that of a row without any, 0.88, and a mask token embeds as zero, as there. A row of
    which a share r is masked would have been scaled by another 1/(1 - r).

    The task has a preprocessor if the folder has the vocabulary (`vocab.txt`, or `vocab.json` and
    `merges.txt`). Models of single residues under BERT or ESM take strings with spaces,
    `" ".join(sequence)`.

    **Args**
        folder: The folder. Nothing is downloaded.

    **Returns** A keras-hub task or backbone.

    **Raises** OSError for a file that is missing; ImportError for a PyTorch file without PyTorch;
    ValueError for another architecture or option, for files that are not plain tensors, and for
    tensors that are missing, unknown or misshaped, which it names.

    **Example**

    >>> model = from_hugging_face("my_esm_folder")  # doctest: +SKIP
    >>> performer = keras_performer.convert.performerize(model)  # doctest: +SKIP

    **Source** Devlin et al. 2018, arXiv 1810.04805; Liu et al. 2019, arXiv 1907.11692; Lin et al.
    2023, doi 10.1126/science.ade2574.
    """
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = next((name for name in _READERS if (folder / name).is_file()), None)
    if name is None:
        raise FileNotFoundError(
            f"Expected one of {', '.join(_READERS)} in {folder}. Received: none"
        )
    tensors = _READERS[name](folder / name)
    return import_model(tensors, config, str(folder / name), _tokenizer(folder, config))


def import_model(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], source: str, tokenizer: Any
) -> Any:
    """Make the model of a configuration and the tensors of a checkpoint, by their names there."""
    kind = config.get("model_type")
    if kind not in _IMPORTS:
        raise ValueError(
            f"from_hugging_face takes models of the types {', '.join(_IMPORTS)}; for others, try "
            "`keras_hub.models.Backbone.from_preset(folder)`. Received: model_type="
            f"{kind!r} in {source}"
        )
    needed = (*_NEEDED, *(("pad_token_id", "mask_token_id") if kind == "esm" else ()))
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(f"The configuration lacks {', '.join(missing)}. Received: {source}")
    # TensorFlow's checkpoints, converted, keep its names.
    old = {".gamma": ".weight", ".beta": ".bias"}
    named = {}
    for name, array in tensors.items():
        ending = next((e for e in old if name.endswith(f"LayerNorm{e}")), None)
        named[name.removesuffix(ending) + old[ending] if ending else name] = array
    weights = WeightTransfer(
        {n: a.astype("float32") if a.dtype.kind == "f" else a for n, a in named.items()}, source
    )
    weights.leave(r".*\.position_ids", r".*\.inv_freq")
    model = _IMPORTS[kind](weights, dict(config), tokenizer)
    weights.finish(model)
    return model


def _tokenizer(folder: Path, config: Mapping[str, Any]) -> Any:
    """The tokenizer of the vocabulary in the folder, or None."""
    if config.get("model_type") == "roberta":
        paths = [folder / name for name in ("vocab.json", "merges.txt")]
        if not all(path.is_file() for path in paths):
            return None
        return keras_hub.models.RobertaTokenizer(*map(str, paths))
    path = folder / "vocab.txt"
    if not path.is_file():
        return None
    # Not `splitlines`: some tokens are characters that it takes for the end of a line.
    tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if config.get("model_type") == "esm":
        return keras_hub.models.ESMTokenizer(tokens, special_tokens_in_strings=True)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    # These are the defaults of transformers, with the file or without it.
    lowercase = settings.get("do_lower_case", True)
    strip_accents = settings.get("strip_accents")
    return bert_tokenizer(
        tokens, lowercase, strip_accents=lowercase if strip_accents is None else strip_accents
    )


def bert_tokenizer(tokens: Sequence[str], lowercase: bool, *, strip_accents: bool = False) -> Any:
    """The WordPiece tokenizer of `ExactBertMaskedLM`."""
    return keras_hub.models.DistilBertTokenizer(
        list(tokens),
        lowercase=lowercase,
        strip_accents=strip_accents,
        special_tokens_in_strings=True,
    )


def _options(config: dict[str, Any], expected: dict[str, Any], num_positions: int) -> dict:
    """The arguments of a backbone; `expected` are options that it has no argument for."""
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"keras-hub's model for model_type={config['model_type']!r} has "
                f"{name}={value!r}. Received: {name}={config[name]!r}"
            )
    return {
        "vocabulary_size": config["vocab_size"],
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "hidden_dim": config["hidden_size"],
        "intermediate_dim": config["intermediate_size"],
        "dropout": config.get("hidden_dropout_prob", 0.1),
        "max_sequence_length": num_positions,
    }


# Both take no other, and these are their defaults.
_COMMON = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
}


def _import_bert(weights: WeightTransfer, config: dict[str, Any], tokenizer: Any) -> Any:
    options = _options(
        config, {**_COMMON, "layer_norm_eps": 1e-12}, config["max_position_embeddings"]
    )
    backbone = ExactBertBackbone(**options)
    weights.leave(r"(bert\.)?pooler\..*", r"cls\.seq_relationship\..*")
    table = _import_encoder(weights, config, backbone, "bert", 0)
    if "cls.predictions.bias" not in weights:
        return backbone
    preprocessor = tokenizer and keras_hub.models.DistilBertMaskedLMPreprocessor(
        tokenizer, sequence_length=options["max_sequence_length"]
    )
    task = ExactBertMaskedLM(backbone, preprocessor)
    head = "cls.predictions"
    bias = _import_head(
        weights, task, f"{head}.transform.dense", f"{head}.transform.LayerNorm", f"{head}.bias"
    )
    weights.take_copy(f"{head}.decoder.weight", table)
    weights.take_copy(f"{head}.decoder.bias", bias)
    return task


def _import_roberta(weights: WeightTransfer, config: dict[str, Any], tokenizer: Any) -> Any:
    # The positions of tokens begin after that of padding.
    offset = config.get("pad_token_id", 1) + 1
    options = _options(
        config,
        {**_COMMON, "layer_norm_eps": 1e-5, "pad_token_id": 1},
        config["max_position_embeddings"] - offset,
    )
    backbone = keras_hub.models.RobertaBackbone(**options)
    weights.leave(r"(roberta\.)?pooler\..*")
    table = _import_encoder(weights, config, backbone, "roberta", offset)
    if "lm_head.bias" not in weights:
        return backbone
    preprocessor = tokenizer and keras_hub.models.RobertaMaskedLMPreprocessor(
        tokenizer, sequence_length=options["max_sequence_length"]
    )
    task = keras_hub.models.RobertaMaskedLM(backbone, preprocessor)
    bias = _import_head(weights, task, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
    weights.take_copy("lm_head.decoder.weight", table)
    weights.take_copy("lm_head.decoder.bias", bias)
    return task


def _import_encoder(
    weights: WeightTransfer, config: dict[str, Any], backbone: Any, name: str, offset: int
) -> np.ndarray:
    """Fill a BERT-like backbone of keras-hub; return its token embeddings."""
    prefix = f"{name}." if f"{name}.embeddings.word_embeddings.weight" in weights else ""
    width = config["hidden_size"]
    embeddings = f"{prefix}embeddings"
    table = weights.move(
        f"{embeddings}.word_embeddings.weight", backbone.token_embedding.embeddings
    )
    positions = weights.take(
        f"{embeddings}.position_embeddings.weight", (config["max_position_embeddings"], width)
    )[offset:]
    if config.get("type_vocab_size", 2):
        segments = weights.take(
            f"{embeddings}.token_type_embeddings.weight", (config.get("type_vocab_size", 2), width)
        )
        positions = positions + segments[0]
    weights.assign(backbone.embeddings.position_embedding.position_embeddings, positions)
    weights.norm(f"{embeddings}.LayerNorm", backbone.embeddings_layer_norm)
    for i, layer in enumerate(backbone.transformer_layers):
        block = f"{prefix}encoder.layer.{i}"
        attention = layer._self_attention_layer
        for part in ("query", "key", "value"):
            weights.dense(f"{block}.attention.self.{part}", getattr(attention, f"{part}_dense"))
        weights.dense(f"{block}.attention.output.dense", attention.output_dense, num_inputs=2)
        weights.norm(f"{block}.attention.output.LayerNorm", layer._self_attention_layer_norm)
        weights.dense(f"{block}.intermediate.dense", layer._feedforward_intermediate_dense)
        weights.dense(f"{block}.output.dense", layer._feedforward_output_dense)
        weights.norm(f"{block}.output.LayerNorm", layer._feedforward_layer_norm)
    return table


def _import_head(
    weights: WeightTransfer, task: Any, dense: str, norm: str, bias: str
) -> np.ndarray:
    """Fill a masked-LM head, but for a matrix of its own; return its bias."""
    head = task.masked_lm_head
    weights.dense(dense, head._intermediate_dense)
    weights.norm(norm, head._intermediate_layer_norm)
    return weights.move(bias, head._bias)


def _import_esm(weights: WeightTransfer, config: dict[str, Any], tokenizer: Any) -> Any:
    options = _options(
        config,
        {"hidden_act": "gelu", "position_embedding_type": "rotary", "is_folding_model": False},
        config["max_position_embeddings"],
    )
    backbone = keras_hub.models.ESMBackbone(
        **options,
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
        use_pre_layer_norm=bool(config.get("emb_layer_norm_before")),
        pad_token_id=config["pad_token_id"],
    )
    weights.leave(r"esm\.contact_head\..*", r"(esm\.)?pooler\..*")
    prefix = "esm." if "esm.embeddings.word_embeddings.weight" in weights else ""
    weights.leave(re.escape(f"{prefix}embeddings.position_embeddings.weight"))
    table = weights.take(
        f"{prefix}embeddings.word_embeddings.weight", (config["vocab_size"], config["hidden_size"])
    )
    inputs = table
    if config.get("token_dropout"):
        inputs = table * np.float32(1 - _ESM_MASKED)
        inputs[config["mask_token_id"]] = 0
    weights.assign(backbone.token_embedding.embeddings, inputs)
    if config.get("emb_layer_norm_before"):
        weights.norm(f"{prefix}embeddings.layer_norm", backbone.emb_layer_norm)
    for i, layer in enumerate(backbone.transformer_layers):
        block = f"{prefix}encoder.layer.{i}"
        for part in ("query", "key", "value"):
            dense = getattr(layer.attention_layer, f"{part[0]}_dense")
            weights.dense(f"{block}.attention.self.{part}", dense)
        weights.dense(f"{block}.attention.output.dense", layer.attention_layer.o_dense)
        weights.norm(f"{block}.attention.LayerNorm", layer.attention_norm)
        weights.dense(f"{block}.intermediate.dense", layer.feedforward_intermediate_dense)
        weights.dense(f"{block}.output.dense", layer.feedforward_output_dense)
        weights.norm(f"{block}.LayerNorm", layer.feedforward_norm)
    weights.norm(f"{prefix}encoder.emb_layer_norm_after", backbone.output_layer_norm)
    if "lm_head.bias" not in weights:
        return backbone
    preprocessor = tokenizer and keras_hub.models.ESMMaskedPLMPreprocessor(
        tokenizer, sequence_length=options["max_sequence_length"]
    )
    task = keras_hub.models.ESMMaskedPLM(backbone, preprocessor)
    _import_head(weights, task, "lm_head.dense", "lm_head.layer_norm", "lm_head.bias")
    # keras-hub does not tie this matrix to the embeddings; where the checkpoint leaves it out,
    # they are tied.
    matrix = table
    if "lm_head.decoder.weight" in weights:
        matrix = weights.take("lm_head.decoder.weight", table.shape)
    weights.assign(task.masked_lm_head._kernel, matrix.T)
    return task


_IMPORTS = {"bert": _import_bert, "roberta": _import_roberta, "esm": _import_esm}
