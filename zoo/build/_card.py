"""The card of a preset, made from its `metrics.json`."""

import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from keras_performer.presets import sha256
from zoo.build._record import Record, read_record, task_home


def card(folder: Path) -> str:
    """Return the text of the `README.md` of a folder of the zoo.

    **Args**
        folder: Holds `metrics.json`, and the weights or the `remote.json` that says where they are.
    """
    record = read_record(folder / "metrics.json")
    weights = record.weights
    assert weights is not None  # `read_record` made sure
    counts = ", ".join(f"{count:,} {what}" for what, count in record.data.counts.items())
    return f"""# {record.name}

{record.summary} `{record.task}` with {weights.parameters:,} parameters, {weights.bytes:,} bytes of
float16 weights that load as float32.

```python
from {task_home(record.task)} import {record.task}

model = {record.task}.from_preset("{record.name}")
```

`python -m keras_performer.export {record.name} {record.name}.tflite` writes it for LiteRT, and
`python -m keras_performer.export {record.name} {record.name}` as a SavedModel.

## Held-out data

{record.evaluation}

{metrics_table(record)}

- Softmax twin: {record.softmax_twin}
- Baseline: {record.baseline}
- Rounding to float16 changes outputs by at most {weights.output_difference:.1e}, where the largest
  is {weights.largest_output:.3g}; the figures above are those from before.

## Data

- Source: {record.data.source}
- Licence: {record.data.licence}
- Split: {record.data.split}
- Counts: {counts}

## Training

{record.steps:,} steps, {record.tokens_seen:,} tokens seen, {record.wall_seconds:,.0f} seconds in
all, on {record.hardware}, with {record.backend}.

![Loss over steps](curve.png)

```json
{json.dumps(record.config, indent=2)}
```

Rebuild it, from the root of the repository:

```
{record.rebuild}
```

## Use and limits

{record.intended_use}

{"".join(f"- {limit}{chr(10)}" for limit in record.limits)}
## Checksums

`keras_performer.verify("{record.name}")` checks all files, and `from_preset` does so by itself.

| file | sha256 |
|---|---|
{"".join(f"| {name} | `{digest}` |{chr(10)}" for name, digest in _checksums(folder).items())}"""


def metrics_table(record: Record) -> str:
    """Return the held-out figures as a table, with a dash where there is no twin."""
    lines = ["| | this model | softmax twin | baseline |", "|---|---|---|---|"]
    for metric in record.metrics:
        twin = "–" if metric.softmax_twin is None else f"{metric.softmax_twin:.4g}"
        lines.append(
            f"| {metric.name} ({metric.better} is better) | {metric.model:.4g} | {twin} "
            f"| {metric.baseline:.4g} |"
        )
    return "\n".join(lines)


def _checksums(folder: Path) -> dict[str, str]:
    remote = folder / "remote.json"
    if remote.is_file():
        location = json.loads(remote.read_text(encoding="utf-8"))
        return {location["url"]: location["sha256"]}
    return {path.name: sha256(path) for path in sorted(folder.glob("*.weights.h5"))}


def draw_curve(record: Record, path: Path) -> None:
    """Draw losses over steps."""
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": record.name}):
        figure = Figure(figsize=(5, 3), dpi=100, layout="constrained")
        axes = figure.subplots()
        axes.plot([p.step for p in record.curve], [p.loss for p in record.curve], label="training")
        held_out = [(p.step, p.val_loss) for p in record.curve if p.val_loss is not None]
        if held_out:
            axes.plot(*zip(*held_out, strict=True), label="held out")
        axes.set(xlabel="step", ylabel="loss", title=record.name)
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Software": None})
