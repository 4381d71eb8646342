from dataclasses import dataclass

import pytest

from training.config import load_config
from training.protein_masked_lm import DEFAULT_CONFIG, Config


@dataclass(frozen=True)
class Section:
    rate: float
    name: str
    flag: bool = False

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("'section.rate' must be at least 0.")


@dataclass(frozen=True)
class Whole:
    count: int
    section: Section


TEXT = 'count = 3\n[section]\nrate = 2\nname = "a"\n'
WHOLE = Whole(3, Section(2.0, "a"))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_reads_sections_and_turns_integers_into_floats(path):
    config = load_config(Whole, path)
    assert config == WHOLE
    assert type(config.section.rate) is float


def test_a_byte_order_mark_is_no_key(path):
    path.write_text(TEXT, encoding="utf-8-sig")
    assert load_config(Whole, path) == WHOLE


def test_overrides_are_toml_or_else_strings_and_the_last_one_counts(path):
    overrides = [
        "count=4",
        "section.name=b c",
        "section.flag=true",
        "section.rate=1e-3",
        "count = 5",
    ]
    expected = Whole(5, Section(0.001, "b c", True))
    assert load_config(Whole, path, overrides) == expected
    assert load_config(Whole, path, ["section.name='3'"]).section.name == "3"


@pytest.mark.parametrize(
    "override, error, message",
    [
        ("section.rat=1", ValueError, r"no key 'section\.rat'.*'section\.rate'"),
        ("cuont=1", ValueError, r"no key 'cuont'.*'count'"),
        ("section.name=3", TypeError, r"'section\.name' must be of type str.*3"),
        ("count=1.5", TypeError, r"'count' must be of type int.*1\.5"),
        ("count=true", TypeError, r"'count' must be of type int.*True"),
        ("section.flag=1", TypeError, r"'section\.flag' must be of type bool"),
        ("section.rate=fast", TypeError, r"'section\.rate' must be of type float.*'fast'"),
        ("section=1", TypeError, r"'section' is a section"),
        ("section.rate=-1", ValueError, r"'section\.rate' must be at least 0"),
        ("count", ValueError, r"section\.key=value.*'count'"),
        ("=1", ValueError, r"section\.key=value"),
        ("count.x=1", ValueError, r"'count' is a value"),
    ],
)
def test_a_bad_override_names_the_key(path, override, error, message):
    with pytest.raises(error, match=message):
        load_config(Whole, path, [override])


def test_a_bad_file_is_named(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.toml"):
        load_config(Whole, tmp_path / "nothing.toml")
    path.write_text("count = 3\n[section]\nrate = 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.toml: the key 'section\.name' is missing"):
        load_config(Whole, path)
    path.write_text("count = = 3\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.toml: this is not valid TOML: .*line 1"):
        load_config(Whole, path)
    path.write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match=r"run\.toml: this is not valid TOML"):
        load_config(Whole, path)


def test_a_map_that_chooses_its_own_number_of_features():
    overrides = ["model.feature_map=elu", "model.num_features=0"]
    config = load_config(Config, DEFAULT_CONFIG, overrides)
    assert config.model.arguments()["num_features"] is None


def test_the_shipped_config_is_valid_and_checked():
    assert load_config(Config, DEFAULT_CONFIG).data.sequence_length <= 512
    with pytest.raises(ValueError, match=r"'training\.steps' must be a multiple"):
        load_config(Config, DEFAULT_CONFIG, ["training.steps_per_epoch=77"])
    with pytest.raises(ValueError, match=r"'data\.mask_rate' must be between 0 and 1"):
        load_config(Config, DEFAULT_CONFIG, ["data.mask_rate=1.5"])
