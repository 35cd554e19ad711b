"""What `xquant plan` says of tokens and hot blocks is what real engines then report."""

import re

import pytest

from xquant_vllm.planning.caches import Kind
from xquant_vllm.planning.options import by_kind
from xquant_vllm.planning.plan import PlanRequest, make_plan

pytestmark = pytest.mark.e2e

# Options of the plan and of the engine: memory, context, hot.
SETTINGS = [
    (256 << 20, 1024, None),
    (512 << 20, 2048, None),
    (384 << 20, 3000, None),
    (512 << 20, 4096, 0.4),
    (300_000_000, 2048, 0),
]
CACHES = [
    ("smollm2", Kind("16bit", 16)),
    ("smollm2", Kind("xquant", 4)),
    ("smollm2", Kind("xquant-cl", 2)),
    ("smollm2", Kind("kivi", 4)),
    ("smollm2_mha", Kind("x", 4)),
    ("smollm2_mha", Kind("xquant-cl", 2)),
    ("gemma3", Kind("16bit", 16)),
    ("gemma3", Kind("xquant", 3)),
    ("gemma3", Kind("kivi", 2)),
]


def engine_says(engines, folder, kind, memory, context, hot):
    """Tokens in the cache, and hot ones by the log."""
    backend = {"16bit": "CPU_ATTN", "kivi": "kivi"}.get(kind.method, "xquant")
    settings = {} if kind.method == "16bit" else {"kivi" if backend == "kivi" else "xquant": dict(kind.settings)}
    if hot is not None and backend == "xquant":
        settings["xquant"]["hot"] = hot
    result = engines.run(
        folder,
        backend,
        [],
        **settings,
        kv_cache_memory_bytes=memory,
        max_model_len=context,
        max_num_batched_tokens=2048,
    )
    said = re.search(r"keep the keys and values of up to ([\d,]+) tokens", result.log)
    return result.capacity, int(said[1].replace(",", "")) if said else 0


def check(engines, folder, kind, memory, context, hot):
    plan = make_plan(PlanRequest(str(folder), memory, context, hot, batched_tokens=2048))
    option = by_kind(plan.options, kind)
    tokens, hot_tokens = engine_says(engines, folder, kind, memory, context, hot)
    assert option.cache_tokens == pytest.approx(tokens, rel=0.02)
    assert option.hot_tokens == pytest.approx(hot_tokens, rel=0.02)


def test_the_default_of_a_model_with_windows(engines, tiny):
    check(engines, tiny("gemma3"), Kind("xquant", 4), 4 << 20, 1000, None)


@pytest.mark.nightly
@pytest.mark.parametrize(("memory", "context", "hot"), SETTINGS)
@pytest.mark.parametrize(("name", "kind"), CACHES)
def test_every_cache_in_five_settings(request, engines, name, kind, memory, context, hot):
    check(engines, request.getfixturevalue(name), kind, memory, context, hot)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Kind("xquant", 4, True), ("--basis", "head")),
        (Kind("joint", 2, True), ("--basis", "joint")),
        (Kind("xquant-cl", 3, True), ("--method", "xquant-cl")),
    ],
)
def test_calibrated_folders_hold_what_was_planned_before_there_was_a_text(engines, smollm2, tmp_path, kind, options):
    """And the same is said of the folder itself."""
    from xquant_vllm.cli.main import main

    folder = tmp_path / "calibrated"
    words = ["factorize", str(smollm2), "--out", str(folder), "--calibration", "python-docs", "--no-certificate"]
    assert main([*words, "--calibration-tokens", "512", "--bits", str(kind.bits), *options]) == 0
    before = by_kind(make_plan(PlanRequest(str(smollm2), 256 << 20, 1024)).options, kind)
    after = by_kind(make_plan(PlanRequest(str(folder), 256 << 20, 1024)).options, kind)
    tokens, hot_tokens = engine_says(engines, folder, kind, 256 << 20, 1024, None)
    for option in (before, after):
        assert option.cache_tokens == pytest.approx(tokens, rel=0.02)
        assert option.hot_tokens == pytest.approx(hot_tokens, rel=0.02)
