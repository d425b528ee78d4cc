"""A name is shown as it is, in a table, in Markdown and in a picture."""

import pytest

from smt.runtime.names import in_markdown, in_one_line, in_plot


@pytest.mark.parametrize(
    ("name", "line", "markdown", "plot"),
    [
        ("tiny run_2", "tiny run_2", "tiny run_2", "tiny run_2"),
        ("a|b*<c>[d]", "a|b*<c>[d]", r"a\|b\*\<c\>\[d\]", "a|b*<c>[d]"),
        ("5$ `x` ~y\\z", "5$ `x` ~y\\z", r"5\$ \`x\` \~y\\z", r"5\$ `x` ~y\z"),
        ("_hidden", "_hidden", "_hidden", " _hidden"),
        ("two\nlines", "two\ufffdlines", "two\ufffdlines", "two\ufffdlines"),
    ],
)
def test_a_name_is_shown_as_it_is(name, line, markdown, plot):
    assert (in_one_line(name), in_markdown(name), in_plot(name)) == (line, markdown, plot)
