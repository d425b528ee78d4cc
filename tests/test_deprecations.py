"""A deprecation fails the test whose call of ours causes it, as a warning or in a log; one between libraries fails none."""

import types
import warnings

import deprecations
import pytest

LIBRARY = """
import logging
import warnings

logger = logging.getLogger(__name__)

def warn(category, stacklevel):
    warnings.warn("an argument is deprecated", category, stacklevel=stacklevel)

def log(message):
    _log(message)

def _log(message):
    logger.warning(message)
"""


def module(name, source, **names):
    made = types.ModuleType(name)
    made.__dict__.update(names)
    exec(source, made.__dict__)
    return made


@pytest.fixture
def library():
    return module("stand_in.first", LIBRARY)


@pytest.fixture
def other(library):
    """A library that calls the first one."""
    source = "def warn(*arguments): library.warn(*arguments)\n\ndef log(message): library.log(message)"
    return module("stand_in.second", source, library=library)


@pytest.mark.parametrize(
    "category",
    [DeprecationWarning, FutureWarning, PendingDeprecationWarning, UserWarning],
    ids=lambda category: category.__name__,
)
def test_a_warning_at_our_call_is_an_error_and_one_between_libraries_is_not(category, library, other):
    with pytest.raises(category, match="deprecated"):
        library.warn(category, 2)
    with warnings.catch_warnings(record=True) as seen:
        library.warn(category, 1)
        other.warn(category, 2)
    assert len(seen) == 2


def test_other_warnings_are_no_errors():
    with pytest.warns(UserWarning, match="far from"):
        warnings.warn("stride is far from a third of the tokens", stacklevel=1)


def test_a_log_of_our_call_is_caught_and_one_between_libraries_is_not(library, other):
    with deprecations.logged(("stand_in",)) as messages:
        library.log("`past_key_values` is deprecated")
        library.log("something else")
        other.log("`past_key_values` is deprecated, again")
    library.log("`past_key_values` is deprecated, out of the block")
    assert messages == ["`past_key_values` is deprecated"]


def test_the_names_of_our_modules_are_known():
    for name in ("smt", "smt.model", "smt_kernels.launch", "test_deprecations", "conftest", "bench_window"):
        assert deprecations.OURS.match(name)
    for name in ("torch", "transformers.trainer", "smtplib", "test", "conftest_of_others", ""):
        assert not deprecations.OURS.match(name)
