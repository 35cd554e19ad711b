"""Hybrid models: their attention layers are compressed, and the states of the others are left as they are."""

import re

import pytest

from tests.e2e.families.test_families import EIGHT, ENGINE, TASKS, assert_close
from tests.family_coverage import LATENTS
from tests.tiny_hybrids import save_tiny_hybrid

pytestmark = pytest.mark.e2e

LONG = {"max_model_len": 1024, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def serve(engines, tmp_path_factory):
    folders = {}

    def serve(family, backend, tasks=TASKS, **settings):
        if family not in folders:
            folders[family] = save_tiny_hybrid(tmp_path_factory.mktemp(family), family)
        return engines.run(folders[family], backend, tasks, **{**ENGINE, **LONG, **settings})

    return serve


def hybrid(family, name, layers, *features):
    marks = pytest.mark.covers(name, "states beside it", *features, *LATENTS, "bits=8", "chunked prefill")
    return pytest.param(family, layers, id=family, marks=marks)


SERVED = [
    hybrid("lfm2", "LFM2", "2, 4", "qk-norm", "rope=default"),
    hybrid("nemotron-h", "Nemotron-H", "1, 4", "rope=none"),
    hybrid("granite-4", "Granite 4 (hybrid)", "1, 3", "rope=none"),
    hybrid("falcon-h1", "Falcon-H1", "0-2", "rope=default"),
    hybrid("jamba", "Jamba", "1, 3", "rope=none"),
    hybrid("qwen3-next", "Qwen3-Next", "1, 3", "qk-norm", "rope=partial"),
]


@pytest.mark.parametrize(("family", "layers"), SERVED)
def test_eight_bits_match_the_16_bit_cache(serve, family, layers):
    ours, plain = serve(family, "xquant", xquant=EIGHT), serve(family, "CPU_ATTN")
    assert f"layers {layers} are compressed; " in ours.log
    assert "state-space or linear layers keep their states as they are" in ours.log
    assert_close(ours.tasks[2]["logprobs"][0], plain.tasks[2]["logprobs"][0], 0.03)
    cold, warm, _ = ours.tasks
    assert warm["cached"][0] % block_size(ours) == 0
    assert_close(warm["logits"][0][0].values(), cold["logits"][0][0].values(), 0.05)


def block_size(result):
    """Tokens of a block, as vLLM has aligned it with the states."""
    found = re.search(r"Setting attention block size to (\d+) tokens", result.log)
    return int(found[1]) if found else ENGINE["block_size"]
