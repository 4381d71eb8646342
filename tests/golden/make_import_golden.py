"""Makes the golden arrays of imported models: state dicts, inputs and outputs of other libraries.

    pip install torch transformers==5.24.0 performer-pytorch==1.1.4
    pip download --no-deps antiberty==0.1.3 sapiens==1.0.2
    python tests/golden/make_import_golden.py --wheels FOLDER

performer-pytorch 1.1.4 came with local-attention 1.11.2 and axial-positional-embedding 0.3.12. It
takes half a minute. README.md says what each array is.
"""

import argparse
import io
import json
import pathlib
import zipfile
from typing import Any

import numpy as np
import torch
import transformers
from performer_pytorch import PerformerLM
from torch.nn import functional

NUM_SEQUENCES, LENGTH = 10, 17
KEPT = 4  # of the logits of small models, those at every fourth token are kept
# Variable domains of antibodies that are medicines: trastuzumab, adalimumab, rituximab,
# bevacizumab and cetuximab, each heavy and light.
ANTIBODIES = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC"
    "SRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPP"
    "TFGQGTKVEIK",
    "EVQLVESGGGLVQPGRSLRLSCAASGFTFDDYAMHWVRQAPGKGLEWVSAITWNSGHIDYADSVEGRFTISRDNAKNSLYLQMNSLRAEDTAVYYC"
    "AKVSYLSTASSLDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQGIRNYLAWYQQKPGKAPKLLIYAASTLQSGVPSRFSGSGSGTDFTLTISSLQPEDVATYYCQRYNRAPY"
    "TFGQGTKVEIK",
    "QVQLQQPGAELVKPGASVKMSCKASGYTFTSYNMHWVKQTPGRGLEWIGAIYPGNGDTSYNQKFKGKATLTADKSSSTAYMQLSSLTSEDSAVYYC"
    "ARSTYYGGDWYFNVWGAGTTVTVSA",
    "QIVLSQSPAILSASPGEKVTMTCRASSSVSYIHWFQQKPGSSPKPWIYATSNLASGVPVRFSGSGSGTSYSLTISRVEAEDAATYYCQQWTSNPPT"
    "FGGGTKLEIK",
    "EVQLVESGGGLVQPGGSLRLSCAASGYTFTNYGMNWVRQAPGKGLEWVGWINTYTGEPTYAADFKRRFTFSLDTSKSTAYLQMNSLRAEDTAVYYC"
    "AKYPHYYGSSHWYFDVWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCSASQDISNYLNWYQQKPGKAPKVLIYFTSSLHSGVPSRFSGSGSGTDFTLTISSLQPEDFATYYCQQYSTVPW"
    "TFGQGTKVEIK",
    "QVQLKQSGPGLVQPSQSLSITCTVSGFSLTNYGVHWVRQSPGKGLEWLGVIWSGGNTDYNTPFTSRLSINKDNSKSQVFFKMNSLQSNDTAIYYCA"
    "RALTYYDYEFAYWGQGTLVTVSA",
    "DILLTQSPVILSVSPGERVSFSCRASQSIGTNIHWYQQRTNGSPRLLIKYASESISGIPSRFSGSGSGTDFTLSINSVESEDIADYYCQQNNNWPT"
    "TFGAGTKLELK",
)
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
EVERY = 8  # of the logits of antibodies, those at every eighth token are kept
MASK_EVERY = 16  # and every sixteenth token is masked

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
TRANSFORMERS: dict[str, Any] = {
    "bert": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=23, max_position_embeddings=20, **SIZES)
    ),
    "roberta": lambda: transformers.RobertaForMaskedLM(
        transformers.RobertaConfig(
            vocab_size=23,
            max_position_embeddings=22,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
            **SIZES,
        )
    ),
    "esm": lambda: transformers.EsmForMaskedLM(
        transformers.EsmConfig(
            vocab_size=23,
            pad_token_id=1,
            mask_token_id=22,
            max_position_embeddings=40,
            position_embedding_type="rotary",
            layer_norm_eps=1e-5,
            emb_layer_norm_before=True,
            token_dropout=True,
            **SIZES,
        )
    ),
}
TINY = {
    "num_tokens": 11,
    "max_seq_len": 20,
    "dim": 12,
    "depth": 2,
    "heads": 2,
    "dim_head": 6,
    "nb_features": 8,
    "ff_mult": 2,
}
ABSOLUTE = {"rotary_position_emb": False}
PERFORMERS: dict[str, dict[str, Any]] = {
    "rotary_encoder": TINY,
    "rotary_decoder": {**TINY, "causal": True, "ff_glu": True, "tie_embed": True},
    "absolute_decoder": {**TINY, **ABSOLUTE, "causal": True, "qkv_bias": True},
    "axial_encoder": {
        **TINY,
        **ABSOLUTE,
        "axial_position_emb": True,
        "axial_position_shape": (4, 5),
        "ff_glu": True,
    },
    "scalenorm_encoder": {**TINY, "use_scalenorm": True, "shift_tokens": True},
    "scalenorm_decoder": {
        **TINY,
        "dim": 14,
        "use_scalenorm": True,
        "shift_tokens": True,
        "causal": True,
    },
    "rezero_encoder": {**TINY, "use_rezero": True, "generalized_attention": True},
    "reversible_decoder": {**TINY, "reversible": True, "causal": True, "attn_out_bias": True},
    # scBERT's options, layers and heads, at a twentieth of its width.
    "scbert": {
        **ABSOLUTE,
        "num_tokens": 7,
        "max_seq_len": 20,
        "dim": 10,
        "depth": 6,
        "heads": 10,
        "dim_head": 4,
        "ff_mult": 1,
        "attn_out_bias": True,
    },
}


def perturb(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Give every parameter a value of its own: biases and scales too, and no small ones.

    All, and the projections, are numbers of float16, which compress to half the size.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_((noise if parameter.ndim > 1 else parameter + noise).half())
        for name, buffer in model.named_buffers():
            if name.endswith("projection_matrix"):
                buffer.copy_(buffer.half())


def arrays_of(model: torch.nn.Module, config: dict[str, Any], ids: Any, logits: Any) -> Any:
    """The arrays of a file; the weights are one, since each array takes room of its own."""
    weights = {
        name: tensor.numpy()
        for name, tensor in model.state_dict().items()
        # performer-pytorch lists its blocks twice.
        if "proj_updater.instance" not in name
    }
    shapes = {name: array.shape for name, array in weights.items()}
    return {
        "shapes": np.array(json.dumps(shapes)),
        "weights": np.concatenate([array.ravel() for array in weights.values()]).astype("float32"),
        "config": np.array(json.dumps(config, sort_keys=True, default=str)),
        "token_ids": ids.numpy().astype("int32"),
        "logits": logits[:, ::KEPT].numpy(),
    }


def transformers_file(name: str) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    model = TRANSFORMERS[name]().eval()
    perturb(model, generator)
    # Ids below 2 are padding in some of them; 22 is the mask of ESM.
    ids = torch.randint(2, 22, (NUM_SEQUENCES, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    return arrays_of(model, model.config.to_dict(), ids, logits)


def performer_file(name: str) -> dict[str, np.ndarray]:
    config = PERFORMERS[name]
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = PerformerLM(**config).eval()
    perturb(model, generator)
    ids = torch.randint(config["num_tokens"], (NUM_SEQUENCES, LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(ids)
    return arrays_of(model, config, ids, logits)


def antibody_ids(tokens: list[str], start: str, end: str, mask: str) -> np.ndarray:
    """Ids of the antibodies (10, T), padded with -1, with every sixteenth token masked."""
    rows = [[start, *sequence, end] for sequence in ANTIBODIES]
    ids = np.full((len(rows), max(map(len, rows))), -1, "int64")
    for row, place in zip(rows, ids, strict=True):
        place[: len(row)] = [tokens.index(token) for token in row]
        place[MASK_EVERY : len(row) - 1 : MASK_EVERY] = tokens.index(mask)
    return ids


def antibody_arrays(ids: np.ndarray, run: Any) -> dict[str, np.ndarray]:
    logits = np.zeros((*ids[:, ::EVERY].shape, 25), "float32")
    with torch.no_grad():
        for row, place in zip(ids, logits, strict=True):
            output = run(torch.from_numpy(row[row >= 0])[None])[0, ::EVERY].numpy()
            place[: len(output)] = output
    return {"token_ids": ids.astype("int8"), "logits": logits}


def antiberty_file(wheel: zipfile.ZipFile) -> dict[str, np.ndarray]:
    folder = "antiberty/trained_models/AntiBERTy_md_smooth"
    config = json.loads(wheel.read(f"{folder}/config.json"))
    weights = torch.load(
        io.BytesIO(wheel.read(f"{folder}/pytorch_model.bin")), "cpu", weights_only=True
    )
    model = transformers.BertForMaskedLM(transformers.BertConfig(**config)).eval()
    missing, _ = model.load_state_dict(weights, strict=False)
    if missing:
        raise SystemExit(f"AntiBERTy lacks {missing}")
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *RESIDUES]
    ids = antibody_ids(tokens, "[CLS]", "[SEP]", "[MASK]")
    return antibody_arrays(ids, lambda x: model(x, attention_mask=torch.ones_like(x)).logits)


def sapiens_file(wheel: zipfile.ZipFile, checkpoint: str) -> dict[str, np.ndarray]:
    """By a plain forward pass over fairseq's names; fairseq itself has no Python 3.11 release."""
    content = io.BytesIO(wheel.read(f"sapiens/models/v1/{checkpoint}"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        weights = torch.load(content, "cpu", weights_only=True)["model"]
    encoder, head = "decoder.sentence_encoder", "decoder.lm_head"

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, scale.shape, scale, shift, eps=1e-5)

    def run(ids: torch.Tensor) -> torch.Tensor:
        x = weights[f"{encoder}.embed_tokens.weight"][ids]
        x = x + weights[f"{encoder}.embed_positions.weight"][2 : 2 + ids.shape[1]]
        x = norm(x, f"{encoder}.emb_layer_norm")
        for i in range(4):
            layer = f"{encoder}.layers.{i}"
            q, k, v = (
                linear(x, f"{layer}.self_attn.{part}_proj").unflatten(-1, (8, 16)).transpose(1, 2)
                for part in "qkv"
            )
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            y = linear(y, f"{layer}.self_attn.out_proj")
            x = norm(x + y, f"{layer}.self_attn_layer_norm")
            y = linear(functional.gelu(linear(x, f"{layer}.fc1")), f"{layer}.fc2")
            x = norm(x + y, f"{layer}.final_layer_norm")
        x = norm(functional.gelu(linear(x, f"{head}.dense")), f"{head}.layer_norm")
        return functional.linear(x, weights[f"{head}.weight"], weights[f"{head}.bias"])

    tokens = ["<s>", "<pad>", "</s>", "<unk>", *RESIDUES, "<mask>"]
    return antibody_arrays(antibody_ids(tokens, "<s>", "</s>", "<mask>"), run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheels", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    files = {name: transformers_file(name) for name in TRANSFORMERS}
    files |= {f"performer_pytorch_{name}": performer_file(name) for name in PERFORMERS}
    with zipfile.ZipFile(arguments.wheels / "antiberty-0.1.3-py3-none-any.whl") as wheel:
        files["antiberty"] = antiberty_file(wheel)
    with zipfile.ZipFile(arguments.wheels / "sapiens-1.0.2-py3-none-any.whl") as wheel:
        files["sapiens_heavy"] = sapiens_file(wheel, "checkpoint_vh.pt")
        files["sapiens_light"] = sapiens_file(wheel, "checkpoint_vl.pt")
    for name, arrays in files.items():
        path = pathlib.Path(__file__).parent / "imports" / f"{name}.npz"
        # NumPy's signature takes a keyword for one of its own, `allow_pickle`.
        np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
        print(f"wrote {path.name}: {path.stat().st_size / 1024:.0f} KiB, {len(arrays)} arrays")


if __name__ == "__main__":
    main()
