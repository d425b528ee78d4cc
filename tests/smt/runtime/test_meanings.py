"""Every field of a run is documented, once, where it is declared."""

from dataclasses import dataclass, fields

import pytest

from smt.config import SMTConfig
from smt.data.recall import RecallTask
from smt.data.settings import DataConfig
from smt.evaluation.run import EvaluationConfig
from smt.runtime.fields import as_text, choices_of, defaults_of, parse
from smt.runtime.meanings import in_brief, meanings
from smt.training.settings import RunConfig, TrainingConfig

SETTINGS = [SMTConfig, DataConfig, TrainingConfig, RunConfig, RecallTask, EvaluationConfig]


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_field_has_a_meaning_and_nothing_else_has_one(settings):
    assert [*meanings(settings)] == [field.name for field in fields(settings)]
    assert all(len(in_brief(text).split()) > 1 for text in meanings(settings).values())


@pytest.mark.parametrize("settings", SETTINGS)
def test_choices_are_of_fields_and_different_words(settings):
    for name, words in choices_of(settings).items():
        assert name in meanings(settings) and len(set(words)) == len(words) > 1


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_default_is_shown_as_it_would_be_given(settings):
    for name, value in defaults_of(settings).items():
        assert parse(settings, name, as_text(value)) == value


@dataclass
class Documented:
    """Of no use. It has

    Args: of a kind.

    Args:
        first: what comes first: always. And more
            of it, `` 3.5 ``. The end.
        second, third: these
            two.

    Raises:
        fourth: is none.
    """

    first: int
    second: int
    third: int = 3


def test_meanings_go_on_over_lines_and_names_that_share_one_have_it_each():
    assert meanings(Documented) == {
        "first": "what comes first: always. And more of it, `` 3.5 ``. The end.",
        "second": "these two.",
        "third": "these two.",
    }


def test_in_brief_is_the_first_sentence_without_marks():
    assert in_brief("``a`` of 3.5. It is b.") == "a of 3.5"
    assert in_brief("one e.g. this.") == "one e.g. this"
