"""docs/troubleshooting.md quotes messages that the code, or vLLM, still has."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
# A row's first cell: messages as code, `...` for what varies; "(vLLM)" behind those that are not this package's.
ROWS = [line.split(" | ")[0].removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| `")]
MESSAGES = [(message, "(vLLM)" in row) for row in ROWS for message in re.findall("`([^`]+)`", row)]
VLLM_FILES = ("v1/core/kv_cache_utils.py", "v1/attention/backends/registry.py")


def _texts(path: Path) -> list[str]:
    """All strings of a file, neighbours joined; f-strings without what is filled in."""
    tree = ast.parse(path.read_text())
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    """What this package says, and what vLLM does."""
    vllm = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    ours = [text for path in sorted((ROOT / "xquant_vllm").rglob("*.py")) for text in _texts(path)]
    theirs = [text for name in VLLM_FILES for text in _texts(vllm / name)]
    return "\n".join(ours), "\n".join(theirs)


def test_the_page_quotes_messages():
    assert len(MESSAGES) > 30


@pytest.mark.parametrize(("message", "from_vllm"), MESSAGES, ids=[message[:40] for message, _ in MESSAGES])
def test_the_code_says_it(message, from_vllm, texts):
    ours, theirs = texts
    parts = [part.strip() for part in message.split("...")]
    said = theirs if from_vllm or message.startswith("Unknown attention backend") else ours
    assert not [part for part in parts if part not in said], f"no message has this; correct {PAGE.name}"
