"""Store and paged attention against the FP32 reference on the CPU, on random layers and batches.

Nothing that must not be read or written is left alone: unused pages and slots are NaN bytes, block tables hold absurd
ids, outputs and the gaps between pages are poison before a call and are looked at after it.
"""

import random
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Spec, make_case, make_plan, on_device, random_latents
from benchmarks.gpu.kernels import Kernels
from xquant_vllm.attention import reference
from xquant_vllm.attention.latents import read_slots
from xquant_vllm.attention.plan import AttentionLayerPlan
from xquant_vllm.codec.allocated import AllocatedFormat, channel_tables
from xquant_vllm.codec.pages import load_slots, store_latents

# Of outputs, by the dtype of the products' operands: error over all, and of the worst row (a query token's head).
TOLERANCE = {torch.float32: (2e-5, 1e-4), torch.float16: (4e-3, 2e-2), torch.bfloat16: (2e-2, 8e-2)}
# What is stored may be off by more than the reference's by this, over all and in the worst token's head: a number half
# way between two codes may become either.
STORE_TOLERANCE = (1e-3, 2e-2)

# What pages hold.
FORMATS: dict[str, dict[str, Any]] = {
    **{f"uniform {bits}": {"key_bits": bits, "value_bits": bits} for bits in (4, 2, 3, 8, 16)},
    "allocated": {"allocated": 1.0},
    "joint 4": {"joint": True},
    "joint allocated": {"joint": True, "allocated": 1.0},
    "X 4": {"kind": "x"},
    "X allocated": {"kind": "x", "allocated": 1.0},
    "X deltas": {"kind": "deltas", "key_bits": 2, "earlier": (4, 2, 3)},
    "chain": {"kind": "chain", "key_bits": 2, "earlier": (4, 3)},
    "joint chain": {"kind": "chain", "joint": True, "earlier": (4, 2), "allocated": 0.7},
}
PHASES = ("decode", "several tokens", "prefill")
# Each in every run, whatever the others happen to draw.
FEATURES: dict[str, dict[str, Any]] = {
    "head size 256": {"head_size": 256, "kv_heads": 1, "group": 2},
    "head size 80": {"head_size": 80},
    "16 queries per kv head": {"kv_heads": 1, "group": 16},
    "absorbed keys": {"rope": "none", "norm": False, "bias": True, "soft_cap": None},
    "absorbed keys of runs": {"rope": "none", "norm": False, "soft_cap": None, "allocated": 1.0},
    "window": {"window": 16},
    "sinks": {"sinks": True, "bias": True},
    "soft cap": {"soft_cap": 5.0, "bias": True, "rope": "none"},
    "folded values": {"folded": True},
    "folded values of runs": {"folded": True, "allocated": 1.0},
    "norm and bias": {"norm": True, "bias": True},
    "prompts among decodes": {"seqs": ((30, 1), (20, 2), (33, 19), (17, 1)), "host_lengths": True, "window": None},
    "exact prompts": {"seqs": ((30, 1), (37, 19), (17, 17)), "host_lengths": True, "exact_from": 2},
    "exact prompts of X": {"seqs": ((37, 19),), "host_lengths": True, "exact_from": 2, "kind": "x"},
    "interleaved and partial RoPE": {"rope": "interleaved", "rotary_size": 32},
}


# What latents per head are served as, for which there is a decode kernel of its own: in every run, and first.
SERVED: dict[str, dict[str, Any]] = {
    "as served": {},
    **{f"as served with {bits} bits": {"key_bits": bits, "value_bits": bits} for bits in (2, 3, 8)},
    "as served, normalized keys": {"norm": True},
    "as served, keys with a bias": {"bias": True},
    "as served, calibrated": {"allocated": 1.0, "seed": 3},
}


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: names are unique.
        operation: ``"attention"`` or ``"store"``.
        spec: what it is done on.
    """

    name: str
    operation: str
    spec: Spec


def plan_checks(seed: int, *, tiny: bool, dtypes: Sequence[torch.dtype]) -> list[Check]:
    """The checks of a run, the most important first.

    Args:
        seed: of every draw.
        tiny: few and small ones.
        dtypes: of queries, to choose from.
    """
    choose = random.Random(seed)
    drawn: list[Check] = []

    def add(name: str, operation: str, phase: str, given: dict[str, Any]) -> None:
        spec = replace(_random_spec(choose, phase, tiny, dtypes), **given)
        drawn.append(Check(name, operation, _fitting(choose, spec)))

    for at, (name, given) in enumerate(SERVED.items()):
        phase = PHASES[at % 2]
        spec = _served_spec(_random_spec(choose, phase, tiny, dtypes), 64 if tiny else 128, dtypes)
        drawn.append(Check(f"attention, {name}, {phase}", "attention", replace(spec, **given)))
    for index, phase in enumerate(PHASES):
        for at, (name, given) in enumerate(FORMATS.items()):
            if not tiny or at % len(PHASES) == index:
                add(f"attention, {name}, {phase}", "attention", phase, given)
    for at, (name, given) in enumerate(FEATURES.items()):
        phase = PHASES[at % len(PHASES)]
        add(f"attention, {name}, {phase}", "attention", phase, given)
    for name, given in FORMATS.items():
        add(f"store, {name}", "store", "several tokens" if tiny else "prefill", given)
    return drawn


def _random_spec(choose: random.Random, phase: str, tiny: bool, dtypes: Sequence[torch.dtype]) -> Spec:
    new = {"decode": (1,), "several tokens": (2, 3, 4, 5), "prefill": (9, 17) if tiny else (17, 70, 300)}[phase]
    seqs = []
    for _ in range(choose.randint(1, 1 if tiny and phase == "prefill" else 2 if tiny else 5)):
        past = choose.randint(0, 24) if tiny else choose.choice((0, choose.randint(0, 700), choose.randint(0, 1700)))
        tokens = choose.choice(new)
        seqs.append((past + tokens, tokens))
    if phase != "prefill" and not tiny:
        seqs.append((choose.randint(1, 300), 0))
    head_size = choose.choice((64, 64, 96) if tiny else (64, 80, 96, 128, 128, 256))
    return Spec(
        seqs=tuple(seqs),
        kv_heads=choose.choice((1, 1, 2) if tiny else (1, 2, 3, 4)),
        group=choose.choice((1, 2, 4) if tiny else (1, 2, 3, 4, 7, 8, 16)),
        head_size=head_size,
        hidden_size=choose.choice((64, 192) if tiny else (192, 320, 520, 1024)),
        key_outliers=choose.randint(0, 2),
        value_outliers=choose.randint(0, 1),
        block_size=choose.choice((16, 32) if tiny else (16, 32, 48, 128)),
        dtype=choose.choice(list(dtypes)),
        bias=choose.random() < 0.3,
        norm=choose.random() < 0.3,
        rope=choose.choice(("neox", "neox", "interleaved")),
        rotary_size=choose.choice((None, head_size // 2)),
        window=choose.choice((None, None, None, 7, 100)),
        soft_cap=choose.choice((None, None, 20.0)),
        strided=choose.random() < 0.5,
        sinks=choose.random() < 0.2,
        folded=choose.random() < 0.3,
        host_lengths=phase != "decode" and choose.random() < 0.7,
        seed=choose.randrange(2**30),
    )


def _served_spec(spec: Spec, head_size: int, dtypes: Sequence[torch.dtype]) -> Spec:
    """The batch of a drawn case, with the layer that is served if nothing is set."""
    served = Spec(head_size=head_size, key_group=head_size, value_group=head_size, key_outliers=1, folded=True)
    drawn = ("seqs", "kv_heads", "group", "block_size", "strided", "host_lengths", "seed")
    half = [dtype for dtype in dtypes if dtype != torch.float32]
    return replace(served, **{name: getattr(spec, name) for name in drawn}, dtype=(half or [*dtypes])[0])


def _fitting(choose: random.Random, spec: Spec) -> Spec:
    """With groups and a partial RoPE that divide what the spec came to."""
    width = spec.kv_heads * spec.head_size if spec.joint else spec.head_size
    if spec.kind in ("x", "deltas"):
        width = spec.hidden_size
    groups = [size for size in range(16, width + 1, 8) if width % size == 0][-3:]
    return replace(
        spec,
        key_group=choose.choice(groups),
        value_group=choose.choice(groups),
        rotary_size=None if spec.rotary_size is None else min(spec.rotary_size, spec.head_size),
    )


def run_check(check: Check, kernels: Kernels, device: torch.device) -> dict[str, Any]:
    """Compare; returns the check as it goes into the results.

    Its ``status`` is ``"passed"``, ``"failed"``, or ``"missing"`` where there is no such kernel.
    """
    result: dict[str, Any] = {"name": check.name, "kernels": kernels.name}
    began = time.perf_counter()
    spec = {name: value for name, value in asdict(check.spec).items() if value != getattr(Spec, name)}
    result["spec"] = {name: str(value) if name == "dtype" else value for name, value in spec.items()}
    compare = check_store if check.operation == "store" else check_attention
    if (kernels.store if check.operation == "store" else kernels.paged_attention) is None:
        return result | {"status": "missing", "reason": f"no {check.operation} kernel"}
    try:
        result |= compare(check.spec, kernels, device)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        result |= {"status": "failed", "reason": f"{type(error).__name__}: {lines[0]}"}
        result["traceback"] = traceback.format_exc(limit=-4)
    return result | {"seconds": round(time.perf_counter() - began, 2)}


def _verdict(
    errors: tuple[float, float], allowed: tuple[float, float], wrong: list[str], **more: object
) -> dict[str, Any]:
    for what, error, most in zip(("error", "error of the worst row"), errors, allowed, strict=True):
        if not error <= most:
            wrong.append(f"{what} {error:.2g} is above {most:.2g}")
    numbers = {"error": errors[0], "worst_error": errors[1], "allowed": list(allowed), **more}
    return {"status": "failed" if wrong else "passed", **numbers, **({"reason": "; ".join(wrong)} if wrong else {})}


def relative_errors(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """``|actual - expected| / |expected|`` over all and of the worst row; infinite where anything is not finite."""
    actual, expected = actual.detach().cpu().double(), expected.cpu().double()
    if not actual.numel():
        return 0.0, 0.0
    if not bool(actual.isfinite().all()):
        return float("inf"), float("inf")
    difference = actual - expected
    rows = difference.norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(difference.norm() / expected.norm().clamp_min(1e-30)), float(rows.max())


def check_attention(spec: Spec, kernels: Kernels, device: torch.device) -> dict[str, Any]:
    """Paged attention of one case."""
    assert kernels.paged_attention is not None
    case = make_case(spec)
    expected = replace(case, query=case.query.float()).run(reference)
    there: Case = on_device(case, device)
    output = torch.full(there.query.shape, torch.nan, dtype=spec.dtype, device=device)
    exact = () if there.plan.exact_from is None else (there.inputs,)
    kernels.paged_attention(there.query, there.pages, there.plan, there.batch, output, *exact)
    tokens = int(case.batch.query_start_loc[-1])
    wrong = []
    if not bool(output[tokens:].isnan().all()):
        wrong.append("the outputs of padding were written")
    if not all(torch.equal(one.cpu(), other) for one, other in zip(there.pages, case.pages, strict=True)):
        wrong.append("pages were written")
    errors = relative_errors(output[:tokens], expected[:tokens])
    return _verdict(errors, TOLERANCE[spec.dtype], wrong)


def check_store(spec: Spec, kernels: Kernels, device: torch.device) -> dict[str, Any]:
    """Store random tokens, padding among them; see what reads back, and that nothing else was written."""
    assert kernels.store is not None
    plan = make_plan(spec)
    generator = torch.Generator().manual_seed(spec.seed + 1)
    tokens, block_size = sum(new for _, new in spec.seqs) + 5, spec.block_size
    blocks = -(-tokens // block_size) + 3
    gap = 48 if spec.strided else 0
    poisoned = [torch.full((blocks, of.page_bytes + gap), 0xFF, dtype=torch.uint8) for of in plan.layouts]
    pages = [whole[:, : of.page_bytes] for whole, of in zip(poisoned, plan.layouts, strict=True)]
    slots = torch.randperm(blocks * block_size, generator=generator)[: tokens + 3].long()
    slots[torch.randperm(tokens, generator=generator)[:3]] = -1
    kept = slots[:tokens][slots[:tokens] >= 0]
    for of, written in list(zip(plan.layouts, pages, strict=True))[1:]:
        store_latents(written, of, kept, random_latents(of, len(kept), generator))
    inputs = tuple(x.to(spec.dtype) for x in random_latents(plan.layout, tokens, generator))
    exact = stored_numbers(plan, pages, slots[:tokens], inputs)

    there = [torch.empty_like(whole, device=device).copy_(whole) for whole in poisoned]
    on_there = [whole[:, : of.page_bytes] for whole, of in zip(there, plan.layouts, strict=True)]
    kernels.store(on_there, on_device(plan, device), slots.to(device), tuple(x.to(device) for x in inputs))
    reference.store(pages, plan, slots, inputs)
    back = [whole.cpu() for whole in there]
    found = [whole[:, : of.page_bytes] for whole, of in zip(back, plan.layouts, strict=True)]

    same = float((found[0] == pages[0]).double().mean())
    over_all, worst = 0.0, 0.0
    for index, (stream, x) in enumerate(zip(plan.layout.streams, exact, strict=True)):
        worth = torch.ones(stream.num_heads, stream.width)
        if isinstance(stream, AllocatedFormat):
            worth.zero_()
            for head, runs in enumerate(stream.runs):
                of_channels = channel_tables(runs)[2]
                worth[head, : len(of_channels)] = of_channels / of_channels.mean()
        x = x.unflatten(1, (stream.num_heads, stream.width))
        allowed, actual = (
            ((load_slots(of[0], plan.layout, kept, index) - x).square() * worth).sum(-1).double()
            for of in (pages, found)
        )
        # What is exact in both (nearly so with 16 bits) is compared with the numbers themselves.
        least = 1e-6 * (x.square() * worth).sum(-1).double() + 1e-30
        above = (actual - allowed) / allowed.maximum(least)
        above = torch.where(actual.isfinite(), above, torch.inf)
        total = float((actual.sum() - allowed.sum()) / allowed.sum().maximum(least.sum()))
        over_all = max(over_all, total if total == total else float("inf"))
        worst = max(worst, float(above.max()))

    wrong = []
    zeros = tuple(torch.zeros(len(kept), s.num_heads * s.width) for s in plan.layout.streams)
    for of_layers in (pages, found):
        store_latents(of_layers[0], plan.layout, kept, zeros)
    if not all(torch.equal(one, other) for one, other in zip(back, poisoned, strict=True)):
        wrong.append("bytes of other slots or pages were written")
    return _verdict((over_all, worst), STORE_TOLERANCE, wrong, same_bytes=same)


def stored_numbers(
    plan: AttentionLayerPlan, pages: Sequence[torch.Tensor], slots: torch.Tensor, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The numbers that are to be quantized, FP32, of the tokens that are no padding."""
    rows = [x[slots >= 0].float() for x in inputs]
    if plan.rotation is not None:
        rows[0] = plan.rotation.apply(rows[0])
    if plan.prediction is not None:
        predicted = read_slots(pages, plan.layouts, plan.prediction.terms, slots[slots >= 0])
        if plan.prediction.matrix is not None:
            predicted = torch.einsum("thp,hpw->thw", predicted, plan.prediction.matrix)
        rows[0] = rows[0] - predicted.flatten(1)
    return rows
