"""What the documentation points to is there: paths of files and folders, and links to pages and their sections."""

import fnmatch
import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.commands import check_make
from tests.docs.pages import ROOT, page_name, pages

_SKIPPED = {".git", ".venv", "models", "build", "dist", "logs"}
# Where commands on the pages write to.
_WRITTEN = ("benchmarks/results/gpu",)
_SOURCE = (".py", ".md", ".cpp", ".h", ".sh", ".toml", ".yaml", ".yml")
_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_MAKE = re.compile(r"`make ([a-z-]+(?: [A-Z_]+=\S+)*)`")
_PATH = re.compile(r"[\w./*-]+")


def _repository() -> set[str]:
    """All files and folders, as ``/`` and their path."""
    found = set()
    for path in ROOT.iterdir():
        if path.name not in _SKIPPED:
            found.add(path)
            if path.is_dir():
                found |= set(path.rglob("*"))
    return {f"/{path.relative_to(ROOT)}" for path in found if "__pycache__" not in path.parts}


REPOSITORY = _repository()
FOLDERS = {path.rpartition("/")[2] for path in REPOSITORY if (ROOT / path[1:]).is_dir()}


def without_blocks(text: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^\s*```.*?^\s*```\s*$", "", text, flags=re.M | re.S)


def paths(text: str) -> list[str]:
    """What a page names between backticks that must be a path of the repository.

    That is what ends like a source file, or has a slash after the name of a folder of the repository. Paths that begin
    with ``/`` or ``~``, and words in capitals that stand for something else, are none.
    """
    named = []
    for code in _CODE.findall(without_blocks(text)):
        path = code.partition("::")[0].rstrip("/")  # a test in a file
        if not _PATH.fullmatch(path) or path.startswith(("/", "~", "..")) or re.search(r"\b[A-Z]{3,}\b(?!\.md)", path):
            continue
        if path.endswith(_SOURCE) or ("/" in code and path.partition("/")[0] in FOLDERS):
            named.append(path)
    return named


def exists(path: str) -> bool:
    """Whether a path, or the end of one, is a file or folder of the repository, or one of vLLM's."""
    if path in _WRITTEN:
        return True
    if path.startswith("vllm/"):
        spec = importlib.util.find_spec("vllm")
        return spec is not None and (Path(str(spec.origin)).parent.parent / path).exists()
    return any(fnmatch.fnmatchcase(known, f"*/{path}") for known in REPOSITORY)


def anchors(text: str) -> set[str]:
    """Names of a page's sections, as GitHub makes them of the headings."""
    headings = re.findall(r"^#+ +(.*)$", without_blocks(text), re.M)
    plain = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading) for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_the_paths_on_a_page_exist(page):
    if page.name == "CHANGELOG.md":  # which also names what is gone
        return
    assert not [path for path in paths(page.read_text()) if not exists(path)]


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_the_links_on_a_page_lead_somewhere(page):
    broken = []
    for link in _LINK.findall(without_blocks(page.read_text())):
        target, _, section = link.partition("#")
        path = page.parent / target if target else page
        if ":" not in target and not (
            path.exists() and (not section or path.suffix != ".md" or section in anchors(path.read_text()))
        ):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", pages(), ids=page_name)
def test_the_targets_of_make_on_a_page_exist(page):
    for command in _MAKE.findall(without_blocks(page.read_text())):
        check_make(command.split())


def test_what_is_a_path_and_what_is_none():
    text = (
        "`plugin/load/recognize.py` `docs/no.md` `csrc/cpu/` `loader.py::f` `*.md` `a/b` `/health` `kivi/OTHER` `x.y`"
    )
    assert paths(text) == ["plugin/load/recognize.py", "docs/no.md", "csrc/cpu", "loader.py", "*.md"]
    assert [exists(path) for path in paths(text)] == [True, False, True, True, True]
    assert exists("vllm/platforms/cpu.py")
    assert not exists("vllm/platforms/no.py")
    assert not exists("ecognize.py")


def test_sections_are_named_as_github_does():
    assert anchors("# Two words\n## `a_b`, and [c](d.md)?\n```\n# no\n```\n") == {"two-words", "a_b-and-c"}
