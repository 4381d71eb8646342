import keras
import keras_hub
import numpy as np
import pytest
from processes import run_code

from keras_performer.models import (
    PerformerEncoderBackbone,
    PerformerMaskedLMPreprocessor,
    ProteinTokenizer,
)

VOCABULARY = ["<pad>", "<cls>", "<eos>", "<mask>", "<unk>", *"ACDEFGHIKLMNPQRSTVWYXBUZO"]
TEXTS = ["MKT", "", "acdXZ", "M*é\U0001f600-J", "W" * 50]


def by_hand(text):
    return [VOCABULARY.index(c.upper()) if c.upper() in VOCABULARY else 4 for c in text]


def test_vocabulary_and_special_tokens():
    tokenizer = ProteinTokenizer()
    assert tokenizer.get_vocabulary() == VOCABULARY
    assert tokenizer.vocabulary_size() == 30
    assert (tokenizer.pad_token_id, tokenizer.start_token_id, tokenizer.end_token_id) == (0, 1, 2)
    assert (tokenizer.mask_token_id, tokenizer.unk_token_id) == (3, 4)
    assert sorted(tokenizer.special_token_ids) == [0, 1, 2, 3, 4]
    for i, token in enumerate(VOCABULARY):
        assert tokenizer.token_to_id(token) == i
        assert tokenizer.id_to_token(i) == token
    assert tokenizer.token_to_id("J") == 4


def test_one_token_per_character():
    tokenizer = ProteinTokenizer()
    assert tokenizer(TEXTS) == [by_hand(text) for text in TEXTS]
    assert [len(ids) for ids in tokenizer(TEXTS)] == [len(text) for text in TEXTS]
    one = tokenizer("MkT")
    assert one.dtype == np.int32
    assert one.tolist() == by_hand("MKT")
    assert tokenizer("").shape == (0,)


def test_takes_bytes_arrays_and_nested_lists():
    tokenizer = ProteinTokenizer()
    ids = [by_hand("MK"), by_hand("TAY")]
    assert tokenizer([b"MK", b"TAY"]) == ids
    assert tokenizer(np.array(["MK", "TAY"])) == ids
    assert tokenizer(np.array(["MK", "TAY"], dtype=object)) == ids
    assert tokenizer([["MK"], ["TAY"]]) == [ids[:1], ids[1:]]
    assert tokenizer(np.str_("MK")).tolist() == ids[0]


def test_refuses_what_is_no_string():
    with pytest.raises(TypeError, match=r"takes strings.*Received: inputs=3"):
        ProteinTokenizer()(["MK", 3])


def test_detokenize_inverts_tokenize_and_drops_what_packs():
    tokenizer = ProteinTokenizer()
    assert tokenizer.detokenize(tokenizer("mktay")) == "MKTAY"
    assert tokenizer.detokenize([[1, 15, 3, 4, 2, 0, 0], [5]]) == ["M<mask><unk>", "A"]
    packed = np.array([[1, 15, 2, 0], [1, 5, 6, 2]])
    for ids in (packed, keras.ops.convert_to_tensor(packed)):
        assert tokenizer.detokenize(ids) == ["M", "AC"]
    assert tokenizer.detokenize([]) == ""
    with pytest.raises(ValueError, match=r"below 30\. Received: ids from -1 to 30"):
        tokenizer.detokenize([5, -1, 30])
    with pytest.raises(ValueError, match="id=30"):
        tokenizer.id_to_token(30)


def test_tensorflow_graph_equals_python():
    tf = pytest.importorskip("tensorflow")
    tokenizer = ProteinTokenizer()
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS)
    expected = tokenizer(TEXTS)
    assert [ids.numpy().tolist() for ids in dataset.map(tokenizer)] == expected
    batched = dataset.batch(len(TEXTS)).map(tokenizer).get_single_element()
    assert batched.to_list() == expected
    back = tf.function(tokenizer.detokenize)(batched)
    assert [text.decode() for text in back.numpy()] == tokenizer.detokenize(expected)


@pytest.mark.skipif(keras.config.backend() == "tensorflow", reason="the backend is TensorFlow")
def test_python_workflow_needs_no_tensorflow():
    code = (
        "import sys\n"
        "sys.modules['tensorflow'] = sys.modules['tensorflow_text'] = None\n"
        "from keras_performer.models import PerformerMaskedLMPreprocessor, ProteinTokenizer\n"
        "from keras_performer.models import PerformerSeq2SeqLMPreprocessor\n"
        "tokenizer = ProteinTokenizer()\n"
        "x, y, w = PerformerMaskedLMPreprocessor(tokenizer, sequence_length=8)(['MKT', 'A'])\n"
        "pairs = PerformerSeq2SeqLMPreprocessor(tokenizer, 5, 7)\n"
        "_, y, _ = pairs({'encoder_text': ['MK', 'A'], 'decoder_text': ['ACD', '']})\n"
        "back = pairs.generate_postprocess(pairs.generate_preprocess(\n"
        "    {'encoder_text': ['MK', 'A'], 'decoder_text': ['ACD', '']}))\n"
        "print(back, tuple(y.shape), pairs.generate_preprocess('MK')['encoder_token_ids'].shape)\n"
        "print(tokenizer.detokenize(tokenizer(['MKT'])), tuple(x['token_ids'].shape))\n"
    )
    pairs, tokens = run_code(code).strip().splitlines()[-2:]
    assert pairs.startswith("['ACD', ''] (2, 7) ")
    assert tokens == "['MKT'] (2, 8)"


CUSTOM = ["<cls>", "<pad>", "<eos>", "<unk>", "<mask>", "A", "*"]


def test_custom_vocabulary_survives_config_assets_and_presets(tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(CUSTOM))
    tokenizer = ProteinTokenizer(tmp_path / "words.txt")
    assert tokenizer("a*C").tolist() == [5, 6, 3]
    assert tokenizer.pad_token_id == 1
    assert ProteinTokenizer.from_config(tokenizer.get_config())("a*C").tolist() == [5, 6, 3]

    backbone = PerformerEncoderBackbone(7, 1, 1, 4, 4, num_features=8)
    backbone.save_to_preset(str(tmp_path / "preset"))
    PerformerMaskedLMPreprocessor(tokenizer).save_to_preset(str(tmp_path / "preset"))
    asset = tmp_path / "preset" / "assets" / "tokenizer" / "vocabulary.txt"
    assert asset.read_text().splitlines() == CUSTOM
    asset.write_text("\n".join([*CUSTOM, "C"]))
    for cls in (ProteinTokenizer, keras_hub.tokenizers.Tokenizer):
        loaded = cls.from_preset(str(tmp_path / "preset"))
        # The asset is the truth, not the config.
        assert loaded("a*C").tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (VOCABULARY[1:], "missing=\\['<pad>'\\]"),
        ([*VOCABULARY, "A"], "1 of them repeated"),
        ([*VOCABULARY, "Ala"], "Ala"),
        ([*VOCABULARY, "a"], "character=\\['a'\\]"),
        ([*VOCABULARY, "É"], "É"),
    ],
)
def test_wrong_vocabularies_are_explained(vocabulary, message):
    with pytest.raises(ValueError, match=message):
        ProteinTokenizer(vocabulary)
