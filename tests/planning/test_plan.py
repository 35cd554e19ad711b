"""Plans: what every option says, hot blocks, ranks, and which cache is recommended."""

import shlex

import pytest

from tests.docs.commands import check_serve, check_xquant_serve
from tests.planning.models import config_folder
from xquant_vllm.errors import RefusedError
from xquant_vllm.planning.caches import Kind
from xquant_vllm.planning.options import by_kind
from xquant_vllm.planning.plan import PlanRequest, make_plan

MHA = {"num_key_value_heads": 4}


def plan_of(folder, **request):
    return make_plan(PlanRequest(**{"model": folder, "memory": 64 << 20, "context": 1024, **request}))


def test_every_option_says_all_there_is_to_say(tmp_path):
    answer = plan_of(config_folder(tmp_path)).as_json()
    wanted = {"method", "bits", "calibrated", "bytes_per_token", "cache_tokens", "hot_tokens", "requests", "loss"}
    wanted |= {"extra_flops", "supported", "reason", "command"}
    assert all(wanted <= {*option} for option in answer["options"])
    assert answer["recommended"] in answer["options"]
    assert answer["recommended"]["command"]
    methods = [option["method"] for option in answer["options"]]
    assert methods[0] == "16bit"
    assert {*methods} == {"16bit", "xquant", "joint", "xquant-cl", "kivi"}


def test_tokens_are_whole_blocks_of_the_memory(tmp_path):
    plan = plan_of(config_folder(tmp_path))
    assert plan.plain.bytes_per_token == 4 * 2 * 2 * 64 * 2
    assert plan.plain.cache_tokens == (64 << 20) // (128 * plan.plain.bytes_per_token) * 128
    assert plan.plain.requests == plan.plain.cache_tokens / 1024
    on_gpu = plan_of(config_folder(tmp_path), device="cuda").plain
    assert on_gpu.cache_tokens == (64 << 20) // (16 * plan.plain.bytes_per_token) * 16


def test_hot_tokens_take_a_fifth_on_cpus_and_nothing_on_gpus(tmp_path):
    folder = config_folder(tmp_path, **MHA)
    plan = plan_of(folder)
    x = by_kind(plan.options, Kind("x", 4))
    assert x.hot_tokens == int(0.2 * (64 << 20)) // plan.plain.bytes_per_token
    assert by_kind(plan.options, Kind("xquant", 4)).hot_tokens == 0
    assert by_kind(plan_of(folder, device="cuda").options, Kind("x", 4)).hot_tokens == 0
    asked = by_kind(plan_of(folder, device="cuda", hot=0.5).options, Kind("x", 4))
    assert asked.hot_tokens == (32 << 20) // plan.plain.bytes_per_token
    assert '"hot": 0.5' in asked.command
    assert by_kind(plan_of(folder, hot=0).options, Kind("x", 4)).hot_tokens == 0


def test_a_pool_as_large_as_the_memory_is_refused(tmp_path):
    with pytest.raises(RefusedError, match="nothing of --memory would be left"):
        plan_of(config_folder(tmp_path, **MHA), hot=64 << 20)


def test_memory_that_is_too_small_for_one_request_says_so(tmp_path):
    plan = plan_of(config_folder(tmp_path), memory=1 << 20, context=4096)
    assert "one request of --context 4,096 needs" in plan.plain.reason
    assert plan.recommended is None or plan.recommended.supported


def test_ranks_share_heads_and_refuse_what_does_not_shard(tmp_path):
    folder = config_folder(tmp_path)
    one, two = plan_of(folder), plan_of(folder, ranks=2)
    assert two.plain.bytes_per_token * 2 == one.plain.bytes_per_token
    head = by_kind(two.options, Kind("xquant", 4, True))
    assert head.supported
    assert head.bytes_per_token * 2 == by_kind(one.options, Kind("xquant", 4, True)).bytes_per_token
    for method in ("joint", "xquant-cl"):
        assert "do not shard" in by_kind(two.options, Kind(method, 4, True)).reason
    assert "--tensor-parallel-size 2" in head.command
    with pytest.raises(RefusedError, match="--tp 3 cannot work"):
        plan_of(folder, ranks=3)


def test_what_the_server_refuses_is_not_offered(tmp_path):
    for config, reason in (
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, "MLA"),
        ({"is_encoder_decoder": True}, "cross attention"),
        ({"alibi": True}, "ALiBi"),
    ):
        plan = plan_of(config_folder(tmp_path, **config))
        assert all(reason in option.reason for option in plan.options[1:])
        assert plan.recommended is plan.plain
    mla = plan_of(config_folder(tmp_path, kv_lora_rank=512, qk_rope_head_dim=64))
    assert mla.plain.bytes_per_token == 4 * 576 * 2


def test_layers_with_windows_have_no_chain(tmp_path):
    windows = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"] * 2}
    plan = plan_of(config_folder(tmp_path, **windows))
    assert "block tables of their own" in by_kind(plan.options, Kind("xquant-cl", 2)).reason
    assert by_kind(plan.options, Kind("xquant", 2)).supported


def test_beside_states_latents_are_served(tmp_path):
    kinds = ["linear_attention"] * 3 + ["full_attention"]
    plan = plan_of(config_folder(tmp_path, layer_types=kinds))
    for method in ("xquant-cl", "kivi"):
        assert "layers that keep a state" in by_kind(plan.options, Kind(method, 4)).reason
    assert by_kind(plan.options, Kind("xquant", 4)).supported
    assert "3 layers keep a state" in plan.model.notes[0]


def test_keys_that_are_normed_together_cannot_share_a_latent(tmp_path):
    tensors = {"model.layers.0.self_attn.k_norm.weight": (128,), "model.layers.0.self_attn.k_proj.weight": (128, 256)}
    plan = plan_of(config_folder(tmp_path, tensors=tensors))
    assert "normalizes the keys of all heads together" in by_kind(plan.options, Kind("xquant-cl", 4)).reason
    assert by_kind(plan.options, Kind("xquant", 4)).supported


@pytest.mark.parametrize("config", [{}, MHA])
def test_commands_can_be_typed(tmp_path, config):
    for option in plan_of(config_folder(tmp_path, **config), ranks=1, batched_tokens=512).options:
        program, *words = shlex.split(option.command)
        if program == "vllm":
            check_serve(words)
        else:
            check_xquant_serve(words)


def test_the_recommendation_is_the_simplest_of_the_largest_that_lose_little(tmp_path):
    folder = config_folder(tmp_path)
    usual = plan_of(folder, device="cuda").recommended
    assert (usual.kind.method, usual.kind.bits) == ("xquant", 4)
    assert usual.loss <= 0.3
    bold = plan_of(folder, most_loss=2.0).recommended
    assert bold.cache_tokens > 1.2 * usual.cache_tokens
    careful = plan_of(folder, most_loss=0.05).recommended
    assert careful.loss <= 0.05
    # Nothing slow in pages without a pool.
    assert plan_of(folder, device="cuda", most_loss=5.0).recommended.kind.method in ("xquant", "kivi")


def test_the_context_is_the_models_unless_it_is_said(tmp_path):
    assert plan_of(config_folder(tmp_path), context=None).serving.context == 4096
    with pytest.raises(RefusedError, match="names no longest context"):
        plan_of(config_folder(tmp_path, max_position_embeddings=None), context=None)
