"""Fixtures shared by all tests: the real checkpoint, real texts, and engines."""

import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Scripts are no packages that anybody installs; their tests import them from where they lie.
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "examples")]


def pytest_configure(config: pytest.Config) -> None:
    """Record what tests of model families cover."""
    from tests.family_coverage import FamilyCoverage

    config.pluginmanager.register(FamilyCoverage(config))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The SmolLM2-135M-Instruct checkpoint that ``make model`` prepares; made on first use, checked afterwards."""
    command = [sys.executable, str(ROOT / "tools" / "prepare_model.py"), "--model", "smollm2"]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert process.returncode == 0, process.stderr
    return Path(process.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    """Its tokenizer."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def documentation(tokenizer) -> list[int]:
    """Tokens of a few thousand words of prose: the language reference that ships with Python."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "compound", "operator-summary"))
    return tokenizer.encode(text)
