"""Learn a vocabulary of byte pairs from documents, with Hugging Face's tokenizers library."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

SPECIAL_TOKENS = ("<pad>", "<cls>", "<eos>", "<mask>", "<unk>")
# Every byte is a token, so that nothing is unknown.
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


def learn_byte_pairs(
    texts: Iterable[str], vocabulary_size: int
) -> tuple[dict[str, int], list[str]]:
    """Return the vocabulary and the merges that `PerformerBytePairTokenizer` takes.

    **Args**
        texts: Documents. The result depends on nothing else, and not on their order.
        vocabulary_size: Number of tokens, special ones included. Fewer are returned where no pair
            occurs twice.

    **Returns** A dict from tokens to ids, of which the special tokens have the first and the 256
    bytes the next; and the merges, "a b" each, in the order in which they are applied.

    **Raises** ValueError if the vocabulary has no room for the special tokens and the bytes.

    **Example**

    >>> learn_byte_pairs(["the thing", "the other"], 263)[1]
    ['t h', 'th e']
    """
    if vocabulary_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"A vocabulary of byte pairs has {SMALLEST_VOCABULARY} tokens or more: the special "
            f"ones, and one for each byte. Received: vocabulary_size={vocabulary_size}"
        )
    learner = Tokenizer(models.BPE())
    # Pairs stay within words, with the space before them.
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]
