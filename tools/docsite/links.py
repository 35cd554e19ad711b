"""Links of a page, which are written for a checkout, turned into links of the site.

On a page of docs/ and in a file of the root folder a link is the path of a file. Most of these files are pages of the
site. Others (sources, results) are not: they become links to the repository if its address is known, else plain text.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Callable, Mapping

# Files of the root folder that are pages of the site, too.
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
DOCS = "docs"

_FENCED = re.compile(r"(^ *```.*?^ *```[ \t]*$)", re.M | re.S)
# Code, in which nothing is a link, or a link.
_LINK = re.compile(r"`+[^`]+`+|(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^# +(.+?) *$", re.M)
_PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+\.svg)\)")


def outside_blocks(text: str, change: Callable[[str], str]) -> str:
    """A page with everything but its fenced blocks changed."""
    return "".join(part if part.lstrip().startswith("```") else change(part) for part in _FENCED.split(text))


def site_path(path: str) -> str | None:
    """Where a file of the repository is on the site, before pages become HTML; None if it is not there.

    Args:
        path: from the repository's root, with ``/``.
    """
    if path in ROOT_PAGES:
        return path
    return path[len(DOCS) + 1 :] if path.startswith(f"{DOCS}/") else None


def repository_path(page: str) -> str:
    """The file of a page of the site, from the repository's root."""
    return page if page in ROOT_PAGES else f"{DOCS}/{page}"


def titles(pages: Mapping[str, str]) -> dict[str, str]:
    """What pages are called: their headings, up to a colon if no other page begins like that.

    Args:
        pages: texts by paths on the site.
    """
    full = {path: match[1].replace("`", "") for path, text in pages.items() if (match := _HEADING.search(text))}
    short = {path: title.partition(":")[0] for path, title in full.items()}
    uses = Counter(short.values())
    return {path: title if uses[short[path]] > 1 else short[path] for path, title in full.items()}


def for_site(text: str, page: str, names: Mapping[str, str], repository: str | None) -> str:
    """A page's text with the links of the site. Where a link says the name of its file, it says the page's.

    Args:
        text: in Markdown.
        page: its path on the site, such as ``"design/pages.md"``.
        names: of all pages, see :func:`titles`.
        repository: address below which files are seen, such as ``"https://example.org/x/blob/main"``; None if there is
            none: what is only there loses its link.
    """
    folder = posixpath.dirname(repository_path(page))

    def linked(match: re.Match[str]) -> str:
        words, link = match[1], match[2]
        if link is None:
            return match[0]
        target, mark, section = link.partition("#")
        if ":" in target or not target:
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        there = site_path(path)
        if there is not None:
            if " " not in words and words.endswith(posixpath.basename(path)):
                words = names.get(there, words)
            return f"[{words}]({posixpath.relpath(there, posixpath.dirname(page) or '.')}{mark}{section})"
        return words if repository is None else f"[{words}]({repository.rstrip('/')}/{path}{mark}{section})"

    return outside_blocks(text, lambda part: _LINK.sub(linked, part))


def with_dark_pictures(text: str) -> str:
    """A page whose drawings are there twice, of which the reader sees the one that suits the page's colors."""

    def twice(match: re.Match[str]) -> str:
        words, light = match[1], match[2]
        return f"![{words}]({light}#only-light)![{words}]({dark_name(light)}#only-dark)"

    return outside_blocks(text, lambda part: _PICTURE.sub(twice, part))


def dark_name(picture: str) -> str:
    """What the dark version of a drawing is called."""
    return f"{picture.removesuffix('.svg')}-dark.svg"
