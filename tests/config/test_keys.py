"""The schema as dotted keys."""

from fnmatch import fnmatchcase

from align.config import keys
from align.config.listing import VERBS
from align.config.ranges import LIMITS
from align.config.schema import Verb


def test_every_key_says_what_it_means():
    assert [path for path, key in keys.keys().items() if len(key.note) < 5] == []


def test_a_field_that_a_stage_redefines_keeps_its_meaning():
    assert keys.find("stages.dpo.learning_rate").note == keys.find("stages.sft.learning_rate").note


def test_below_a_dictionary_any_name_is_a_key_and_elsewhere_none():
    assert keys.find("stages.evaluate.models.mine") is not None
    assert keys.find("stages.dpo.beta.mine") is None


def test_every_number_has_a_range():
    numbers = [path for path, key in keys.keys().items() if key.type in (int, float)]
    assert [path for path in numbers if not any(fnmatchcase(path, pattern) for pattern in LIMITS)] == []


def test_every_range_names_a_key():
    assert [p for p in LIMITS if not any(fnmatchcase(path, p) for path in keys.keys())] == []


def test_every_verb_is_explained():
    assert set(VERBS) == set(Verb)
