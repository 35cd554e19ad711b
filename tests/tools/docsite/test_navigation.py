"""The navigation follows docs/index.md."""

from docsite.navigation import navigation

INDEX = """# All pages

**Using it**

| question | page |
|---|---|
| How? | [a.md](a.md), [b.md](design/b.md#section) |

Text with [d.md](d.md).

**More**

| question | page |
|---|---|
| Again? | [a.md](a.md), [CHANGELOG.md](../CHANGELOG.md), [LICENSE](../LICENSE) |
"""


def test_pages_stand_where_they_are_linked_first():
    names = {"a.md": "A", "design/b.md": "B", "CHANGELOG.md": "Changes"}
    assert navigation(INDEX, names) == [
        {"Home": "index.md"},
        {"Using it": [{"A": "a.md"}, {"B": "design/b.md"}]},
        {"More": [{"Changes": "CHANGELOG.md"}]},
    ]
