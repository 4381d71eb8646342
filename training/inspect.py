"""Look inside a preset: `python -m training.inspect PRESET`, and `--help` names the flags.

It reads a few sequences with a saved model and draws, as PNG files,

- `attention_<n>.png`: for each layer and head how softmax attention would weigh the keys, beside
  how the layer does, in blocks of tokens: a cell is the share of attention that the queries of its
  row give, on average, to the keys of its column, so every row sums to one;
- `health.png`: how well the features of each head stand in for softmax attention, as the callback
  `AttentionHealth` measures it, the mean over sequences;
- `predictions_<n>.png`: along a sequence, what a masked language model says of each token when it
  is masked, a causal one before it comes, or a token classifier of its state;
- `cost.png`: seconds of a forward pass over length, beside the same model with softmax attention.

The figures are in `inspection.json` too.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from keras_performer.presets import local_folder
from training.command import make_console, start_keras, write_json
from training.data.fasta import read_fasta
from training.data.padded_rows import bracket
from training.data.protein_sample import load_protein_sample
from training.results import predict_in_batches
from training.scores import log_probabilities
from training.timing import interleaved

# Keras chooses its backend when it is imported, so nothing that imports it stands up here.

# Cells along a side of an attention map.
BLOCKS = 64
# Rows of a map of predictions, of the most probable tokens; none is less probable on average than
# the least.
SHOWN_TOKENS = 25
LEAST_SHOWN = 1e-3
# Masked copies of a sequence that the model reads at a time.
BATCH_SIZE = 8
# Pairs of a query and a key that health looks at are the square of it.
HEALTH_TOKENS = 512
# Timings of a forward pass to take the median of.
ROUNDS = 3
HEALTH_TITLES = {
    "relative_variance": "relative variance of estimates\n(features suffice well below 1)",
    "effective_features": "effective features",
    "window_share": "share of attention within the window",
    "total_variation": "total variation from softmax\n(0 is equal, 1 is disjoint)",
}


class Predictions(NamedTuple):
    """What a model says along one sequence of L tokens.

    **Args**
        what: A phrase that names it.
        probabilities: Of each name, (L, C).
        names: Of the tokens or states.
        truth: The index (L,) of the true token; None for states, which are not known.
    """

    what: str
    probabilities: np.ndarray
    names: list[str]
    truth: np.ndarray | None

    @property
    def of_truth(self) -> np.ndarray | None:
        """The probability (L,) of the true token."""
        if self.truth is None:
            return None
        return np.take_along_axis(self.probabilities, self.truth[:, None], 1)[:, 0]

    @property
    def entropy(self) -> np.ndarray:
        """In bits, (L,)."""
        p = self.probabilities
        return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(-1)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Draw everything.

    **Args**
        argv: Command-line arguments. Default: those of the process.

    **Returns** What `inspection.json` holds.

    **Raises** SystemExit, with one sentence, if the arguments or the preset are not fit to be used.
    """
    console = make_console()
    arguments = parse_arguments(argv)

    # 1. Everything that can be wrong is found before anything is drawn.
    try:
        check_numbers(arguments)
        model, states = load_model(arguments.preset, arguments.backend)
        tokenizer = model.preprocessor.tokenizer
        sequences = read_sequences(arguments, tokenizer)
        rows = {name: token_row(text, model, arguments.length) for name, text in sequences.items()}
        output = arguments.output
        output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    results: dict[str, Any] = {"preset": arguments.preset, "task": type(model).__name__}

    # 2. Attention and health, from the queries and keys of every layer.
    from keras_performer.callbacks import layer_health

    health = []
    for number, (name, row) in enumerate(rows.items(), start=1):
        records = record_layers(model, row)
        maps = [attention_maps(record, BLOCKS) for record in records]
        save(
            draw_maps(maps, records, f"{name}, {len(row):,} tokens"), f"attention_{number}", output
        )
        health.append([layer_health(record, HEALTH_TOKENS) for record in records])
    results["health"] = mean_health(health)
    if any(results["health"]):
        save(draw_health(results["health"]), "health", output)
    else:
        console.print("No health.png: every layer has exact attention, and no features.")

    # 3. Predictions.
    results["sequences"] = []
    for number, (name, row) in enumerate(rows.items(), start=1):
        found = predict(model, row, states, arguments.groups)
        summary: dict[str, Any] = {"name": name, "tokens": len(row)}
        if found is not None:
            summary["mean_entropy"] = float(found.entropy.mean())
            if found.of_truth is not None:
                # In float64, so that what is nearly zero has a logarithm.
                cross_entropy = float(-np.log(found.of_truth).mean())
                summary["perplexity"] = math.exp(cross_entropy)
                summary["mean_probability"] = float(found.of_truth.mean())
            save(draw_predictions(found, name), f"predictions_{number}", output)
        results["sequences"].append(summary)

    # 4. Length against cost.
    results["cost"] = measure_cost(model.backbone, arguments.lengths)
    save(draw_cost(results["cost"], arguments.preset), "cost", output)
    write_json(output / "inspection.json", results)
    console.print(f"Wrote the pictures and inspection.json to {output}.")
    return results


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.inspect", description="Draw what a saved model does."
    )
    parser.add_argument("preset", metavar="PRESET", help="name or folder of a preset with a task")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--fasta", type=Path, help="sequences (default: the sample's held-out ones)"
    )
    source.add_argument("--text", type=Path, help="a text file, which is one sequence")
    parser.add_argument("--count", type=int, default=2, help="sequences of the FASTA (default: 2)")
    parser.add_argument(
        "--length", type=int, default=512,
        help="tokens of a sequence that are looked at, from its start (default: 512)",
    )  # fmt: skip
    parser.add_argument(
        "--groups", type=int, default=8,
        help="a masked language model reads a sequence so many times, each time with every such "
        "token masked; 0 masks one token at a time (default: 8)",
    )  # fmt: skip
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048],
        help="at which a forward pass is timed (default: 256 512 1024 2048)",
    )  # fmt: skip
    parser.add_argument("--backend", choices=("tensorflow", "jax", "torch"), help="Keras backend")
    output = Path("runs") / "inspect"
    parser.add_argument("--output", type=Path, default=output, help=f"folder (default: {output})")
    return parser.parse_args(argv)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Raise ValueError for a number that cannot be."""
    for flag, value, least in (
        ("--count", arguments.count, 1),
        ("--length", arguments.length, 4),
        ("--groups", arguments.groups, 0),
        ("--lengths", min(arguments.lengths), 1),
    ):
        if value < least:
            raise ValueError(f"{flag} must be at least {least}. Received: {value}")


def load_model(preset: str, backend: str | None) -> tuple[Any, list[str] | None]:
    """Return a preset's task in float32, and the names of a classifier's classes, if on record."""
    folder = local_folder(preset)
    if not (folder / "task.json").is_file():
        raise ValueError(
            f"{folder} holds no task (task.json): pass what `save_to_preset` of a language model "
            "or a classifier wrote."
        )
    name = json.loads((folder / "task.json").read_text(encoding="utf-8"))["class_name"]
    start_keras(backend, seed=0)
    from keras_performer import models

    classes = {
        "PerformerMaskedLM": models.PerformerMaskedLM,
        "PerformerCausalLM": models.PerformerCausalLM,
        "PerformerTokenClassifier": models.PerformerTokenClassifier,
        "PerformerSequenceClassifier": models.PerformerSequenceClassifier,
    }
    # Classifiers on a decoder have a class of their own, which the one on an encoder loads.
    task_class = classes.get(name.replace("PerformerDecoder", "Performer"))
    if task_class is None:
        raise ValueError(
            f"Presets of {', '.join(classes)} of keras_performer.models can be looked at. "
            f"Received: {folder}, which holds a {name}"
        )
    model = task_class.from_preset(str(folder), dtype="float32")
    if model.preprocessor is None:
        raise ValueError(
            f"The preset has no tokenizer, so it cannot read a sequence. Received: {folder}"
        )
    record = folder / "classes.json"
    states = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    return model, states


def read_sequences(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, str]:
    """Return the sequences to look at, by name."""
    from keras_performer.models import ProteinTokenizer

    is_protein = isinstance(tokenizer, ProteinTokenizer)
    if arguments.text is not None:
        if is_protein:
            raise ValueError(
                f"This model reads proteins: pass --fasta. Received: --text {arguments.text}"
            )
        if not arguments.text.is_file():
            raise FileNotFoundError(f"{arguments.text}: there is no such file.")
        text = arguments.text.read_text(encoding="utf-8")
        if not text:
            raise ValueError(f"{arguments.text}: the file is empty.")
        return {arguments.text.name: text}
    if arguments.fasta is not None:
        proteins = read_fasta(arguments.fasta)
    elif is_protein:
        _, proteins = load_protein_sample()
    else:
        raise ValueError("This model does not read proteins: pass --text, or --fasta for DNA.")
    return {
        f"{number}. {protein.name}": protein.sequence
        for number, protein in enumerate(proteins[: arguments.count], start=1)
    }


def token_row(text: str, model: Any, length: int) -> np.ndarray:
    """Return the token ids (T,) of the start of a text, with the special tokens around it."""
    tokenizer = model.preprocessor.tokenizer
    tokens = np.asarray(tokenizer.tokenize(text), "int32")
    if not len(tokens):
        raise ValueError(f"The tokenizer makes no token of a sequence. Received: {text[:60]!r}")
    longest = model.backbone.max_sequence_length or length
    return bracket(tokens[: min(length, longest) - 2], tokenizer).astype("int32")


def inputs_of(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the inputs of a backbone for rows (B, T) without padding."""
    return {"token_ids": rows, "padding_mask": np.ones_like(rows)}


def record_layers(model: Any, row: np.ndarray) -> list[Any]:
    """Return the `AttentionRecord` of each layer for one sequence."""
    from keras_performer.layers import record_attention

    with record_attention() as records:
        model.backbone(inputs_of(row[None]), training=False)
    return records


def attention_maps(record: Any, num_blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Return how softmax attention, and how the layer, weigh the keys, in blocks of tokens.

    The weights are read off the attention's outputs for values that say which block a key is in, so
    they are those that the layer's own code applies, in its time and memory.

    **Args**
        record: An `AttentionRecord` of one sequence of T tokens.
        num_blocks: At most so many blocks D, of one length but for the last.

    **Returns** Two arrays (N, D, D): mean over the queries of a block (row) of the weight that the
    keys of a block (column) have together.
    """
    from keras import ops

    from keras_performer.ops import favor_attention, softmax_attention

    query, key, layer = record.query, record.key, record.layer
    length, key_heads = key.shape[1:3]
    size = -(-length // num_blocks)
    blocks = np.eye(-(-length // size), dtype="float32")[np.arange(length) // size]
    value = ops.convert_to_tensor(np.repeat(blocks[None, :, None], key_heads, axis=2))
    options = {
        "causal": record.causal,
        "key_mask": record.key_mask,
        "segment_ids": record.segment_ids,
    }
    exact = softmax_attention(query, key, value, **options)
    if layer.feature_map is not None:
        own = favor_attention(query, key, value, layer.feature_map, **options, **layer.near_field())
    else:
        own = softmax_attention(query, key, value, sliding_window=layer.sliding_window, **options)
    average = (blocks / blocks.sum(0)).T
    found = (ops.convert_to_numpy(weights)[0] for weights in (exact, own))
    by_head, own_by_head = (np.einsum("dt,tne->nde", average, weights) for weights in found)
    return by_head, own_by_head


def mean_health(health: list[list[dict[str, np.ndarray]]]) -> list[dict[str, list[float]]]:
    """Return the mean over sequences of each figure, a list over heads, for each layer."""
    return [
        {
            name: np.mean([layer[name] for layer in layers], axis=0).tolist()
            for name in HEALTH_TITLES
            if name in layers[0]
        }
        for layers in zip(*health, strict=True)
    ]


def predict(
    model: Any, row: np.ndarray, states: list[str] | None, groups: int
) -> Predictions | None:
    """Return what a model says along a sequence; None for a classifier of sequences.

    **Args**
        model: A task.
        row: Token ids (T,) with one special token at each end, of which nothing is said.
        states: Names of the classes of a token classifier. Default: their numbers.
        groups: As the flag `--groups`.
    """
    import keras

    from keras_performer import models

    tokenizer = model.preprocessor.tokenizer
    inner = slice(1, -1)
    # The task itself takes strings.
    trainer = keras.Model(model.input, model.output)
    if isinstance(model, models.PerformerTokenClassifier):
        logits = trainer.predict_on_batch(inputs_of(row[None]))[0][inner]
        names = states or [str(number) for number in range(logits.shape[-1])]
        return Predictions("states", np.exp(log_probabilities(logits)), names, None)
    names = [token_name(tokenizer, index) for index in range(model.backbone.vocabulary_size)]
    if isinstance(model, models.PerformerCausalLM):
        logits = trainer.predict_on_batch(inputs_of(row[None]))[0][:-2]
        return Predictions("next token", np.exp(log_probabilities(logits)), names, row[inner])
    if isinstance(model, models.PerformerMaskedLM):
        logits = masked_logits(trainer, row, tokenizer.mask_token_id, groups)
        return Predictions("masked token", np.exp(log_probabilities(logits)), names, row[inner])
    return None


def masked_logits(trainer: Any, row: np.ndarray, mask_id: int, groups: int) -> np.ndarray:
    """Return the logits (T - 2, vocabulary) of every inner token while it is masked.

    In copy g of the sequence the tokens g, g + `groups`, ... are masked; 0 masks one in each copy.
    """
    length = len(row) - 2
    groups = min(groups or length, length)
    # Places of each copy, filled up with 0, the start token, whose logits are not used.
    places = np.zeros((groups, -(-length // groups)), "int32")
    places.T.flat[:length] = np.arange(1, length + 1)

    def make_inputs(copies: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.repeat(row[None], len(copies), axis=0)
        np.put_along_axis(rows, places[copies], mask_id, axis=1)
        rows[:, 0] = row[0]
        return {**inputs_of(rows), "mask_positions": places[copies]}

    by_copy: dict[int, np.ndarray] = {}
    for copies, outputs in predict_in_batches(trainer, [length] * groups, make_inputs, BATCH_SIZE):
        by_copy.update(zip(copies.tolist(), outputs, strict=True))
    stacked = np.stack([by_copy[copy] for copy in range(groups)], axis=1)
    return stacked.reshape(-1, stacked.shape[-1])[:length]


def token_name(tokenizer: Any, index: int) -> str:
    """Return a token as a short label that can be drawn."""
    if index >= tokenizer.vocabulary_size():
        return str(index)
    name = tokenizer.id_to_token(index)
    byte = re.fullmatch("<0x([0-9A-F]{2})>", name)
    character = chr(int(byte[1], 16)) if byte else name
    return character if character.isascii() and character.isprintable() else ascii(name)[1:-1]


def measure_cost(backbone: Any, lengths: Sequence[int]) -> dict[str, Any]:
    """Return seconds of a forward pass at each length, of the model and with softmax attention.

    A model with learned positions is timed up to its longest length.
    """
    import keras

    longest = backbone.max_sequence_length or max(lengths)
    lengths = sorted({min(length, longest) for length in lengths})
    bodies = {backbone.attention: backbone}
    if backbone.attention != "softmax":
        config = {**backbone.get_config(), "attention": "softmax", "sliding_window": None}
        bodies["softmax"] = type(backbone).from_config(config)
    models = {name: keras.Model(body.input, body.output) for name, body in bodies.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for length in lengths:
        x = inputs_of(np.full((1, length), 5, "int32"))
        runs = {name: lambda m=model, x=x: m.predict_on_batch(x) for name, model in models.items()}
        for name, found in interleaved(runs, ROUNDS).items():
            seconds[name].append(found)
    return {"lengths": lengths, "seconds": seconds}


def save(figure: Figure, name: str, output: Path) -> None:
    """Write a figure as PNG."""
    figure.savefig(output / f"{name}.png", dpi=100)


def draw_maps(
    maps: Sequence[tuple[np.ndarray, np.ndarray]], records: Sequence[Any], title: str
) -> Figure:
    """Draw the two maps of each layer (row) and head (pair of columns)."""
    num_heads = len(maps[0][0])
    figure = Figure(figsize=(4.4 * num_heads + 0.6, 2.4 * len(maps) + 0.9), layout="constrained")
    panels = figure.subplots(len(maps), 2 * num_heads, squeeze=False)
    edge = 1.0
    for number, (pair, record) in enumerate(zip(maps, records, strict=True)):
        edge = record.key.shape[1]
        for head in range(num_heads):
            both = [by_head[head] for by_head in pair]
            # One scale for the two, which some very large cells do not decide. By the square root,
            # so that the even shares of one show beside the peaks of the other.
            top = max(float(np.quantile(cells, 0.995)) for cells in both)
            for column, (cells, name) in enumerate(zip(both, ("softmax", "layer"), strict=True)):
                panel = panels[number, 2 * head + column]
                panel.imshow(
                    cells,
                    norm=PowerNorm(0.5, vmin=0, vmax=top),
                    cmap="magma",
                    extent=(0, edge, edge, 0),
                    interpolation="nearest",
                )
                panel.set_title(f"layer {number}, head {head}: {name}", fontsize=8)
                panel.tick_params(labelsize=6)
                panel.label_outer()
    figure.suptitle(f"{title}: attention of queries (down) to keys (across)", fontsize=10)
    return figure


def draw_health(health: Sequence[dict[str, list[float]]]) -> Figure:
    """Draw a panel for each figure, with a cell for each layer and head."""
    names = [name for name in HEALTH_TITLES if any(name in layer for layer in health)]
    num_heads = max(len(values) for layer in health for values in layer.values())
    width = max(3.2, 0.75 * num_heads + 1.2)
    size = (width * len(names), max(2.6, 0.5 * len(health) + 1.6))
    figure = Figure(figsize=size, layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        cells = np.full((len(health), num_heads), np.nan)
        for number, layer in enumerate(health):
            if name in layer:
                cells[number] = layer[name]
        shown = np.log10(np.maximum(cells, 1e-3)) if name == "relative_variance" else cells
        shown = np.where(np.isfinite(shown), shown, np.nan)
        low, high = (-2.0, 2.0) if name == "relative_variance" else (0.0, 1.0)
        if name == "effective_features":
            high = float(np.nanmax(shown))
        colors = "viridis" if name in ("effective_features", "window_share") else "viridis_r"
        image = panel.imshow(shown, vmin=low, vmax=high, cmap=colors, aspect="auto")
        for (number, head), value in np.ndenumerate(cells):
            color = image.cmap(image.norm(shown[number, head]))
            dark = sum(color[:3]) < 1.5
            panel.text(
                head, number, f"{value:.2g}", ha="center", va="center", fontsize=8,
                color="white" if dark else "black",
            )  # fmt: skip
        panel.set(xlabel="head", ylabel="layer", xticks=range(num_heads), yticks=range(len(health)))
        panel.set_title(HEALTH_TITLES[name], fontsize=9)
    return figure


def draw_predictions(found: Predictions, name: str) -> Figure:
    """Draw the probabilities along a sequence, that of the true token, and the entropy."""
    length = len(found.probabilities)
    mean = found.probabilities.mean(0)
    rows = np.sort(np.argsort(-mean, kind="stable")[:SHOWN_TOKENS])
    likely = mean[rows] >= LEAST_SHOWN
    rows = rows[likely] if likely.any() else rows
    of_truth = found.of_truth
    heights = [0.22 * len(rows) + 0.6, *[1.6] * (2 if of_truth is not None else 1)]
    figure = Figure(figsize=(16, sum(heights) + 0.9), layout="constrained")
    panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    extent = (0.5, length + 0.5, len(rows) - 0.5, -0.5)
    image = panels[0].imshow(
        found.probabilities[:, rows].T, aspect="auto", cmap="Blues", vmin=0, extent=extent,
        interpolation="nearest",
    )  # fmt: skip
    figure.colorbar(image, ax=panels[0], label="probability", pad=0.005)
    panels[0].set_yticks(range(len(rows)), [found.names[row] for row in rows], fontsize=8)
    marked, label = found.probabilities.argmax(-1), "most probable"
    if found.truth is not None:
        marked, label = found.truth, "true"
    place_of_row = {row: place for place, row in enumerate(rows.tolist())}
    dots = [(i + 1, place_of_row[m]) for i, m in enumerate(marked.tolist()) if m in place_of_row]
    if dots:
        panels[0].plot(*zip(*dots, strict=True), ".", color="C3", markersize=3, label=label)
        panels[0].legend(loc="upper right", fontsize=8)
    places = np.arange(1, length + 1)
    if of_truth is not None:
        panels[1].bar(places, of_truth, width=1.0, color="C0")
        panels[1].axhline(of_truth.mean(), color="C3", label=f"mean {of_truth.mean():.3g}")
        panels[1].set(ylabel="probability\nof the true token")
        panels[1].legend(loc="upper right", fontsize=8)
    panels[-1].step(places, found.entropy, where="mid", color="C0", linewidth=0.8)
    if len(rows) < SHOWN_TOKENS:
        # Rows that are not shown would make it more.
        label = f"{len(rows)} equally probable"
        panels[-1].axhline(math.log2(len(rows)), color="gray", linestyle=":", label=label)
        panels[-1].legend(loc="lower right", fontsize=8)
    panels[-1].set(ylabel="entropy in bits", xlabel="place", xlim=extent[:2])
    figure.suptitle(f"{name}: {found.what}")
    return figure


def draw_cost(cost: dict[str, Any], title: str) -> Figure:
    """Draw seconds of a forward pass over length."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for name, seconds in cost["seconds"].items():
        panel.loglog(cost["lengths"], seconds, "o-", label=name)
    panel.set_xticks(cost["lengths"], [f"{length:,}" for length in cost["lengths"]])
    panel.xaxis.minorticks_off()
    panel.set(xlabel="tokens", ylabel="seconds", title=f"Forward pass of {title}, one sequence")
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    return figure


if __name__ == "__main__":
    main()
