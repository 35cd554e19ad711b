"""What GitHub and MkDocs read differently in a page's Markdown."""

import re

from docsite.links import outside_blocks

_ITEM = re.compile(r" *(?:[*-]|\d+\.) +(?=\S)")
_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")


def as_on_github(text: str) -> str:
    """A page's text, written so that MkDocs makes of it what GitHub does."""
    return outside_blocks(text, lambda part: _lists(_bars(part)))


def _bars(part: str) -> str:
    r"""In tables a bar inside of code is written ``\|``, which GitHub shows as a bar. MkDocs needs no backslash."""
    lines = part.split("\n")
    return "\n".join(
        _CODE.sub(lambda code: code[0].replace("\\|", "|"), line) if line.startswith("|") else line for line in lines
    )


def _lists(part: str) -> str:
    """Lists as MkDocs reads them: an empty line before the first item, and four spaces for what belongs to one.

    Elsewhere a list may follow a paragraph at once, and what belongs to an item stands below its first word.
    """
    lines: list[str] = []
    items: list[int] = []  # of each item around a line, from the outermost: the column of its first word
    before = ""
    paragraphs = False  # whether the item has an empty line in it
    for line in part.split("\n"):
        column = len(line) - len(line.lstrip(" "))
        found = _ITEM.match(line)
        if line.strip() and (found or not before.strip()):
            while items and column < items[-1]:
                items.pop()
        depth = sum(column >= start for start in items)
        indented = line if not depth else " " * (4 * depth + column - items[depth - 1]) + line.lstrip(" ")
        if found:
            after_text = not _ITEM.match(before) and not before.startswith(" ")
            if before.strip() and (paragraphs or (not items and after_text)):
                lines.append("")
            paragraphs = False
            items.append(column + len(found[0].lstrip(" ")))
        paragraphs = paragraphs or not line.strip()
        lines.append(indented)
        before = line
    return "\n".join(lines)
