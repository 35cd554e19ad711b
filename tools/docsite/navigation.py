"""The site's navigation: the sections and the pages of docs/index.md, in its order."""

import re
from collections.abc import Mapping

from docsite.links import site_path

_SECTION = re.compile(r"\*\*(.+)\*\*$")
_LINK = re.compile(r"\]\(([^)\s#]+\.md)[^)\s]*\)")

HOME = "index.md"


def navigation(index: str, names: Mapping[str, str]) -> list[dict[str, object]]:
    """What MkDocs calls ``nav``.

    Args:
        index: the text of docs/index.md: bold lines name sections, and tables below them link to pages. A page is where
            it is linked first.
        names: of pages, by their paths on the site.
    """
    sections: list[tuple[str, list[str]]] = []
    seen = {HOME}
    for line in index.splitlines():
        if found := _SECTION.match(line):
            sections.append((found[1], []))
        elif sections and line.startswith("|"):
            for link in _LINK.findall(line):
                page = site_path(link[3:] if link.startswith("../") else f"docs/{link}")
                if page is not None and page not in seen:
                    seen.add(page)
                    sections[-1][1].append(page)
    return [{"Home": HOME}, *({title: [{names[page]: page} for page in pages]} for title, pages in sections)]
