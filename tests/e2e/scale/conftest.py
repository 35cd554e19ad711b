"""Engines of several ranks on one machine, and the same model on one."""

import os
import statistics
from pathlib import Path

import pytest

from tests.e2e.engine import Engines, Result
from tests.e2e.families.test_families import ENGINE, PROMPT, TASKS
from tests.tiny_models import save_tiny_model

HERE = Path(__file__).parent
GREEDY = {"kind": "greedy", "prompts": [PROMPT[:40], PROMPT[100:130], PROMPT], "max_tokens": 16}


class Ranks:
    """Runs the same questions on one rank and on several."""

    def __init__(self, engines: Engines, folder: Path) -> None:
        self._engines, self._folder = engines, folder

    def model(self, family: str, layers: int = 3) -> Path:
        """A tiny checkpoint; one for all tests."""
        folder = self._folder / f"{family}-{layers}"
        return folder if folder.exists() else save_tiny_model(folder, family, num_hidden_layers=layers)

    def one(self, model: str | Path, backend: str = "xquant", **engine) -> Result:
        """A family, or a folder."""
        return self._engines.run(self._folder_of(model), backend, [*TASKS, GREEDY], **{**ENGINE, **engine})

    def several(self, model: str | Path, backend: str = "xquant", environment=None, **engine) -> Result:
        """The same on two cores; ``environment`` has further variables."""
        return self._engines.run(
            self._folder_of(model),
            backend,
            [*TASKS, GREEDY],
            environment={**self.cores, **(environment or {})},
            **{**ENGINE, **engine},
        )

    @property
    def cores(self) -> dict[str, str]:
        """The variable that gives two ranks of CPUs a core each."""
        cores = sorted(os.sched_getaffinity(0))[:2]
        return {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}

    def _folder_of(self, model: str | Path) -> Path:
        return self.model(model) if isinstance(model, str) else model


@pytest.fixture(scope="session")
def ranks(engines, tmp_path_factory) -> Ranks:
    """Engines of one rank and of several."""
    return Ranks(engines, tmp_path_factory.mktemp("ranks"))


def search_path(*folders: Path) -> str:
    """``PYTHONPATH`` with further folders, which a rank's process has from its parent."""
    return os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def distance(ours: Result, expected: Result) -> float:
    """Mean absolute difference of the log-probabilities of a prompt."""
    pairs = zip(ours.tasks[2]["logprobs"][0], expected.tasks[2]["logprobs"][0], strict=True)
    found = statistics.mean(abs(p - q) for p, q in pairs)
    print(f"mean absolute difference of log-probability {found:.5f}")
    return found


def tokens(result: Result) -> list[list[int]]:
    """Greedy continuations."""
    return result.tasks[3]["tokens"]
