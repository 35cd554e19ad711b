"""vLLM's FlashAttention as it is called: its own Python, of which only the compiled operation is a stand-in."""

import importlib.util
import inspect
from dataclasses import replace

import pytest
import torch
from vllm.v1.attention.backends import fa_utils

from tests.attention.attention_cases import Spec, make_plan
from tests.attention.whole_attention import attend_side_by_side
from xquant_vllm.attention.batch import WholeSequences
from xquant_vllm.attention.hot.attend import attend_pool
from xquant_vllm.plugin import flash

# The operations of the versions, as vLLM's fork of flash-attention declares them: hopper/flash_api_torch_lib.cpp and
# csrc/flash_attn/flash_api_torch_lib.cpp at 617264c, the commit that vLLM 0.32 and 0.33 are built with or near to.
FA3 = """fwd(Tensor(a!) q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor(b!)? out,
Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, Tensor? seqused_k,
int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos,
Tensor? rotary_sin, Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale,
float softmax_scale, bool is_causal, int window_size_left, int window_size_right, float softcap,
bool is_rotary_interleaved, Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux,
int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> Tensor[]"""
FA2 = """varlen_fwd(Tensor(a!) q, Tensor k, Tensor v, Tensor(b!)? out, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table, Tensor? alibi_slopes, int max_seqlen_q, int max_seqlen_k,
float p_dropout, float softmax_scale, bool zero_tensors, bool is_causal, int window_size_left, int window_size_right,
float softcap, bool return_softmax, int num_splits, Tensor? gen) -> Tensor[]"""

# Parameters of the function in vLLM 0.33.0.
V033 = """
q k v max_seqlen_q cu_seqlens_q max_seqlen_k cu_seqlens_k seqused_k q_v dropout_p softmax_scale causal
window_size softcap alibi_slopes deterministic return_attn_probs block_table return_softmax_lse out
scheduler_metadata q_descale k_descale v_descale num_splits output_scale fa_version s_aux cp_world_size cp_rank
cp_tot_seqused_k mask_mod block_sparse_tensors aux_tensors aux_tensor_leading_dims dynamic_causal
gather_kv_indices gather_kv_valid_length
"""


def stand_in(q, k, v, out, starts, key_starts, lengths, table, longest_query, longest, scale, left, softcap, sinks):
    """What both operations do of what is asked of them here."""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == out.stride(-1) == 1
    assert q.dtype == k.dtype == v.dtype == out.dtype
    assert starts.dtype == torch.int32
    assert starts.is_contiguous()
    assert sinks is None or (sinks.dtype == torch.bfloat16 and sinks.is_contiguous())
    scores = {
        "longest_query": longest_query,
        "longest": longest,
        "scale": scale,
        "window": None if left < 0 else left + 1,
        "soft_cap": softcap or None,
        "sinks": sinks,
    }
    if table is None:
        assert lengths is None
        assert key_starts.dtype == torch.int32
        assert key_starts.is_contiguous()
        assert k.shape[0] == key_starts[-1]
        attend_side_by_side(q, k, v, out, starts, key_starts, **scores)
    else:
        attend_pool(q, k, v, out, starts, lengths, table, **scores)
    return [out, q.new_empty(0)]


def fa3(q, k, v, k_new, v_new, q_v, out, starts, key_starts, new_starts, used_q, used_k, longest_query, longest, table,
        *rest):  # fmt: skip
    scale, causal, left, right, softcap = rest[8:13]
    assert causal
    # No scheduler's metadata, splits as it likes.
    assert rest[14:16] == (None, 0)
    assert right == (-1 if left < 0 else 0)
    stand_in(q, k, v, out, starts, key_starts, used_k, table, longest_query, longest, scale, left, softcap, rest[18])
    return [out, q.new_empty(0), q.new_empty(0), q.new_empty(0)]


def fa2(q, k, v, out, starts, key_starts, used_k, leftpad, table, alibi, longest_query, longest, dropout, scale, zero,
        causal, left, right, softcap, *rest):  # fmt: skip
    assert causal
    assert dropout == 0.0
    return stand_in(q, k, v, out, starts, key_starts, used_k, table, longest_query, longest, scale, left, softcap, None)


@pytest.fixture(scope="module")
def operations():
    """The compiled operations; libraries are undone when they are forgotten."""
    libraries = []
    for name, schema, function in (("_vllm_fa3_C", FA3, fa3), ("_vllm_fa2_C", FA2, fa2)):
        library = torch.library.Library(name, "FRAGMENT")
        library.define(" ".join(schema.split()))
        library.impl(schema.partition("(")[0], function, "CompositeExplicitAutograd")
        libraries.append(library)
    return libraries


@pytest.fixture
def vllm_function(operations, monkeypatch):
    """The installed vLLM's function; its package cannot be imported without compiled operations."""
    folder = importlib.util.find_spec("vllm").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("flash", f"{folder}/vllm_flash_attn/flash_attn_interface.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    called = []

    def function(**arguments):
        called.append(set(arguments))
        return module.flash_attn_varlen_func(**arguments)

    monkeypatch.setattr(fa_utils, "flash_attn_varlen_func", function, raising=False)
    function.signature, function.called = inspect.signature(module.flash_attn_varlen_func), called
    return function


_SMALL = Spec(kv_heads=2, group=3, head_size=16, hidden_size=32, key_group=16, value_group=16, key_outliers=0)
SPECS = {
    "plain": _SMALL,
    "window, soft cap": replace(_SMALL, window=9, soft_cap=7.0),
    "sinks": replace(_SMALL, sinks=True),
}
QUERY_LENS, LENGTHS, BLOCK = (7, 1, 12, 5), (20, 0, 12, 33), 8


@pytest.mark.parametrize("paged", [False, True], ids=["side by side", "blocks"])
@pytest.mark.parametrize(
    ("version", "name"), [(3, name) for name in SPECS] + [(2, name) for name in SPECS if name != "sinks"]
)
def test_both_calls(vllm_function, version: int, name: str, paged: bool) -> None:
    """Prefill has keys side by side, a pool of hot blocks has them in blocks: the same function, the same results."""
    plan = make_plan(SPECS[name])
    generator = torch.Generator().manual_seed(5)
    heads, size = plan.num_heads, 16
    query = torch.randn(sum(QUERY_LENS), heads + 2, size, generator=generator).to(torch.float16)[:, 1:-1]
    pool = torch.randn(2, 16, BLOCK, plan.projection.num_kv_heads, size, generator=generator).to(torch.float16)
    table = torch.randperm(16, generator=generator)[: 4 * 3].view(4, 3).int()
    table = torch.cat((table, table.flip(0)), 1)
    starts, lengths = torch.tensor([0, *QUERY_LENS]).cumsum(0).int(), torch.tensor(LENGTHS, dtype=torch.int32)
    expected, actual = torch.full_like(query, 7.0), torch.full_like(query, torch.nan)
    attend_pool(
        query, *pool, expected, starts, lengths, table, longest_query=12, longest=33, scale=plan.scale,
        window=plan.sliding_window, soft_cap=plan.logits_soft_cap,
        sinks=None if plan.sinks is None else plan.sinks.bfloat16(),
    )  # fmt: skip
    if paged:
        flash.flash_attention(
            query, *pool, actual, plan, version, cu_seqlens_q=starts, max_seqlen_q=12, seqused_k=lengths,
            max_seqlen_k=33, block_table=table,
        )  # fmt: skip
    else:
        slots = [
            table[row, at // BLOCK].item() * BLOCK + at % BLOCK
            for row, length in enumerate(LENGTHS)
            for at in range(length)
        ]
        keys, values = (of.flatten(0, 1)[slots] for of in pool)
        key_starts = torch.tensor([0, *LENGTHS]).cumsum(0).int()
        sequences = WholeSequences(starts, key_starts, QUERY_LENS, LENGTHS)
        flash._attend_whole(version, query, keys, values, actual, sequences, plan)
    torch.testing.assert_close(actual, expected)
    assert (actual[7] == 0).all()
    (passed,) = vllm_function.called
    assert passed <= set(vllm_function.signature.parameters)
    assert passed <= set(V033.split())


@pytest.mark.parametrize(
    ("version", "dtype", "given", "taken"),
    [
        (3, torch.bfloat16, {}, True),
        (2, torch.float16, {"soft_cap": 30.0}, True),
        (2, torch.bfloat16, {"sinks": True}, False),
        (3, torch.bfloat16, {"sinks": True}, True),
        (3, torch.bfloat16, {"sinks": True, "num_heads": 96}, False),
        (3, torch.float32, {}, False),
        (None, torch.bfloat16, {}, False),
    ],
)
def test_what_it_takes(monkeypatch, version, dtype, given, taken) -> None:
    """Else PyTorch's is taken, or our kernel."""
    monkeypatch.setattr(flash, "flash_version", lambda *_: version)
    of_layer = {"head_size": 128, "num_heads": 32, "sinks": False, "soft_cap": None} | given
    assert (flash.attend_whole_for(dtype, **of_layer) is not None) == taken


def test_there_is_none_elsewhere() -> None:
    assert flash.attend_whole_for(torch.bfloat16, 128, 32, False, None) is None
