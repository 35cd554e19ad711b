"""Models whose cache holds something else than plain keys and values, or whose class vLLM has no more.

What is refused by its configuration, before weights are read, has none here.
"""

from tests.model_hub.family import FOLLOWS, HubFamily, Shape
from tests.tiny_models import FAMILIES as TINY

_MLA: Shape = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
               "v_head_dim": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
               "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
               "num_key_value_heads": 4}  # fmt: skip

# Of models that keep states, too: these take blocks of many tokens.
_LONG: Shape = {"max_model_len": 1024}
_MAMBA2: Shape = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 32,
                  "mamba_chunk_size": 64}  # fmt: skip
_FOUR = ["linear_attention", "full_attention"] * 2


def _config_only(name: str, models: tuple[str, ...], architecture: str, config: str, **shape: object) -> HubFamily:
    return HubFamily(name, models, architecture, config, shape, has_weights=False)


def _gone(name: str, models: tuple[str, ...], architecture: str) -> HubFamily:
    return HubFamily(name, models, architecture, "LlamaConfig", has_weights=False)


OTHER_CACHES = (
    _config_only("DeepSeek-V2", ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V2.5"),
                 "DeepseekV2ForCausalLM", "DeepseekV2Config", **_MLA),
    _config_only("DeepSeek-V3", ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1"), "DeepseekV3ForCausalLM",
                 "DeepseekV3Config", **_MLA),
    _config_only("GLM-4.7 Flash", ("zai-org/GLM-4.7-Flash",), "Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", **_MLA),
    _config_only("MiniCPM3", ("openbmb/MiniCPM3-4B",), "MiniCPM3ForCausalLM", "MiniCPM3Config",
                 **{name: size for name, size in _MLA.items() if name in ("q_lora_rank", "kv_lora_rank",
                    "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "num_key_value_heads")}),
    _config_only("Bloom", ("bigscience/bloom-7b1", "bigscience/bloomz-7b1"), "BloomForCausalLM", "BloomConfig"),
    _config_only("Falcon RW", ("tiiuae/falcon-rw-1b",), "FalconForCausalLM", "FalconConfig", alibi=True,
                 num_kv_heads=4, multi_query=False, parallel_attn=False),
    _config_only("Mamba", ("state-spaces/mamba-2.8b-hf",), "MambaForCausalLM", "MambaConfig"),
    _config_only("Mamba 2", ("mistralai/Mamba-Codestral-7B-v0.1",), "Mamba2ForCausalLM", "Mamba2Config",
                 num_heads=8, head_dim=32, n_groups=1, state_size=16),
    _config_only("Falcon Mamba", ("tiiuae/falcon-mamba-7b-instruct",), "FalconMambaForCausalLM",
                 "FalconMambaConfig"),
    HubFamily("Jamba", ("ai21labs/AI21-Jamba-Mini-1.7", "ai21labs/Jamba-v0.1"), "JambaForCausalLM", "JambaConfig",
              {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1,
               "mamba_d_state": 16},
              engine=_LONG),
    HubFamily("Falcon-H1", ("tiiuae/Falcon-H1-7B-Instruct", "tiiuae/Falcon-H1-1.5B-Deep-Instruct"),
              "FalconH1ForCausalLM", "FalconH1Config",
              {**_MAMBA2, "mamba_d_ssm": 256, "key_multiplier": 0.7, "head_dim": 32},
              engine=_LONG),
    HubFamily("Granite 4", ("ibm-granite/granite-4.0-h-small", "ibm-granite/granite-4.0-h-tiny"),
              "GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig",
              {**_MAMBA2, "num_hidden_layers": 4, "layer_types": _FOUR, "num_local_experts": 0,
               "shared_intermediate_size": 192, "attention_multiplier": 32**-0.5, "position_embedding_type": None},
              engine=_LONG),
    HubFamily("LFM2", ("LiquidAI/LFM2-1.2B", "LiquidAI/LFM2-2.6B"), "Lfm2ForCausalLM", "Lfm2Config",
              {"num_hidden_layers": 5, "full_attn_idxs": [2, 4], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
              engine=_LONG),
    HubFamily("Nemotron-H", ("nvidia/Nemotron-H-8B-Base-8K", "nvidia/NVIDIA-Nemotron-Nano-9B-v2"),
              "NemotronHForCausalLM", "NemotronHConfig",
              {"num_hidden_layers": FOLLOWS, "head_dim": 32, "mamba_num_heads": 8, "mamba_head_dim": 32,
               "ssm_state_size": 32, "n_groups": 1, "chunk_size": 64,
               "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention",
                                     "full_attention"]},
              engine=_LONG),
    HubFamily("Qwen3-Next", ("Qwen/Qwen3-Next-80B-A3B-Instruct", "Qwen/Qwen3-Coder-Next"), "Qwen3NextForCausalLM",
              "Qwen3NextConfig",
              {"num_hidden_layers": 4, "layer_types": _FOUR, "head_dim": 64, "linear_key_head_dim": 64,
               "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "num_experts": 0,
               "mlp_only_layers": [0, 1, 2, 3]},
              engine=_LONG),
    _config_only("Zamba2", ("Zyphra/Zamba2-2.7B-instruct",), "Zamba2ForCausalLM", "Zamba2Config",
                 layers_block_type=["mamba", "hybrid", "mamba"]),
    HubFamily("Llama 4", ("meta-llama/Llama-4-Scout-17B-16E-Instruct", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
              "Llama4ForCausalLM", "Llama4TextConfig",
              {"head_dim": 32, "num_local_experts": 4, "intermediate_size_mlp": 192, "attention_chunk_size": 64,
               "no_rope_layers": [1, 1, 0], "moe_layers": [1]}),
    HubFamily("MiMo-V2", ("XiaomiMiMo/MiMo-V2-Flash",), "MiMoV2FlashForCausalLM", "MiMoV2FlashConfig",
              {"head_dim": 48, "v_head_dim": 32}, has_weights=False),
    HubFamily("Gemma 3n", ("google/gemma-3n-E4B-it", "google/gemma-3n-E2B-it"), "Gemma3nForCausalLM",
              "Gemma3nTextConfig",
              {"num_hidden_layers": 6, "head_dim": 32, "layer_types": TINY["gemma3"][1]["layer_types"],
               "sliding_window": 48, "num_kv_shared_layers": 3, "vocab_size_per_layer_input": 320,
               "hidden_size_per_layer_input": 16, "laurel_rank": 16, "intermediate_size": [192] * 6,
               "activation_sparsity_pattern": [0.0] * 6, "tie_word_embeddings": True}),
    HubFamily("Gemma 4", ("google/gemma-4-e2b-it",), "Gemma4ForCausalLM", "Gemma4TextConfig",
              {"num_hidden_layers": 6, "head_dim": 32, "global_head_dim": 32,
               "layer_types": TINY["gemma3"][1]["layer_types"], "sliding_window": 48,
               "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, "tie_word_embeddings": True}),
    _config_only("Whisper", ("openai/whisper-large-v3",), "WhisperForConditionalGeneration", "WhisperConfig"),
    _gone("Baichuan", ("baichuan-inc/Baichuan2-7B-Chat",), "BaichuanForCausalLM"),
    _gone("InternLM", ("internlm/internlm-chat-7b",), "InternLMForCausalLM"),
    _gone("MPT", ("mosaicml/mpt-7b-instruct",), "MPTForCausalLM"),
    _gone("Persimmon", ("adept/persimmon-8b-chat",), "PersimmonForCausalLM"),
    _gone("Qwen", ("Qwen/Qwen-7B-Chat",), "QWenLMHeadModel"),
    _gone("Llama 3.2 Vision", ("meta-llama/Llama-3.2-11B-Vision-Instruct",), "MllamaForConditionalGeneration"),
)  # fmt: skip
