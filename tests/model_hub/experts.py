"""Mixtures of experts. Few of them, so that a tiny step does not send every token elsewhere."""

from tests.model_hub.family import HubFamily, Shape
from tests.tiny_models import FAMILIES as TINY

_WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
_EXPERTS: Shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED: Shape = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1,
                  "n_group": 1, "topk_group": 1}  # fmt: skip

EXPERTS = (
    HubFamily(
        "Mixtral",
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4},
        quick=True,
    ),
    HubFamily(
        "GPT-OSS",
        ("openai/gpt-oss-20b", "openai/gpt-oss-120b"),
        "GptOssForCausalLM",
        "GptOssConfig",
        dict(TINY["gpt-oss"][1]),
    ),
    HubFamily(
        "Qwen2 MoE",
        ("Qwen/Qwen1.5-MoE-A2.7B-Chat", "Qwen/Qwen2-57B-A14B-Instruct"),
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_EXPERTS, "shared_expert_intermediate_size": 64},
    ),
    HubFamily(
        "Qwen3 MoE",
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B-Instruct-2507", "Qwen/Qwen3-Coder-30B-A3B-Instruct"),
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_EXPERTS, "head_dim": 32},
        quick=True,
    ),
    HubFamily(
        "GraniteMoE",
        ("ibm-granite/granite-3.1-3b-a800m-instruct", "ibm-granite/granite-3.1-1b-a400m-instruct"),
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {"num_local_experts": 4, "attention_multiplier": 32**-0.5},
    ),
    HubFamily(
        "GraniteMoE with shared experts",
        ("ibm-research/moe-7b-1b-active-shared-experts",),
        "GraniteMoeSharedForCausalLM",
        "GraniteMoeSharedConfig",
        {"num_local_experts": 4, "attention_multiplier": 32**-0.5, "shared_intermediate_size": 64},
    ),
    HubFamily(
        "GraniteMoE with sliding windows",
        ("ibm-granite/granite-swash-3b-a600m",),
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSWAConfig",
        {**TINY["granite-swa"][1], "num_local_experts": 4, "shared_intermediate_size": 64},
    ),
    HubFamily(
        "Phi-3.5 MoE",
        ("microsoft/Phi-3.5-MoE-instruct", "microsoft/Phi-mini-MoE-instruct"),
        "PhiMoEForCausalLM",
        "PhimoeConfig",
        {"num_local_experts": 4, "attention_bias": True},
        made_as="PhimoeForCausalLM",
    ),
    HubFamily(
        "OLMoE",
        ("allenai/OLMoE-1B-7B-0924-Instruct", "allenai/OLMoE-1B-7B-0125-Instruct"),
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    HubFamily(
        "ERNIE 4.5 MoE",
        ("baidu/ERNIE-4.5-21B-A3B-PT", "baidu/ERNIE-4.5-300B-A47B-PT"),
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64, "moe_num_shared_experts": 1},
    ),
    HubFamily(
        "GLM-4.5",
        ("zai-org/GLM-4.5", "zai-org/GLM-4.6", "zai-org/GLM-4.7"),
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**_ROUTED, "head_dim": 32, "use_qk_norm": True, "attention_bias": True},
    ),
    HubFamily(
        "GLM-4.5 Air",
        ("zai-org/GLM-4.5-Air",),
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**_ROUTED, "head_dim": 32, "attention_bias": True},
    ),
    HubFamily(
        "MiniMax-M2",
        ("MiniMaxAI/MiniMax-M2", "MiniMaxAI/MiniMax-M2.1"),
        "MiniMaxM2ForCausalLM",
        "MiniMaxM2Config",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32},
    ),
    HubFamily(
        "Trinity",
        ("arcee-ai/Trinity-Mini", "arcee-ai/Trinity-Nano-Preview"),
        "AfmoeForCausalLM",
        "AfmoeConfig",
        {**_EXPERTS, "head_dim": 32, "num_shared_experts": 1, "sliding_window": 48, "layer_types": _WINDOWS},
    ),
    HubFamily(
        "K-EXAONE",
        ("LGAI-EXAONE/K-EXAONE-236B-A23B",),
        "ExaoneMoEForCausalLM",
        "ExaoneMoeConfig",
        {**_EXPERTS, "sliding_window": 48, "sliding_window_pattern": "LLG", "layer_types": _WINDOWS},
        made_as="ExaoneMoeForCausalLM",
    ),
    HubFamily(
        "Hy3",
        ("tencent/Hy3-preview",),
        "HYV3ForCausalLM",
        "HYV3Config",
        {**_EXPERTS, "head_dim": 32},
    ),
    HubFamily(
        "Laguna",
        ("poolside/Laguna-XS.2",),
        "LagunaForCausalLM",
        "LagunaConfig",
        {
            **_EXPERTS,
            "head_dim": 32,
            "sliding_window": 48,
            "layer_types": _WINDOWS,
            "shared_expert_intermediate_size": 64,
        },
    ),
    HubFamily(
        "DBRX",
        ("databricks/dbrx-instruct",),
        "DbrxForCausalLM",
        "DbrxConfig",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"hidden_size": 128, "ffn_hidden_size": 192, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    HubFamily(
        "Command A+",
        ("CohereLabs/command-a-plus-05-2026",),
        "Cohere2MoeForCausalLM",
        "Cohere2MoeConfig",
        {
            "logit_scale": 1.0,
            "tie_word_embeddings": True,
            "head_dim": 32,
            "num_experts": 4,
            "sliding_window": 48,
            "layer_types": _WINDOWS,
        },
    ),
)
