"""What MkDocs calls while it builds the site; mkdocs.yml names this file."""

import sys
from pathlib import Path
from typing import Any

import tomllib
from mkdocs.exceptions import Abort
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from figures.palette import darkened  # noqa: E402

from docsite import check, links, markdown, navigation  # noqa: E402 (MkDocs loads this file by its path)


def repository() -> str | None:
    """Below what address files of the repository are seen: ``Source`` among the project's URLs; None without one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Source")


def on_config(config: Any) -> Any:
    """Take the navigation from docs/index.md, and names of pages from their headings."""
    docs = ROOT / links.DOCS
    texts = {path.relative_to(docs).as_posix(): path.read_text() for path in sorted(docs.rglob("*.md"))}
    names = links.titles({**texts, **{name: (ROOT / name).read_text() for name in links.ROOT_PAGES}})
    config.nav = navigation.navigation(texts[navigation.HOME], names)
    config.extra |= {"names": names, "repository": repository()}
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the root folder, and a dark version of every drawing."""
    for name in links.ROOT_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    files.append(File.generated(config, "site.css", abs_src_path=str(Path(__file__).parent / "site.css")))
    for picture in [file for file in files if file.src_uri.endswith(".svg")]:
        dark = darkened(Path(picture.abs_src_path).read_text())
        files.append(File.generated(config, links.dark_name(picture.src_uri), content=dark))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Turn a page of a checkout into a page of the site."""
    text = links.for_site(text, page.file.src_uri, config.extra["names"], config.extra["repository"])
    return markdown.as_on_github(links.with_dark_pictures(text))


def on_post_build(config: Any) -> None:
    """Refuse a site with a link that leads nowhere, or that would fetch something from elsewhere."""
    wrong = check.check_site(Path(config.site_dir))
    if wrong:
        raise Abort("\n".join(wrong))
