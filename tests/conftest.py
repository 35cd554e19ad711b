"""Fixtures shared by all tests: the real checkpoint, real texts, and engines."""

import pydoc_data.topics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Scripts are no packages that anybody installs; their tests import them from where they lie.
sys.path[:0] = [str(ROOT / "tools"), str(ROOT / "examples")]


def pytest_configure(config: pytest.Config) -> None:
    """Record what tests of model families cover."""
    from tests.family_coverage import FamilyCoverage

    config.pluginmanager.register(FamilyCoverage(config))


# First, so that the option -m sees what is nightly.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave all but the first cases of tests of many alike to nightly runs."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("alike")
        if mark is None or item.get_closest_marker("nightly") is not None:
            continue
        test = item.nodeid.partition("[")[0]
        seen[test] += 1
        if seen[test] > mark.kwargs["keep"]:
            item.add_marker(pytest.mark.nightly)


def _prepared(name: str) -> Path:
    """The checkpoint that ``make model MODEL=name`` prepares; made on first use, checked afterwards."""
    command = [sys.executable, str(ROOT / "tools" / "prepare_model.py"), "--model", name]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert process.returncode == 0, process.stderr
    return Path(process.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: grouped-query attention, chat-tuned."""
    return _prepared("smollm2")


@pytest.fixture(scope="session")
def smollm2_mha() -> Path:
    """The same model with its KV heads repeated: multi-head attention."""
    return _prepared("smollm2-mha")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma 3 270M, a base model: a sliding window in five layers of six, one KV head."""
    return _prepared("gemma3")


@pytest.fixture(scope="session")
def qwen_coder() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct (0.5 GB to load): biases on keys and values, seven query heads on a kv head."""
    return _prepared("qwen-coder-0.5b")


@pytest.fixture(scope="session")
def tokenizer(smollm2):
    """The tokenizer of ``smollm2``."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def documentation(tokenizer) -> list[int]:
    """Tokens of a few thousand words of prose: the language reference that ships with Python."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "compound", "operator-summary"))
    return tokenizer.encode(text)


@pytest.fixture(params=("portable", "avx2", "avx512", "vnni", "amx", "amx-emulated"))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The C++ kernels use this instruction set; afterwards the best one, and as many threads as before."""
    import torch

    from tests.cpu_kernels import using
    from xquant_vllm.attention.cpu import library as cpu

    threads = torch.get_num_threads()
    with using(request.param) as there:
        if not there:
            pytest.skip(f"this machine has no {request.param}")
        assert cpu.isa() == request.param
        yield request.param
    torch.set_num_threads(threads)
