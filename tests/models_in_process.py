"""vLLM looks at a model's class in the test's own process."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def models_are_looked_at_here():
    """For each class vLLM starts a process that imports all of it, lest CUDA be initialized: ten seconds."""
    from vllm.model_executor.models import registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda look: look())
        yield
