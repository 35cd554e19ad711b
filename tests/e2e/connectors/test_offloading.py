"""vLLM's own offloading: not on CPUs, whatever the cache is; and the bytes that it would move are those of pages."""

import pytest

from tests.e2e.engine import EngineFailed
from tests.e2e.families.test_families import ENGINE, PROMPT
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.e2e


def test_it_does_not_start_on_cpus_with_a_16_bit_cache_either(engines, tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama")
    with pytest.raises(EngineFailed) as error:
        engines.run(folder, "CPU_ATTN", [], **{**ENGINE, "kv_offloading_size": 0.1})
    assert "CPU Offloading is currently only supported on CUDA-alike and XPU GPUs" in error.value.log


CASES = {
    "chain of X": ("mha", {"method": "xquant-cl", "cache": "x", "first_layers": 1}),
    "windows": ("gemma3", {"bits": 4, "cache": "latent"}),
}


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("name", CASES)
def test_what_it_takes_for_pages_are_pages(engines, tmp_path, name):
    family, xquant = CASES[name]
    folder = save_tiny_model(tmp_path / "model", family)
    tasks = [{"kind": "offloaded", "prompt": PROMPT}]
    settings = {"xquant": {**xquant, "hot": 0}, "kv_cache_memory_bytes": 4 << 20}
    (moved,) = engines.run(folder, "xquant", tasks, **{**ENGINE, **settings}).tasks
    assert moved["bytes"] == moved["expected"]
    assert moved["cached"] == [192, 192, 192]
    assert moved["destroyed"] != moved["before"]
    assert moved["after"] == moved["before"]
