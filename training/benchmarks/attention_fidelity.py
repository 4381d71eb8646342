"""How far attention through features is from exact softmax attention.

Run `python -m training.benchmarks.attention_fidelity` (`KERAS_BACKEND` chooses the backend). It
prints tables and writes `metrics.json` and `fidelity.png`. Queries and keys are drawn with head
size 64, or are those of AntiBERTy, a trained softmax Transformer. Errors are means over seeds, each
with a projection of its own and on synthetic data a draw of its own, with their standard errors:

- `total_variation` between two rows of attention weights, half the sum of |a - p|, the mean over
  rows. 0 is the same row; 1 is no key in common.
- `output` is the root mean square of the error of the outputs, relative to that of softmax
  attention's outputs. 1 is as far away as zeros are.
- `kernel` is the root mean square of phi(q).phi(k) / exp(q.k / sqrt(H)) - 1 over all pairs, for
  maps that are unbiased.

The norm of a data set is the mean of |q'|^2 = |q|^2 / sqrt(H), the same for keys; unit Gaussian
queries have sqrt(H), which is 8 here.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table

from keras_performer.convert import performerize
from keras_performer.feature_maps import FavorPlus, FavorPlusPlus, FeatureMap, Trigonometric
from keras_performer.layers import attention_layers
from keras_performer.ops import favor_attention, softmax_weights
from training.command import make_console
from training.converted import load_model
from training.data.padded_rows import bracket, pad_rows
from training.data.protein_sample import load_protein_sample
from training.scores import mean_and_error

MAPS: dict[str, Callable[[int, int], FeatureMap]] = {
    "FAVOR+, iid": lambda m, seed: FavorPlus(m, projection="iid", seed=seed),
    "FAVOR+": lambda m, seed: FavorPlus(m, seed=seed),
    "hyperbolic": lambda m, seed: FavorPlus(m, hyperbolic=True, seed=seed),
    "regularised": lambda m, seed: FavorPlus(m, regularized=True, seed=seed),
    "simplex": lambda m, seed: FavorPlus(m, projection="simplex", seed=seed),
    "FAVOR++": lambda m, seed: FavorPlusPlus(m, seed=seed),
    "balanced FAVOR++": lambda m, seed: FavorPlusPlus(m, balanced=True, seed=seed),
    "trigonometric, iid": lambda m, seed: Trigonometric(m, projection="iid", seed=seed),
    "trigonometric": lambda m, seed: Trigonometric(m, seed=seed),
}
"""By name, made from M and a seed; projections are orthogonal where the name does not say."""

WINDOWS = {16: "--", 64: "-."}
"""The exact windows, and how lines of the figure show them."""

WINDOWED = ("FAVOR+", "FAVOR++", "balanced FAVOR++")
BIASED = ("regularised",)
MEAN = "plain mean"
TITLES = {
    "total_variation": "Total variation of attention weights",
    "output": "Relative error of outputs",
    "kernel": "Relative error of kernel entries",
}
# NumPy's generator of one seed would draw the same numbers for data and projection.
OTHER_DATA = 10_000
PROJECTIONS = 20_000
CORRELATION = 0.95

# Of the proteins that AntiBERTy reads: it is cut to 512 tokens.
PROTEIN_LENGTH = 512
# Variable domains: the examples of the documentation of AntiBERTy, and of Sapiens.
ANTIBODIES = (
    "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNYAQKFQERVTITRDMSTSTAYMELSSLRSEDTAVYYC"
    "AAPYCSSISCNDGFDIWGQGTMVTVS",
    "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQS"
    "THVPYTFGGGTKLEIK",
)
OTHER_ANTIBODIES = (
    "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYC"
    "ARRDYRFDMGFDYWGQGTTVTVSS",
    "QVKLQESGAELARPGASVKLSCKASGYTFTNYWMQWVKQRPGQGLDWIGAIYPGDGNTRYTHKFKGKATLTADKSSSTAYMQLSSLASEDSGVYYC"
    "ARGEGNYAWFAYWGQGTTVTVSS",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured; the fields are those of the `plan` in metrics.json."""

    num_features: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    norms: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0)
    table_features: int = 256
    sequence_length: int = 512
    head_dim: int = 64
    num_seeds: int = 8
    num_model_seeds: int = 4
    num_proteins: int = 2


QUICK = Plan(
    num_features=(16, 64, 256),
    norms=(1.0, 2.0, 4.0),
    sequence_length=256,
    num_seeds=3,
    num_model_seeds=2,
    num_proteins=1,
)


@dataclasses.dataclass(frozen=True)
class Data:
    """Queries and keys of a distribution: "isotropic", "anisotropic" or "local".

    Isotropic entries are independent and alike. Anisotropic ones have sizes that run geometrically
    from 0.1 to 1 over the dimensions of a query and back over those of a key. Local queries and
    keys are one sequence, in which every dimension is a Gaussian process whose correlation falls by
    `CORRELATION` a token, so near keys weigh most.
    """

    kind: str
    norm: float

    @property
    def name(self) -> str:
        """How tables and metrics.json call it."""
        return f"{self.kind}, norm {self.norm:g}"

    def draw(self, length: int, head_dim: int, seed: int) -> tuple[np.ndarray, ...]:
        """Return query, key and value, each (1, length, 1, head_dim), float32.

        Values are independent standard Gaussian numbers.
        """
        rng = np.random.default_rng(seed)
        query, key, value = rng.standard_normal((3, length, head_dim))
        if self.kind == "anisotropic":
            sizes = np.geomspace(0.1, 1.0, head_dim)
            sizes /= np.sqrt(np.mean(sizes**2))
            query, key = query * sizes, key * sizes[::-1]
        elif self.kind == "local":
            for t in range(1, length):
                query[t] = CORRELATION * query[t - 1] + (1 - CORRELATION**2) ** 0.5 * query[t]
            key = query
        scale = (self.norm / head_dim) ** 0.5 * head_dim**0.25
        tensors = (scale * query, scale * key, value)
        return tuple(x.astype("float32")[None, :, None] for x in tensors)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print tables, write the files, and return what metrics.json holds."""
    parser = argparse.ArgumentParser(description="Error of attention through features.")
    parser.add_argument("--out", type=Path, default=Path("runs") / "attention_fidelity")
    parser.add_argument("--quick", action="store_true", help="shorter, and with fewer seeds")
    parser.add_argument(
        "--model",
        choices=("antiberty", "synthetic"),
        default="antiberty",
        help="whose queries and keys to measure beside synthetic ones; `synthetic` is none",
    )
    arguments = parser.parse_args(argv)
    if arguments.out.exists() and not arguments.out.is_dir():
        parser.error(f"--out must name a folder. Received: {arguments.out}, which is a file")
    arguments.out.mkdir(parents=True, exist_ok=True)
    plan = QUICK if arguments.quick else Plan()

    results: dict[str, Any] = {"backend": keras.config.backend(), "plan": dataclasses.asdict(plan)}
    results["synthetic"] = measure_synthetic(plan)
    console = make_console()
    for measure in TITLES:
        console.print(synthetic_table(results["synthetic"], measure, plan.table_features))
    if arguments.model == "antiberty":
        try:
            model = load_model("antiberty")
        except (ImportError, OSError, ValueError) as error:
            console.print(f"No trained model was measured. {error}", style="yellow")
        else:
            results["antiberty"] = measure_antiberty(model, plan)
        for name, layers in results.get("antiberty", {}).items():
            console.print(model_table(name, layers, "output", plan.table_features))
    (arguments.out / "metrics.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw_figure(results, plan).savefig(arguments.out / "fidelity.png", dpi=80)
    console.print(f"Wrote metrics.json and fidelity.png to {arguments.out}.")
    return results


def swept(plan: Plan) -> tuple[Data, Data, Data]:
    """The isotropic, anisotropic and local data on which every number of features is tried."""
    middle = plan.norms[len(plan.norms) // 2]
    return Data("isotropic", middle), Data("anisotropic", middle), Data("local", 2 * middle)


def measure_synthetic(plan: Plan) -> dict[str, Any]:
    """Return the errors by data, method, number of features (a string, as in JSON) and measure."""
    methods: list[tuple[str, int | None]] = [(name, None) for name in MAPS]
    methods += [(name, window) for name in WINDOWED for window in WINDOWS]
    data_sets = [Data("isotropic", norm) for norm in plan.norms]
    data_sets += [data for data in swept(plan) if data not in data_sets]
    results = {}
    for data in track(data_sets, "Synthetic data"):
        counts = plan.num_features if data in swept(plan) else (plan.table_features,)
        results[data.name] = measure_data(data, methods, counts, plan)
    return results


def measure_data(
    data: Data, methods: Sequence[tuple[str, int | None]], counts: Sequence[int], plan: Plan
) -> dict[str, Any]:
    """Return the errors on one kind of data by method, number of features and measure.

    `methods` are pairs of a name in `MAPS` and an exact window or None.
    """
    results: dict[str, Any] = {}
    for count in counts:
        samples = []
        for seed in range(plan.num_seeds):
            sequence, other = (
                data.draw(plan.sequence_length, plan.head_dim, first + seed)
                for first in (0, OTHER_DATA)
            )
            samples.append(measure_sequences([sequence], other, methods, WINDOWS, count, seed))
        for name, errors in summary(samples).items():
            results.setdefault(name, {})[str(count)] = errors
    return results


def measure_sequences(
    sequences: Sequence[tuple[np.ndarray, ...]],
    other: Sequence[np.ndarray],
    methods: Sequence[tuple[str, int | None]],
    windows: Iterable[int],
    count: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Return the errors with one projection by method and measure, means over sequences.

    A sequence is a query, a key and a value, each (1, T, N, H); `other` are those that the
    statistics of FAVOR++ come from.
    """
    errors: dict[str, list[dict[str, float]]] = {}
    for query, key, value in sequences:
        exact = keras.ops.convert_to_numpy(softmax_weights(query, key))[0].astype("float64")
        for name, window in methods:
            feature_map = fitted(name, count, seed, other)
            found = compare(attention_rows(query, key, feature_map, window), exact, value)
            if window is None and name not in BIASED:
                found["kernel"] = kernel_error(query, key, feature_map)
            errors.setdefault(method_name(name, window), []).append(found)
        for name, weights in floors(exact, windows).items():
            errors.setdefault(name, []).append(compare(weights, exact, value))
    return {
        name: {m: float(np.mean([e[m] for e in found])) for m in found[0]}
        for name, found in errors.items()
    }


def fitted(name: str, count: int, seed: int, other: Sequence[np.ndarray]) -> FeatureMap:
    """Make a map, and let it see other queries and keys than those it will serve, in one update."""
    feature_map = MAPS[name](count, seed + PROJECTIONS)
    query, key = (keras.ops.convert_to_tensor(x) for x in other[:2])
    feature_map.build(key.shape)
    feature_map.update_statistics(query, key)
    return feature_map


def attention_rows(
    query: np.ndarray, key: np.ndarray, feature_map: FeatureMap, window: int | None
) -> np.ndarray:
    """Return the weights (N, T, S) of attention through features: its outputs for unit vectors."""
    num_keys, num_heads = key.shape[1:3]
    unit = np.eye(num_keys, dtype="float32")[None, :, None].repeat(num_heads, axis=2)
    output = favor_attention(query, key, unit, feature_map, exact_window=window)
    return keras.ops.convert_to_numpy(output)[0].transpose(1, 0, 2)


def floors(exact: np.ndarray, windows: Iterable[int]) -> dict[str, np.ndarray]:
    """Return the weights of what needs no features: the plain mean, and softmax among near keys.

    Near are the keys that `exact_window` weighs exactly: those of the query's block of W tokens and
    of the blocks on either side.
    """
    rows = {MEAN: np.full_like(exact, 1 / exact.shape[-1])}
    for window in windows:
        block = np.arange(exact.shape[-1]) // window
        near = np.where(np.abs(block[:, None] - block) <= 1, exact, 0.0)
        rows[window_only(window)] = near / near.sum(axis=-1, keepdims=True)
    return rows


def compare(weights: np.ndarray, exact: np.ndarray, value: np.ndarray) -> dict[str, float]:
    """Compare weights (N, T, S) with exact ones, also by their outputs on value (1, S, N, V)."""
    difference = weights - exact
    values = value[0].transpose(1, 0, 2)
    output_error = np.linalg.norm(difference @ values) / np.linalg.norm(exact @ values)
    return {
        "total_variation": float(0.5 * np.abs(difference).sum(axis=-1).mean()),
        "output": float(output_error),
    }


def kernel_error(query: np.ndarray, key: np.ndarray, feature_map: FeatureMap) -> float:
    """Compare phi(q).phi(k) with exp(q.k / sqrt(H)), relative to it."""
    q, k = (x.transpose(0, 2, 1, 3) for x in (query, key))
    features = (
        feature_map(keras.ops.convert_to_tensor(x), is_query=is_query)
        for x, is_query in ((q, True), (k, False))
    )
    phi_q, phi_k = (keras.ops.convert_to_numpy(phi).astype("float64") for phi in features)
    log_kernel = q.astype("float64") @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5
    ratio = phi_q @ phi_k.swapaxes(-1, -2) / np.exp(log_kernel)
    return float(np.sqrt(np.mean((ratio - 1) ** 2)))


def summary(samples: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return the mean over seeds, with its standard error, by method and measure."""
    results: dict[str, Any] = {}
    for name, measures in samples[0].items():
        results[name] = {}
        for measure in measures:
            values = np.array([sample[name][measure] for sample in samples])
            results[name][measure] = mean_and_error(values)
    return results


def measure_antiberty(model: Any, plan: Plan) -> dict[str, Any]:
    """Return, for proteins and for antibodies, the norms and the errors by method of each layer.

    Queries, keys and values of a layer are those of the exact model, so errors do not add up over
    layers. Proteins are foreign to this model, which learned antibodies, but long enough that most
    keys are far.
    """
    # Softmax attention still, in layers that tell their projections.
    exact = performerize(model, feature_map=None)
    train, heldout = (
        [p.sequence for p in proteins if len(p.sequence) >= PROTEIN_LENGTH][: plan.num_proteins]
        for proteins in load_protein_sample()
    )
    results = {}
    for name, sequences, others, window in (
        ("proteins", heldout, train, max(WINDOWS)),
        ("antibodies", ANTIBODIES, OTHER_ANTIBODIES, min(WINDOWS)),
    ):
        runs = [model_layers(exact, sequence) for sequence in sequences]
        other_runs = [model_layers(exact, sequence) for sequence in others]
        layers = list(zip(zip(*runs, strict=True), zip(*other_runs, strict=True), strict=True))
        results[name] = [
            _measure_layer(*layer, window, plan) for layer in track(layers, f"AntiBERTy on {name}")
        ]
    return results


def _measure_layer(
    sequences: Sequence[tuple[np.ndarray, ...]],
    others: Sequence[tuple[np.ndarray, ...]],
    window: int,
    plan: Plan,
) -> dict[str, Any]:
    other = [np.concatenate(tensors, axis=1) for tensors in zip(*others, strict=True)]
    methods = [(name, near) for name in WINDOWED for near in (None, window)]
    samples = [
        measure_sequences(sequences, other, methods, (window,), plan.table_features, seed)
        for seed in range(plan.num_model_seeds)
    ]
    query, key = (np.concatenate(part, axis=1) for part in list(zip(*sequences, strict=True))[:2])
    query_norm, key_norm = (
        float(np.mean(np.sum(x**2, axis=-1)) * x.shape[-1] ** -0.5) for x in (query, key)
    )
    return {"query_norm": query_norm, "key_norm": key_norm, "errors": summary(samples)}


def model_layers(model: Any, sequence: str) -> list[tuple[np.ndarray, ...]]:
    """Run a converted BERT, whose blocks normalise last, on residues, cut to what it reads.

    Returns:
        Query, key and value of each layer, (1, T, N, H), float32.
    """
    backbone = model.backbone
    blocks = [backbone.get_layer(f"transformer_layer_{i}") for i in range(backbone.num_layers)]
    before = keras.Model(backbone.input, [block.input[0] for block in blocks])
    tokenizer, longest = model.preprocessor.tokenizer, backbone.max_sequence_length
    row = bracket(np.array(tokenizer(" ".join(sequence[: longest - 2]))), tokenizer)
    return [
        tuple(
            keras.ops.convert_to_numpy(dense(x))
            for dense in (layer.query_dense, layer.key_dense, layer.value_dense)
        )
        for x, layer in zip(
            before(pad_rows([row], len(row), 0)), attention_layers(backbone), strict=True
        )
    ]


def synthetic_table(results: dict[str, Any], measure: str, count: int) -> Table:
    """Return the errors at `count` features, a row for each method and a column for each data."""
    table = Table(title=f"{TITLES[measure]}, {count} features (mean ± standard error)")
    table.add_column("method")
    for data in results:
        table.add_column(data, justify="right")
    for name in next(iter(results.values())):
        cells = [data[name][str(count)].get(measure) for data in results.values()]
        if any(cells):
            table.add_row(name, *map(_cell, cells))
    return table


def model_table(name: str, layers: Sequence[dict[str, Any]], measure: str, count: int) -> Table:
    """Return the errors of the trained model, a row for each method and a column for each layer."""
    table = Table(title=f"AntiBERTy on {name}: {TITLES[measure].lower()}, {count} features")
    table.add_column("layer")
    for index in range(len(layers)):
        table.add_column(str(index), justify="right")
    for norm, label in (("query_norm", "mean |q'|²"), ("key_norm", "mean |k'|²")):
        table.add_row(label, *(f"{layer[norm]:.1f}" for layer in layers))
    for method in layers[0]["errors"]:
        table.add_row(method, *(_cell(layer["errors"][method][measure]) for layer in layers))
    return table


def _cell(error: dict[str, float] | None) -> str:
    if error is None:
        return ""
    mean, standard_error = error["mean"], error["standard_error"]
    return f"{mean:.3g} ± {standard_error:.1g}" if standard_error else f"{mean:.3g}"


def draw_figure(results: dict[str, Any], plan: Plan) -> Figure:
    """Draw total variation over features and norm, and the output errors of the trained model."""
    synthetic = results["synthetic"]
    isotropic, anisotropic, local = (data.name for data in swept(plan))
    figure = Figure(figsize=(16, 10), layout="constrained")
    panels = figure.subplots(2, 3).ravel()
    paper = ("trigonometric, iid", "trigonometric", "FAVOR+, iid", "FAVOR+")
    maps = ("FAVOR+", "hyperbolic", "regularised", "simplex", "FAVOR++", "balanced FAVOR++")
    windows = ["FAVOR+", *(method_name("FAVOR+", w) for w in WINDOWS), *map(window_only, WINDOWS)]
    for panel, title, data, names in (
        (panels[0], "The paper's comparison", isotropic, paper),
        (panels[1], "Feature maps", anisotropic, maps),
        (panels[2], "Exact windows", local, windows),
    ):
        panel.set_title(f"{title} ({data})")
        for name in (*names, MEAN):
            errors = [synthetic[data][name][str(count)] for count in plan.num_features]
            _draw(panel, plan.num_features, errors, "total_variation", name)
        _label(panel, "features M", plan.num_features)

    panel = panels[3]
    panel.set_title(f"By norm (isotropic, M = {plan.table_features})")
    names = ("trigonometric", "FAVOR+, iid", "FAVOR+", "regularised", "FAVOR++")
    for name in (*names, method_name("FAVOR+", max(WINDOWS)), MEAN):
        errors = [
            synthetic[Data("isotropic", norm).name][name][str(plan.table_features)]
            for norm in plan.norms
        ]
        _draw(panel, plan.norms, errors, "total_variation", name)
    _label(panel, "mean |q'|²", plan.norms)

    trained = results.get("antiberty", {})
    for panel, (data, layers) in zip(panels[4:], trained.items(), strict=False):
        panel.set_title(f"AntiBERTy on {data} (M = {plan.table_features})")
        for name in layers[0]["errors"]:
            errors = [layer["errors"][name] for layer in layers]
            _draw(panel, range(len(layers)), errors, "output", name)
        panel.set(xlabel="layer", ylabel="relative error of outputs", yscale="log")
    for panel in panels[: 4 + len(trained)]:
        panel.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
        panel.grid(alpha=0.3)
    for panel in panels[4 + len(trained) :]:
        panel.set_axis_off()
    return figure


def _draw(panel: Any, x: Sequence[float], errors: Sequence[Any], measure: str, name: str) -> None:
    means, bars = ([e[measure][part] for e in errors] for part in ("mean", "standard_error"))
    base = name.split(", window ")[0]
    style = {
        "color": f"C{list(MAPS).index(base)}" if base in MAPS else "black",
        "linestyle": next((style for w, style in WINDOWS.items() if f"window {w}" in name), "-"),
    }
    if name == MEAN:
        style["linestyle"] = ":"
    panel.errorbar(x, means, yerr=bars, label=name, marker=".", capsize=2, **style)


def _label(panel: Any, x_label: str, ticks: Sequence[float]) -> None:
    panel.set(xlabel=x_label, ylabel="total variation", xscale="log", yscale="log")
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.xaxis.minorticks_off()


def method_name(name: str, window: int | None) -> str:
    """How a map with an exact window is called in results; without one, by its own name."""
    return name if window is None else f"{name}, window {window}"


def window_only(window: int) -> str:
    """How softmax attention among the keys of an exact window is called in results."""
    return f"window {window} only"


if __name__ == "__main__":
    main()
