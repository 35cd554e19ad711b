"""benchmarks/gpu_suite.py: that it runs, that its checks fail where they should, and its formulas."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import kivi, report
from benchmarks.gpu.baselines import BASELINES
from benchmarks.gpu.cases import Spec, make_plan
from benchmarks.gpu.checks import SERVED, Check, plan_checks, relative_errors, run_check
from benchmarks.gpu.cost import (
    Cost,
    Roofs,
    attention_cost,
    cached_bytes,
    dense_attention_cost,
    floor,
    latent_channels,
    store_cost,
    visible_pairs,
    visible_tokens,
)
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.layers import FORMATS, LLAMA_2, LLAMA_3, TINY, fill_pages, make_layer, shapes
from benchmarks.gpu.problem import Problem, exact_attention
from benchmarks.gpu.timing import Timing, measure
from benchmarks.gpu.workers import Worker, WorkerError, each
from xquant_vllm.attention import reference
from xquant_vllm.attention.gpu.gpu_plan import prepare
from xquant_vllm.codec.allocated import AllocatedFormat
from xquant_vllm.codec.layout import PageLayout

ROOT = Path(__file__).resolve().parent.parent.parent
CPU = torch.device("cpu")


def run_suite(*arguments: str, interpret: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1" if interpret else "0"}
    environment.pop("PYTHONPATH", None)
    command = [sys.executable, "benchmarks/gpu_suite.py", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)


# --- The whole ---


@pytest.mark.parametrize(
    "only",
    [
        pytest.param((), marks=pytest.mark.nightly, id="all"),
        pytest.param(("--only", "check .*uniform 4|check store.*X|uniform 4"), id="some"),
    ],
)
def test_tiny(tmp_path: Path, only: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    done = run_suite("--tiny", "--json", "--seed", "1", "--out", str(tmp_path), *only)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    kernels_of = {check["name"]: check for check in results["checks"]}
    assert {name.split(",")[0] for name in kernels_of} == {"attention", "store"}
    wrong = [c for c in results["checks"] if c["status"] != "passed" and c.get("reason") != "no store kernel"]
    assert not wrong
    assert all(check["status"] == "passed" for name, check in kernels_of.items() if name.startswith("attention"))
    assert results["label"] == "interpreter, not a measurement"
    assert results["roofs"] is None
    assert results["timings"]
    for row in results["timings"]:
        assert row["label"] == "interpreter, not a measurement"
        assert not {"share_of_roof", "speed_to_16_bit"} & row.keys()
        assert row["status"] == "ok" or row["reason"] == "no store kernel", row
    assert {row["operation"] for row in results["timings"]} == {"decode", "prefill", "store"}
    assert all(target["reached"] is None for target in results["targets"])
    assert not results["left_out"]
    assert "not measured" in done.stdout
    assert "seed 1" in done.stderr
    [written] = tmp_path.iterdir()
    assert json.loads(written.read_text()) == results


def test_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = run_suite(interpret=False)
    assert done.returncode == 2
    assert not done.stdout
    [line] = done.stderr.splitlines()
    assert "TRITON_INTERPRET=1" in line


def test_needs_nothing_but_torch_and_triton() -> None:
    pytest.importorskip("triton")
    script = (
        "import sys, torch, triton; before = set(sys.modules); import benchmarks.gpu_suite as suite\n"
        "suite.KERNELS['triton']()\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    others = {name for name in done.stdout.split() if not name.startswith("_")}
    assert others <= {"benchmarks", "xquant_vllm", "torch", "triton"}


# --- Checks ---


def checked(operation: str, kernels: Kernels, **given) -> dict:
    return run_check(Check("one", operation, Spec(seqs=((50, 3), (20, 1)), **given)), kernels, CPU)


RIGHT = Kernels("reference", reference.paged_attention, reference.store)


def test_right_kernels_pass() -> None:
    for check in plan_checks(3, tiny=True, dtypes=(torch.float32, torch.bfloat16)):
        result = run_check(check, RIGHT, CPU)
        assert result["status"] == "passed", result


@pytest.mark.parametrize("tiny", [False, True])
def test_what_is_served_by_default_comes_first_in_its_own_kernel(tiny: bool) -> None:
    checks = plan_checks(5, tiny=tiny, dtypes=(torch.float32, torch.float16))[: len(SERVED)]
    assert [check.name.split(", ", 1)[1].rsplit(", ", 1)[0] for check in checks] == [*SERVED]
    for check in checks:
        assert prepare(make_plan(check.spec), check.spec.dtype).general_because is None, check.name


def off_by_a_percent(query, pages, plan, batch, output) -> None:
    reference.paged_attention(query, pages, plan, batch, output)
    output *= 1.01


def one_head_wrong(query, pages, plan, batch, output) -> None:
    reference.paged_attention(query, pages, plan, batch, output)
    output[1, 2] += 0.05 * output[1, 2].norm() / output.shape[-1] ** 0.5


def one_row_left_out(query, pages, plan, batch, output) -> None:
    before = output[1, 0].clone()
    reference.paged_attention(query, pages, plan, batch, output)
    output[1, 0] = before


def sees_one_token_more(query, pages, plan, batch, output) -> None:
    reference.paged_attention(query, pages, plan, replace(batch, seq_lens=batch.seq_lens + 1), output)


def forgets_the_window(query, pages, plan, batch, output) -> None:
    reference.paged_attention(query, pages, replace(plan, sliding_window=8), batch, output)


def writes_padding(query, pages, plan, batch, output) -> None:
    output.zero_()
    reference.paged_attention(query, pages, plan, batch, output)


def writes_pages(query, pages, plan, batch, output) -> None:
    reference.paged_attention(query, pages, plan, batch, output)
    pages[0][0, 0] ^= 1


def crashes(*arguments) -> None:
    raise RuntimeError("a launch failed\nsomewhere")


@pytest.mark.parametrize(
    "attention",
    [off_by_a_percent, one_head_wrong, one_row_left_out, sees_one_token_more, forgets_the_window, writes_padding,
     writes_pages, crashes],
)  # fmt: skip
def test_wrong_attention_fails(attention) -> None:
    assert checked("attention", RIGHT)["status"] == "passed"
    result = checked("attention", Kernels("wrong", attention, None))
    assert result["status"] == "failed"
    assert "\n" not in result["reason"]


def test_wrong_attention_fails_in_half_precision() -> None:
    def off_by_a_tenth(query, pages, plan, batch, output) -> None:
        reference.paged_attention(query, pages, plan, batch, output)
        output *= 1.1

    for dtype in (torch.float16, torch.bfloat16):
        assert checked("attention", RIGHT, dtype=dtype)["status"] == "passed"
        assert checked("attention", Kernels("wrong", off_by_a_tenth, None), dtype=dtype)["status"] == "failed"


def stores_nothing(pages, plan, slot_mapping, inputs) -> None:
    pass


def stores_too_large(pages, plan, slot_mapping, inputs) -> None:
    reference.store(pages, plan, slot_mapping, tuple(1.05 * x for x in inputs))


def stores_padding(pages, plan, slot_mapping, inputs) -> None:
    reference.store(pages, plan, slot_mapping.clamp_min(0), inputs)


def stores_elsewhere_too(pages, plan, slot_mapping, inputs) -> None:
    reference.store(pages, plan, slot_mapping, inputs)
    used = set((slot_mapping // plan.layout.block_size).tolist())
    unused = next(block for block in range(len(pages[0])) if block not in used)
    pages[0][unused, 3] = 0


def forgets_the_last_token(pages, plan, slot_mapping, inputs) -> None:
    reference.store(pages, plan, slot_mapping, tuple(x[:-1] for x in inputs))


@pytest.mark.parametrize("store", [stores_nothing, stores_too_large, stores_padding, forgets_the_last_token, crashes])
@pytest.mark.parametrize("given", [{}, {"allocated": 1.0}, {"kind": "deltas", "earlier": (4, 2)}, {"key_bits": 16}])
def test_wrong_store_fails(store, given: dict) -> None:
    given = {"key_group": 64, "key_outliers": 0, **given}
    assert checked("store", RIGHT, **given)["status"] == "passed"
    assert checked("store", Kernels("wrong", None, store), **given)["status"] == "failed"


def test_store_into_another_block_fails() -> None:
    spec = Spec(seqs=((3, 3),))
    assert run_check(Check("one", "store", spec), RIGHT, CPU)["status"] == "passed"
    wrong = Kernels("wrong", None, stores_elsewhere_too)
    statuses = set()
    for seed in range(8):  # whether a block is unused depends on where tokens come to lie
        try:
            statuses.add(run_check(Check("one", "store", replace(spec, seed=seed)), wrong, CPU)["status"])
        except StopIteration:
            continue
    assert statuses == {"failed"}


def test_missing_kernels_are_said_to_be_missing() -> None:
    nothing = Kernels("none", None, None)
    assert checked("store", nothing)["reason"] == "no store kernel"
    assert checked("attention", nothing)["status"] == "missing"


def test_errors() -> None:
    expected = torch.ones(4, 2, 8)
    assert relative_errors(expected, expected) == (0, 0)
    actual = expected.clone()
    actual[1, 1] *= 1.5
    over_all, worst = relative_errors(actual, expected)
    assert worst == pytest.approx(0.5)
    assert over_all == pytest.approx(0.5 / 8**0.5)
    actual[0, 0, 0] = torch.nan
    assert relative_errors(actual, expected) == (torch.inf, torch.inf)


# --- Cost ---


def test_visible() -> None:
    assert (visible_tokens(100, 3), visible_pairs(100, 3)) == (100, 98 + 99 + 100)
    assert (visible_tokens(100, 3, 10), visible_pairs(100, 3, 10)) == (12, 30)
    assert (visible_tokens(3, 3, 2), visible_pairs(3, 3, 2)) == (3, 1 + 2 + 2)
    assert (visible_tokens(10, 0), visible_pairs(10, 0)) == (0, 0)


def test_cost_of_latents() -> None:
    """2 kv heads of 64 with 3 query heads each, 4 bits: 2 * 2 * (32 + 4) = 144 bytes per token."""
    plan = make_plan(Spec(key_outliers=0))
    found = attention_cost(plan, [100], [1])
    pages, table, rows = 100 * 144, 7 * 4, 2 * 6 * 64 * 2
    up = 2 * (2 * 64 * 64) * 2
    assert found.bytes == pages + table + rows + up == 48732
    keys = 2 * (2 * 64) * 64 * 100 + 2 * 6 * 64 * 100  # rematerialized, and scores
    values = 2 * (2 * 64) * 3 * (64 + 100)  # latents weighed, and projected once
    assert found.flops == keys + values == 1841152
    # Without RoPE queries score against latents instead.
    absorbed = attention_cost(make_plan(Spec(key_outliers=0, rope="none")), [100], [1])
    assert absorbed == Cost(found.bytes, 2 * values)
    # Values that the output projection up-projects need no matrix and no product with it.
    folded = attention_cost(make_plan(Spec(key_outliers=0, folded=True)), [100], [1])
    assert folded == Cost(found.bytes - up // 2, keys + 2 * (2 * 64) * 3 * 100)
    # A long prefill of a wide latent projects values for every token, not for every pair.
    wide = make_plan(Spec(key_outliers=0, kind="x", hidden_size=192, key_group=192))
    rematerialized = 2 * (2 * 192) * 64 * 300 + 2 * 6 * 64 * (300 * 301 // 2)
    assert attention_cost(wide, [300], [300]).flops == 2 * rematerialized
    assert store_cost(plan, 10) == Cost(10 * (8 + 144 + 2 * 2 * 64 * 2), 0)


def test_cost_of_several_sequences_is_shared() -> None:
    plan = make_plan(Spec(key_outliers=0))
    one, two = attention_cost(plan, [100], [1]), attention_cost(plan, [100, 100], [1, 1])
    assert two.flops == 2 * one.flops
    assert two.bytes == 2 * one.bytes - 32768  # both up-projections


def test_cost_of_a_chain() -> None:
    """An anchor of 4 bits, deltas of 2 and 3: groups of 64 channels with 4 bytes of parameters."""
    spec = Spec(kind="deltas", hidden_size=128, key_bits=3, earlier=(4, 2))
    plan = make_plan(spec)
    assert latent_channels(plan, plan.key_terms, 0) == 128
    assert cached_bytes(plan) == (48 + 8) + (64 + 8) + (32 + 8)
    assert store_cost(plan, 1).bytes == 8 + 2 * 128 + cached_bytes(plan)
    following = make_plan(replace(spec, kind="chain", joint=True, key_outliers=0))
    assert latent_channels(following, following.key_terms, 1) == 3 * 128
    assert store_cost(following, 2).flops == 2 * (2 * 256 * 128)


def test_channels_that_are_not_stored_cost_nothing() -> None:
    plan = make_plan(Spec(key_outliers=0))
    runs = (((4, 16),), ((8, 8), (2, 24)))
    streams = (AllocatedFormat(64, runs), AllocatedFormat(64, runs))
    plan = replace(plan, layouts=(PageLayout(streams, 16),))
    assert [latent_channels(plan, plan.key_terms, head) for head in range(2)] == [16, 32]
    found = attention_cost(plan, [100], [1])
    assert found.flops == 2 * 48 * 64 * 100 + 2 * 6 * 64 * 100 + 2 * 48 * 3 * (64 + 100)
    assert cached_bytes(plan) == 2 * ((8 + 1) + (8 + 6 + 1))


def test_cost_of_keys_and_values() -> None:
    rows = 2 * 6 * 64 * 2
    assert dense_attention_cost(6, 2, 64, [100], [1]) == Cost(2 * 2 * 64 * 2 * 100 + rows, 4 * 6 * 64 * 100)
    assert dense_attention_cost(6, 2, 64, [100], [1], 0.5).bytes == 2 * 64 * 100 + rows


def test_floor() -> None:
    roofs = Roofs(copy=100, matrix=1000)
    assert floor(Cost(200, 1000), roofs) == (2, "copy")
    assert floor(Cost(200, 3000), roofs) == (3, "matrix")


# --- Layers ---


@pytest.mark.parametrize("name", FORMATS[TINY.name])
def test_layers_of_every_format(name: str) -> None:
    plan = make_layer(TINY, name, 32, 16, CPU, 0)
    pages = fill_pages(plan, 3, 0)
    assert [tuple(of.shape) for of in pages] == [(3, layout.page_bytes) for layout in plan.layouts]


def test_realistic_bytes() -> None:
    """What a 16-bit cache needs 4096 bytes for, and one of 32 heads 16384."""
    bits = {name: make_layer(LLAMA_3, name, 1, 16, CPU, 0).layout.bytes_per_token for name in FORMATS[LLAMA_3.name]}
    assert bits == {"allocated 4": 1088, "allocated 2": 576, "uniform 4": 1088, "joint allocated 4": 1087}
    plan = make_layer(LLAMA_3, "allocated 4", 1, 16, CPU, 0)
    runs = plan.layout.streams[0].runs
    assert len(set(runs)) > 1  # heads differ
    assert all(len(of_head) > 2 for of_head in runs)


def test_shapes_are_all_different() -> None:
    names = [shape.name for shape in shapes()]
    assert len(set(names)) == len(names)
    assert {shape.model for shape in shapes()} == {LLAMA_2, LLAMA_3}


# --- Baselines, timing, processes, report ---


@pytest.mark.parametrize("query_len", [1, 4, 20])
def test_dense_attention_is_attention(query_len: int) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, query_len, 6, 16, generator=generator)
    keys, values = (torch.randn(2, 3, 32, 2, 16, generator=generator) for _ in range(2))
    prepared = BASELINES[0].prepare(Problem(queries, keys, values, 20, 16))
    assert BASELINES[0].unavailable() is None
    assert len(prepared.calls) == 2
    assert relative_errors(prepared.calls[0]()[0], prepared.expected())[1] < 1e-5


@pytest.mark.parametrize(("bits", "most"), [(4, 0.12), (2, 0.6)])
def test_kivi_pages_hold_the_problem(bits: int, most: float) -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 3, 2, 4, 64, generator=generator)
    keys, values = (torch.randn(2, 3, 304, 2, 64, generator=generator) for _ in range(2))
    prepared = kivi.prepare(bits, Problem(queries, keys, values, 300, 16))
    assert len(prepared.calls) == 2
    exact = exact_attention(queries[0, 0], keys[0, 0, :300], values[0, 0, :300])
    assert 1e-3 < relative_errors(prepared.expected(), exact)[0] < most
    # 256 of 300 keys and 172 of 300 values are quantized.
    assert prepared.number_bytes == pytest.approx(2 - (428 / 600) * (2 - bits / 8 - 4 / 32))


def test_missing_baselines_are_named() -> None:
    for baseline in BASELINES[1:]:
        if not torch.cuda.is_available():
            reason = baseline.unavailable()
            assert reason
            assert "needs a GPU" in reason or "No module named" in reason


def test_by_the_clock() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = measure({"one": [lambda: time.sleep(0.01)], "wrong": [crashes]}, samples=3, seconds=1)
    assert isinstance(found["one"], Timing)
    assert found["one"].method == "clock"
    assert found["one"].median >= 0.01
    assert isinstance(found["wrong"], RuntimeError)


def test_workers_are_replaced() -> None:
    worker = Worker()
    first = worker.call(os.getpid)
    assert first != os.getpid()
    with pytest.raises(WorkerError, match="ValueError"):
        worker.call(int, "x")
    assert worker.call(os.getpid) == first
    with pytest.raises(WorkerError, match="died"):
        worker.call(os._exit, 1)
    second = worker.call(os.getpid)
    assert second != first
    with pytest.raises(WorkerError, match="within"):
        worker.call(time.sleep, 60, timeout=0.2)
    assert worker.call(abs, -3) == 3
    worker.close()


@pytest.mark.parametrize("processes", [0, 2])
def test_each(processes: int) -> None:
    found = dict(each([3, -4, 5], lambda worker, item: worker.call(abs, item), processes=processes))
    assert found == {3: 3, -4: 4, 5: 5}


def row(**given) -> dict:
    usual = {
        "kind": "xquant", "status": "ok", "model": LLAMA_3.name, "operation": "decode",
        "variant": "allocated 4 (triton)", "format": "allocated 4", "shape": "s",
        "batch": 16, "context": 4096, "query_len": 1, "floor_us": 50.0,
        "share_of_roof": 0.7, "speed_to_16_bit": 1.5, "compared_with": "SDPA flash",
    }  # fmt: skip
    return usual | given


def reached(*rows: dict) -> list:
    return [target["reached"] for target in report.targets(rows)]


def test_targets() -> None:
    assert reached() == [None, None, None]
    assert reached(row()) == [None, True, True]
    assert reached(row(), row(share_of_roof=0.59)) == [None, False, True]
    assert reached(row(), row(share_of_roof=0.59, floor_us=10.0)) == [None, True, True]  # launches, not kernels
    assert reached(row(speed_to_16_bit=1.0)) == [None, True, False]
    assert reached(row(context=1024)) == [None, True, None]
    assert reached(row(label="not a measurement")) == [None, None, None]
    assert reached(row(status="wrong")) == [None, None, None]
    store = row(operation="store", batch=8192, share_of_roof=0.8)
    assert reached(store) == [True, None, None]
    assert reached(store, row(operation="store", batch=8192, share_of_roof=0.79)) == [False, None, None]
    assert reached(row(operation="store", batch=16)) == [None, None, None]


def test_json_is_strict() -> None:
    assert json.loads(report.as_json({"error": float("inf"), "us": [1.23456789e-3]})) == {
        "error": "inf",
        "us": [1.23457e-3],
    }
