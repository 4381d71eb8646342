"""Write the table of the zoo into the READMEs: `python -m zoo.build.tables`.

It stands between two comments, and `tests/test_zoo.py` fails where it is not what this would write.
"""

from pathlib import Path

from zoo.build._record import read_record

ROOT = Path(__file__).resolve().parents[2]
# Each file, and where the folders of the presets are from there.
READMES = {ROOT / "README.md": "zoo/", ROOT / "zoo" / "README.md": ""}
BEGIN = "<!-- zoo table: begin (python -m zoo.build.tables writes it) -->"
END = "<!-- zoo table: end -->"


def main() -> None:
    """Write the table into every file that has one."""
    for path, prefix in READMES.items():
        text = path.read_text(encoding="utf-8")
        path.write_text(with_table(text, table(ROOT / "zoo", prefix), path), encoding="utf-8")


def table(zoo: Path, prefix: str) -> str:
    """Return the table of the presets in a folder.

    **Args**
        zoo: The folder.
        prefix: Where that folder is, as links see it.
    """
    records = [read_record(path) for path in sorted(zoo.glob("*/metrics.json"))]
    if not records:
        return "There are no presets yet."
    lines = [
        "| preset | task | parameters | weights | held out | model | softmax twin | baseline |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for record in records:
        weights, metric = record.weights, record.metrics[0]
        assert weights is not None  # `read_record` made sure
        twin = "–" if metric.softmax_twin is None else f"{metric.softmax_twin:.4g}"
        lines.append(
            f"| [`{record.name}`]({prefix}{record.name}/README.md) | `{record.task}` "
            f"| {weights.parameters:,} | {weights.bytes / 1e6:.2f} MB | {metric.name} "
            f"| {metric.model:.4g} | {twin} | {metric.baseline:.4g} |"
        )
    return "\n".join(lines)


def with_table(text: str, table: str, path: Path) -> str:
    """Return a text with another table between the two comments.

    **Raises** ValueError if the comments are not there.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} must have a line {BEGIN!r}, and {END!r} after it.")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


if __name__ == "__main__":
    main()
