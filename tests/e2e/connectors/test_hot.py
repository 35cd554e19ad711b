"""Pages that a connector writes and the pool of hot blocks: random traces with a small cache and a folder of pages.

Blocks are freed, read into from files, and attended to while the pool still has their former tokens. As in
../hot/test_coherence.py, every fourth step what is hot is compared with the pages. If blocks were not forgotten when
they are read into, it would be off by 10^7 units.
"""

import re

import pytest

from tests.e2e.connectors.test_exchange import transfer
from tests.e2e.hot.test_coherence import ENGINE, STEPS, ULPS, X, assert_same_answers, pool_bytes
from tests.tiny_models import save_tiny_model

pytestmark = pytest.mark.e2e


def test_what_was_read_is_hot_only_as_it_was_read(engines, tmp_path):
    """With windows, whose blocks come from the same pool."""
    model = save_tiny_model(tmp_path / "model", "gemma3")
    tasks = [{"kind": "hot_trace", "seed": 0, "steps": STEPS}]
    engine = {**ENGINE, "dtype": "float32", "num_gpu_blocks_override": 42}
    results = []
    for hot, connector in (
        (pool_bytes(model, "float32"), {"kv_transfer_config": transfer(tmp_path / "pages", "kv_both")}),
        (0, {}),
    ):
        result = engines.run(model, "xquant", tasks, xquant={"bits": 16, **X, "hot": hot}, **engine, **connector)
        results.append(result)
    hot, cold = (result.tasks[0] for result in results)
    assert hot["worst"] <= ULPS["float32"]
    assert min(hot["checked"], hot["hot_rows"], hot["promoted_tokens"], hot["preemptions"]) > 0
    read = re.search(r"xquant: pages: .* written in [\d.]+ s, (\d+) \(", results[0].log)
    assert int(read[1]) > 10
    assert_same_answers(hot, cold)
