"""The tokenizers of text and DNA: by hand, in TensorFlow graphs, and through presets."""

import itertools

import keras_hub
import numpy as np
import pytest

from keras_performer.models import (
    ByteTokenizer,
    DNATokenizer,
    PerformerBytePairTokenizer,
    PerformerCausalLM,
    PerformerCausalLMPreprocessor,
    PerformerDecoderBackbone,
    PerformerEncoderBackbone,
    PerformerMaskedLM,
    PerformerMaskedLMPreprocessor,
    PerformerSeq2SeqBackbone,
    PerformerSeq2SeqLM,
    PerformerSeq2SeqLMPreprocessor,
    PerformerSequenceClassifier,
    PerformerSequenceClassifierPreprocessor,
    PerformerTokenClassifier,
    PerformerTokenClassifierPreprocessor,
    PerformerWordPieceTokenizer,
    ProteinTokenizer,
)

SPECIAL = ["<pad>", "<cls>", "<eos>", "<mask>", "<unk>"]
TEXTS = ["plain", "", "Grüße, Привет \U0001f600", "a\nb\0c"]
DNA = ["ACGTACGTAC", "", "acgtn", "NNACGT-A", "ACG"]


def make_byte_pair():
    tokens = [*SPECIAL, *"abc", "ab", "Ġ", "Ġab"]
    merges = ["a b", "Ġ ab"]
    return PerformerBytePairTokenizer({t: i for i, t in enumerate(tokens)}, merges)


def make_word_piece():
    return PerformerWordPieceTokenizer([*SPECIAL, "per", "##former", "is", "linear"])


def kmers_by_hand(text, k, stride):
    """Written letter by letter, without arithmetic on digits."""
    singles = {letter: 5 + i for i, letter in enumerate("ACGT")}
    words = ["".join(w) for w in itertools.product("ACGT", repeat=k)]
    numbers = singles if k == 1 else {word: 9 + i for i, word in enumerate(words)}
    text, ids, start = text.upper(), [], 0
    while start + k <= len(text):
        ids.append(numbers.get(text[start : start + k], 4))
        start += stride
    if stride == k:
        ids += [singles.get(letter, 4) for letter in text[start:]]
    return ids


def test_bytes_are_those_of_utf8():
    tokenizer = ByteTokenizer()
    ids = tokenizer(TEXTS)
    assert ids == [[byte + 5 for byte in text.encode()] for text in TEXTS]
    assert tokenizer.detokenize(ids) == TEXTS
    assert tokenizer.vocabulary_size() == 261
    assert tokenizer.token_to_id("<0x41>") == 70
    assert tokenizer.detokenize([1, 70, 3, 2, 0]) == "A<mask>"
    assert tokenizer([b"\xff\xfeA"]) == [[260, 259, 70]]
    assert tokenizer.detokenize([260, 70]) == "\ufffdA"


@pytest.mark.parametrize(("k", "stride"), [(1, 1), (2, 2), (3, 3), (6, 6), (3, 1), (4, 3)])
def test_kmers_equal_those_by_hand(k, stride):
    tokenizer = DNATokenizer(k, stride)
    assert tokenizer(DNA) == [kmers_by_hand(text, k, stride) for text in DNA]
    assert tokenizer.vocabulary_size() == (9 if k == 1 else 9 + 4**k)
    assert DNATokenizer.from_config(tokenizer.get_config())(DNA) == tokenizer(DNA)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_detokenize_gives_dna_back(k):
    text = "".join(np.random.default_rng(0).choice(list("ACGT"), 53))
    tokenizer = DNATokenizer(k)
    assert tokenizer.detokenize(tokenizer([text, text[:7]])) == [text, text[:7]]


def test_dna_sizes_are_checked():
    for options in ({"k": 0}, {"k": 9}, {"k": 3, "stride": 4}, {"k": 3, "stride": 0}):
        with pytest.raises(ValueError, match="Received"):
            DNATokenizer(**options)
    tokenizer = DNATokenizer(3, stride=1)
    with pytest.raises(ValueError, match=r"overlap.*k=3, stride=1"):
        tokenizer.detokenize(tokenizer("ACGT"))


@pytest.mark.parametrize(
    ("tokenizer", "texts"),
    [
        (ByteTokenizer(), TEXTS),
        (DNATokenizer(3), DNA),
        (DNATokenizer(1), DNA),
        (DNATokenizer(3, stride=2), DNA),
    ],
    ids=["bytes", "dna", "single", "overlapping"],
)
def test_tensorflow_graph_equals_python(tokenizer, texts):
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices(texts)
    expected = tokenizer(texts)
    assert [ids.numpy().tolist() for ids in dataset.map(tokenizer)] == expected
    batched = dataset.batch(len(texts)).map(tokenizer).get_single_element()
    assert batched.to_list() == expected
    if getattr(tokenizer, "stride", None) in (None, getattr(tokenizer, "k", None)):
        back = tf.function(tokenizer.detokenize)(batched)
        assert [text.decode() for text in back.numpy()] == tokenizer.detokenize(expected)


def test_subwords_are_those_of_keras_hub():
    assert [int(i) for i in make_byte_pair()("abc ab")] == [8, 7, 10]
    assert make_byte_pair().detokenize([8, 7, 10]) == "abc ab"
    assert [int(i) for i in make_word_piece()("performer is new")] == [5, 6, 7, 4]


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: DNATokenizer(2), make_byte_pair,
                                  make_word_piece])  # fmt: skip
def test_presets_keep_their_tokenizer(make, tmp_path):
    text = "acgt abc performer"
    tokenizer = make()
    assert {tokenizer.pad_token_id, tokenizer.start_token_id, tokenizer.end_token_id} == {0, 1, 2}
    backbone = PerformerEncoderBackbone(tokenizer.vocabulary_size(), 1, 1, 4, 4, num_features=8)
    preprocessor = PerformerMaskedLMPreprocessor(tokenizer, sequence_length=24)
    PerformerMaskedLM(backbone, preprocessor).save_to_preset(str(tmp_path))
    loaded = PerformerMaskedLM.from_preset(str(tmp_path)).preprocessor.tokenizer
    assert type(loaded) is type(tokenizer)
    assert [int(i) for i in loaded(text)] == [int(i) for i in tokenizer(text)]
    assert isinstance(keras_hub.tokenizers.Tokenizer.from_preset(str(tmp_path)), type(tokenizer))


SIZES = {"num_layers": 1, "num_heads": 1, "hidden_dim": 4, "intermediate_dim": 4,
         "num_features": 8}  # fmt: skip
TASKS = {
    "causal": lambda tokenizer: PerformerCausalLM(
        PerformerDecoderBackbone(tokenizer.vocabulary_size(), **SIZES),
        PerformerCausalLMPreprocessor(tokenizer),
    ),
    "seq_2_seq": lambda tokenizer: PerformerSeq2SeqLM(
        PerformerSeq2SeqBackbone(tokenizer.vocabulary_size(), **SIZES),
        PerformerSeq2SeqLMPreprocessor(tokenizer),
    ),
    "decoder classifier": lambda tokenizer: PerformerSequenceClassifier(
        PerformerDecoderBackbone(tokenizer.vocabulary_size(), **SIZES),
        2,
        PerformerSequenceClassifierPreprocessor(tokenizer),
    ),
    "token classifier": lambda tokenizer: PerformerTokenClassifier(
        PerformerEncoderBackbone(tokenizer.vocabulary_size(), **SIZES),
        2,
        PerformerTokenClassifierPreprocessor(tokenizer),
    ),
}
TOKENIZERS = [ProteinTokenizer, ByteTokenizer, lambda: DNATokenizer(2), make_byte_pair,
              make_word_piece]  # fmt: skip


@pytest.mark.parametrize("kind", TASKS)
def test_a_tokenizer_loads_from_the_preset_of_any_task(kind, tmp_path):
    tokenizers = [make() for make in TOKENIZERS]
    task = TASKS[kind](tokenizers[0])
    task.save_to_preset(str(tmp_path))
    for tokenizer in tokenizers:
        tokenizer.save_to_preset(str(tmp_path))
        text = "acgt abc performer"
        for cls in (type(tokenizer), keras_hub.tokenizers.Tokenizer):
            loaded = cls.from_preset(str(tmp_path))
            assert type(loaded) is type(tokenizer)
            assert [int(i) for i in loaded(text)] == [int(i) for i in tokenizer(text)]


def test_a_tokenizer_of_another_class_is_not_returned(tmp_path):
    DNATokenizer(2).save_to_preset(str(tmp_path))
    body = PerformerEncoderBackbone(25, **SIZES)
    body.save_to_preset(str(tmp_path))
    with pytest.raises(ValueError, match=r"has a DNATokenizer.*Received: ByteTokenizer\."):
        ByteTokenizer.from_preset(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        DNATokenizer.from_preset(str(tmp_path))


def test_only_strings_are_tokenized():
    tokenizer = ByteTokenizer()
    for wrong in (None, [None], object(), 3, np.array(["A", None], dtype=object)):
        with pytest.raises(TypeError, match="takes strings"):
            tokenizer(wrong)
    assert tokenizer(np.array("A")).tolist() == tokenizer("A").tolist()


def test_bytes_generate_text(tmp_path):
    tokenizer = ByteTokenizer()
    backbone = PerformerDecoderBackbone(tokenizer.vocabulary_size(), 1, 1, 4, 4, num_features=8)
    model = PerformerCausalLM(backbone, PerformerCausalLMPreprocessor(tokenizer, 12))
    model.compile(sampler="greedy")
    assert model.generate("Grüße").startswith("Grüße")
