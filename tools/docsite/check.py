"""Checks the site as it was built: links and their sections, pictures, and that no page fetches what is elsewhere."""

import posixpath
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

# Attributes by which a browser fetches something at once, by element. Links that are followed by a click are "a".
_FETCHED = {"link": "href", "script": "src", "img": "src", "source": "src", "iframe": "src", "use": "href"}


class _Page(HTMLParser):
    """Names of a page's sections, and what it points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.classes: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep what an element is called and where it points to."""
        values = {name: value for name, value in attrs if value}
        self.names |= {values[name] for name in ("id", "name") if name in values}
        self.classes |= set(values.get("class", "").split())
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in _FETCHED and _FETCHED[tag] in values and values.get("rel") not in ("next", "prev", "canonical"):
            self.fetched.append(values[_FETCHED[tag]])


def check_site(folder: Path) -> list[str]:
    """What is wrong with a site, one line each.

    Args:
        folder: of the site.
    """
    pages = {path.relative_to(folder).as_posix(): _Page(path.read_text()) for path in sorted(folder.rglob("*.html"))}
    wrong = []
    for name, page in pages.items():
        if name == "404.html":  # has addresses from the root, because it stands for any page
            continue
        if "mermaid" in page.classes:
            wrong.append(
                f"{name} has a drawing for mermaid, which a browser would fetch; draw it by code (tools/figures)"
            )
        wrong += [f"{name} fetches {url}, which is elsewhere" for url in page.fetched if _elsewhere(url)]
        for link in (*page.links, *page.fetched):
            if not _elsewhere(link) and not _leads_somewhere(link, name, pages, folder):
                wrong.append(f"{name} links to {link}, which is not there")
    return wrong


def _elsewhere(url: str) -> bool:
    return url.startswith("//") or ":" in url.partition("/")[0]


def _leads_somewhere(link: str, page: str, pages: dict[str, _Page], folder: Path) -> bool:
    target, _, section = unquote(link).partition("#")
    target = target.partition("?")[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target)) if target else page
    if path in (".", ""):
        path = "index.html"
    if path in pages:
        return not section or section in pages[path].names or section.startswith("__")
    return (folder / path).is_file()
