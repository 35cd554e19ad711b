"""With which arguments this package calls what is vLLM's, vLLM calls what is this package's, and what is read of both.

``CALLED`` and ``REPLACED`` have lines by sections of docs/design/seams.md: a dotted name, and arguments as they would
be written in a call.
"""

from importlib.util import find_spec

# vLLM 0.33 has a module of its own for it.
_MODULE = "kv_cache_planning" if find_spec("vllm.v1.core.kv_cache_planning") else "kv_cache_utils"
PLANNING = f"vllm.v1.core.{_MODULE}"

CALLED = {
    "Members of the enum of backends": [
        "vllm.v1.attention.backends.registry.AttentionBackendEnum.register(backend, class_path)",
        "vllm.v1.attention.backends.registry.AttentionBackendEnum.get_class(member)",
        "vllm.v1.attention.backends.registry.AttentionBackendEnum.get_path(member)",
    ],
    "The first layer of a model": ["vllm.config.get_current_vllm_config_or_none()"],
    "The CPU's choice of a backend": [
        "vllm.v1.attention.selector.AttentionSelectorConfig._asdict(self)",
        "vllm.v1.attention.backend.AttentionBackend.validate_configuration(device_capability=c, head_size=h, dtype=d, "
        "kv_cache_dtype=k, block_size=b, use_mla=m, has_sink=s, use_sparse=p, use_mm_prefix=x, "
        "use_per_head_quant_scales=q, attn_type=t)",
    ],
    "The parts of an attention module": [
        "vllm.model_executor.layers.rotary_embedding.base.RotaryEmbedding._compute_cos_sin_cache(self)",
    ],
    "New weights": [
        "vllm.model_executor.model_loader.reload.layerwise.finalize_layerwise_processing(model, model_config)",
        "vllm.model_executor.model_loader.reload.layerwise.get_layerwise_info(layer)",
        "vllm.model_executor.model_loader.reload.types.LayerReloadingInfo.can_load(self)",
        "vllm.model_executor.model_loader.reload.meta.to_meta_tensor(tensor)",
    ],
    "Pages of old weights": [
        "vllm.v1.engine.core.EngineCore.reset_prefix_cache(self, reset_running_requests=True)",
    ],
    "Metadata of a batch": [
        "vllm.v1.attention.backend.AttentionMetadataBuilder._init_reorder_batch_threshold(self, 1, "
        "supports_spec_as_decode=True)",
        "vllm.v1.attention.backend.AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, config, device)",
        "vllm.config.get_layers_from_vllm_config(config, kind, layer_names)",
    ],
    "A layer's metadata and pages": [
        "vllm.model_executor.layers.attention.attention.get_attention_context(layer_name)",
    ],
    "Memory for hot blocks": [
        f"{PLANNING}.get_kv_cache_groups(config, specs)",
        f"{PLANNING}._pool_bytes_per_block(config, groups)",
        "vllm.v1.kv_cache_interface.UniformTypeKVCacheSpecs.max_memory_usage_pages(self, config)",
        "vllm.v1.kv_cache_interface.KVCacheSpec.max_memory_usage_bytes(self, config)",
        "vllm.v1.worker.gpu_worker.Worker.get_kv_cache_spec(self)",
    ],
    "The kernel of 16-bit caches": [
        "vllm.v1.attention.backends.cpu_attn._get_attn_isa(dtype, block_size, head_size)",
        "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend.get_supported_head_sizes()",
        "vllm._custom_ops.cpu_attn_reshape_and_cache(key, value, key_cache, value_cache, slots, isa)",
        "vllm._custom_ops.cpu_attn_get_scheduler_metadata(num_reqs=n, seq_lens=s, query_start_loc=q, num_heads=h, "
        "num_kv_heads=k, head_dim=d, dtype=t, causal=c, sliding_window_size=w, isa=i, enable_kv_split=e)",
        "vllm._custom_ops.cpu_attention_with_kv_cache(query=q, key_cache=k, value_cache=v, output=o, "
        "query_start_loc=l, seq_lens=s, scale=c, causal=u, alibi_slopes=a, sliding_window=w, block_table=b, softcap=p, "
        "scheduler_metadata=m, s_aux=x)",
    ],
    "Pages in files": [
        "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1.__init__(self, config, role, cache)",
        "vllm.distributed.kv_transfer.kv_connector.v1.base.KVConnectorBase_V1._get_connector_metadata(self)",
    ],
    "What vLLM says of itself": ["vllm.plugins.load_general_plugins()"],
    "Hidden states and logits": [
        "vllm.LLM.apply_model(self, function)",
        "vllm.model_executor.models.llama.LlamaForCausalLM.compute_logits(self, hidden_states)",
        "vllm.transformers_utils.config.get_config(model, trust_remote_code=False)",
    ],
    "Names that are only read": [
        "vllm.distributed.utils.get_pp_indices(layers, stage, stages)",
        "vllm.model_executor.models.utils.extract_layer_index(name)",
        "vllm.v1.kv_cache_interface.iter_layer_specs(spec)",
        "vllm.v1.kv_cache_interface.group_kernel_blocks(groups, sizes)",
    ],
}
"""What this package calls: vLLM must take these arguments, and ask for no more."""

REPLACED = {
    "The check of a configuration": [
        "vllm.platforms.interface.Platform.check_and_update_config(vllm_config)",
        "vllm.platforms.cpu.CpuPlatform.check_and_update_config(vllm_config)",
    ],
    "The first layer of a model": ["vllm.platforms.interface.Platform.opaque_attention_op()"],
    "Pages beside states": [
        "vllm.platforms.interface.Platform.update_block_size_for_backend(vllm_config)",
        "vllm.v1.attention.backend.AttentionBackend.customize_spec(spec)",
    ],
    "The CPU's choice of a backend": [
        "vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)",
    ],
    "After the weights are loaded": [
        "vllm.model_executor.model_loader.base_loader.process_weights_after_loading(model, model_config, "
        "target_device)",
    ],
    "Positions of text": [
        "vllm.model_executor.models.interfaces.SupportsMRoPE.get_mrope_input_positions(self, input_tokens, "
        "mm_features)",
    ],
    "Bytes of a page": ["vllm.model_executor.layers.attention.Attention.get_kv_cache_spec(self, vllm_config)"],
    "New weights": [
        "vllm.v1.worker.gpu_worker.Worker.sleep(self, level)",
        "vllm.v1.worker.gpu_worker.Worker.reload_weights(self, *args, **kwargs)",
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.reload_weights(self, weights_iterator, weights_path, "
        "is_checkpoint_format)",
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner.reload_weights(self, weights_iterator, weights_path, "
        "is_checkpoint_format)",
    ],
    "Adapters": ["vllm.lora.worker_manager.WorkerLoRAManager._load_adapter(self, lora_request)"],
    "Memory for hot blocks": [
        f"vllm.v1.worker.{worker}.{name}"
        for worker in ("cpu_worker.CPUWorker", "gpu_worker.Worker")
        for name in ("determine_available_memory(self)", "execute_model(self, scheduler_output)", "shutdown(self)")
    ],
    "What pages were made": ["vllm.v1.worker.gpu_worker.Worker.initialize_from_config(self, kv_cache_config)"],
    "Tokens of a step": ["vllm.v1.worker.gpu_worker.Worker.execute_model(self, scheduler_output)"],
}
"""What this package puts itself in the place of: vLLM must have no other parameters, because it may pass them."""

READ = {
    "vllm.v1.attention.backend.CommonAttentionMetadata": "query_start_loc query_start_loc_cpu seq_lens causal "
    "seq_lens_cpu_upper_bound num_actual_tokens max_query_len block_table_tensor",
    "vllm.v1.core.sched.output.SchedulerOutput": "finished_req_ids scheduled_new_reqs scheduled_cached_reqs "
    "num_scheduled_tokens total_num_scheduled_tokens kv_cache_block_copies kv_connector_metadata "
    "kv_connector_block_state",
    "vllm.v1.core.sched.output.NewRequestData": "req_id block_ids num_computed_tokens",
    "vllm.v1.core.sched.output.CachedRequestData": "req_ids new_block_ids num_computed_tokens resumed_req_ids",
    "vllm.v1.kv_cache_interface.KVCacheConfig": "num_blocks kv_cache_groups",
    "vllm.engine.arg_utils.EngineArgs": "disable_log_stats",
    "vllm.config.ParallelConfig": "data_parallel_index rank world_size tensor_parallel_size",
    "vllm.v1.kv_cache_interface.KVCacheGroupSpec": "layer_names kv_cache_spec",
    "vllm.v1.kv_cache_interface.AttentionSpec": "block_size num_kv_heads head_size dtype num_head_slots "
    "state_content_bytes page_size_padded page_size_bytes",
    "vllm.v1.kv_cache_interface.SlidingWindowSpec": "sliding_window",
    "vllm.config.VllmConfig": "additional_config attention_config cache_config compilation_config load_config "
    "model_config parallel_config scheduler_config speculative_config kv_transfer_config device_config lora_config "
    "instance_id",
}
"""Attributes that are read of what vLLM hands over."""
