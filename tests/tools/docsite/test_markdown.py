"""What GitHub reads in Markdown, MkDocs reads too once it is rewritten."""

import markdown
import pytest
from docsite.markdown import as_on_github


def html(text):
    return markdown.markdown(as_on_github(text), extensions=["tables", "fenced_code"])


@pytest.mark.parametrize(
    "text",
    [
        "A paragraph:\n* one\n* two\n  on two lines\n",
        "* one\n  on two lines\n\n  | a |\n  |---|\n  | 1 |\n\n  and a paragraph\n* two\n",
        "1. one\n\n   a paragraph of it\n2. two\n",
    ],
)
def test_lists_have_their_items(text):
    shown = html(text)
    assert shown.count("<li>") == 2
    assert shown.count("<table>") == text.count("|---|")
    assert "* " not in shown


def test_what_follows_a_list_is_outside_of_it():
    assert "</ul>\n<p>after</p>" in html("* one\n\nafter\n")


def test_lists_in_lists():
    shown = html("* one\n  * inner\n    goes on\n* two\n")
    assert shown.count("<li>") == 3
    assert shown.count("<ul>") == 2


def test_bars_in_code_of_a_table_are_bars():
    shown = html("| a | b |\n|---|---|\n| `[Wk\\|Wv]` | 2 |\n")
    assert "<code>[Wk|Wv]</code>" in shown
    assert shown.count("<td>") == 2


def test_blocks_stay_as_they_are():
    text = "text\n```text\nwords\n* no item\n```\n"
    assert as_on_github(text) == text
