"""What is refused at start-up, by name, before a weight is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xquant_vllm.codec.layout import BLOCK_SIZE_MULTIPLE
from xquant_vllm.errors import SettingsError, UnsupportedError
from xquant_vllm.plugin.attention_kinds import REFUSED_LAYERS
from xquant_vllm.plugin.calibration.start import calibrate_at_start
from xquant_vllm.plugin.connectors.allowed import connector_problems, prepare_connector
from xquant_vllm.plugin.drafts import SPECULATIVE, unsupported_speculation
from xquant_vllm.plugin.engine_factors import check_factors, factors_of
from xquant_vllm.plugin.engine_settings import forget_settings, settings_of
from xquant_vllm.plugin.making import look_once
from xquant_vllm.plugin.ranks import has_facts, unsupported_ranks
from xquant_vllm.plugin.registration import BACKEND_NAME
from xquant_vllm.scheme.calibration.choice import AUTO, NONE
from xquant_vllm.scheme.formats import LayerShape, layer_formats
from xquant_vllm.scheme.settings import XQuantSettings

SUPPORTED_CACHE_DTYPES = ("auto", "bfloat16", "float16")
# Engines for weight transfer that hand whole checkpoints to a model's ``load_weights`` while its layers are reloaded.
WEIGHT_TRANSFER = ("nccl", "ipc")


_NO_CHAIN = 'set "method": "xquant"'
OTHER_BACKEND = "choose another --attention-backend for this model"


def unsupported_model(problem: str, backend: str = BACKEND_NAME) -> UnsupportedError:
    """The error for a model, or one of its modules, that a backend cannot serve; ends with what to do instead.

    A function and not a subclass: an error that changes its own message does not survive pickling, and vLLM sends
    errors between processes.

    Args:
        problem: the model or module by name, and what about it is not supported; no full stop.
        backend: name of the backend.
    """
    return UnsupportedError(f"{backend.lower()}: {problem}; {OTHER_BACKEND}")


def check_config(vllm_config: Any) -> None:
    """Refuse settings that cannot work and vLLM features that are not supported.

    Raises:
        SettingsError: an xquant setting cannot work on this model.
        UnsupportedError: a feature is not supported; all such features are named, each with what to do.
    """
    settings = settings_of(vllm_config)
    problems = list(_unsupported(vllm_config))
    if problems:
        raise UnsupportedError("\n".join(f"xquant: {problem}" for problem in problems))
    prepare_connector(vllm_config)
    _check_model(vllm_config, settings)
    # Minutes, so it is the last thing that is done; and what is then served is looked at as well.
    if _calibrated_now(vllm_config, settings):
        _check_model(vllm_config, settings_of(vllm_config))


def _calibrated_now(vllm_config: Any, settings: XQuantSettings) -> bool:
    """Calibrate what is to be calibrated."""
    # vLLM makes configurations anew in other processes, and those of drafts of that of their model.
    if vllm_config.model_config is None or has_facts(vllm_config):
        return False
    folder, header = factors_of(vllm_config)
    if header is not None:
        if settings.calibration not in (AUTO, NONE):
            raise SettingsError(
                f"xquant: setting 'calibration': {settings.calibration!r} cannot work: {folder} has factors, which "
                "are served as they are; leave it out, or serve the model that they were made from"
            )
        return False
    # Settings that are not read are told now: they might have asked for other factors.
    look_once(vllm_config)
    calibrated = calibrate_at_start(vllm_config, settings)
    if calibrated:
        forget_settings(vllm_config)
    return calibrated


def _check_model(vllm_config: Any, settings: XQuantSettings) -> None:
    """Refuse settings that do not fit the model, and factors that cannot be served."""
    model = vllm_config.model_config
    if model is not None:
        check_factors(vllm_config, settings)
        num_layers = model.get_total_num_hidden_layers()
        num_kv_heads = model.get_num_kv_heads(vllm_config.parallel_config)
        sizes = (model.get_hidden_size(), num_kv_heads, model.get_head_size())
        layer_formats(settings, [LayerShape(index, *sizes) for index in range(num_layers)])
        check_layers(settings, num_layers)
        if settings.method == "xquant-cl":
            _check_chain(vllm_config)


def _check_chain(vllm_config: Any) -> None:
    """A layer of a chain reads other layers' pages by its own block table: one table must serve them all."""
    if not vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        check_layer_kinds(getattr(vllm_config.model_config.hf_text_config, "layer_types", None) or ())


def check_layers(settings: XQuantSettings, num_layers: int) -> None:
    """Refuse settings that name layers which the model does not have.

    Raises:
        SettingsError: it names the setting.
    """
    if (settings.first_layers or 0) > num_layers:
        raise SettingsError(
            f"xquant: setting 'first_layers': {settings.first_layers} cannot work: the model has {num_layers} "
            f"layers; set {num_layers} or fewer"
        )
    if max(settings.skip_layers, default=0) >= num_layers:
        raise SettingsError(
            f"xquant: setting 'skip_layers': {list(settings.skip_layers)} cannot work: the model has {num_layers} "
            f"layers, counted from 0; name layers up to {num_layers - 1}"
        )


def check_layer_kinds(kinds: Sequence[str]) -> None:
    """Refuse a chain over layers of different kinds (``layer_types`` of a configuration).

    Raises:
        UnsupportedError: there are several kinds.
    """
    if len(set(kinds)) > 1:
        raise UnsupportedError(
            "xquant: setting 'method': 'xquant-cl' cannot work on this model, whose kinds of layers "
            f"({', '.join(sorted(set(kinds)))}) have block tables of their own: a layer could not read the pages of "
            f"the one before; {_NO_CHAIN}"
        )


def unsupported_features(vllm_config: Any, *, turns_keys: bool, with_states: bool) -> Iterator[str]:
    """What a backend of this package does not do: for every such feature asked for a line with what to do.

    Args:
        vllm_config: vLLM's configuration.
        turns_keys: whether the backend turns keys itself when it reads them, by their place in the sequence.
        with_states: whether it shares the memory with layers that keep a state instead of keys and values.
    """
    from vllm.platforms import current_platform

    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        yield (
            f"no kernels for the platform {current_platform.device_type!r}, only for CUDA and CPUs; use another "
            "--attention-backend"
        )
    yield from unsupported_ranks(vllm_config)
    yield from _unsupported_model(vllm_config.model_config, turns_keys=turns_keys, with_states=with_states)
    yield from _checkpoint_cache(vllm_config)
    if getattr(vllm_config.cache_config, "kv_sharing_fast_prefill", False):
        yield "--kv-sharing-fast-prefill needs layers that share keys and values, which is not supported; leave it out"
    parallel = vllm_config.parallel_config
    for option, size in (
        ("--decode-context-parallel-size", parallel.decode_context_parallel_size),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size),
    ):
        if size > 1:
            yield f"{option} {size} is not supported; set 1"


def scheme_of_checkpoint(model: Any) -> str | None:
    """Name of the setting by which a checkpoint asks for keys and values in a format of its own; None without one."""
    quantization = getattr(getattr(model, "hf_config", None), "quantization_config", None)
    tables = [quantization, quantization.get("quantization")] if isinstance(quantization, Mapping) else []
    for table in tables:
        for name in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if isinstance(table, Mapping) and table.get(name):
                return name
    return None


def _checkpoint_cache(vllm_config: Any) -> Iterator[str]:
    """A checkpoint that says how keys and values are cached, where the user has not said otherwise."""
    name, dtype = scheme_of_checkpoint(vllm_config.model_config), vllm_config.cache_config.cache_dtype
    if name is not None and (dtype == "auto" or dtype not in SUPPORTED_CACHE_DTYPES):
        yield (
            f"{vllm_config.model_config.model} asks for a cache in a format of its own ({name} in its configuration), "
            "which this backend replaces; set --kv-cache-dtype bfloat16"
        )


def _unsupported(vllm_config: Any) -> Iterator[str]:
    yield from unsupported_features(vllm_config, turns_keys=True, with_states=True)
    yield from _unsupported_beside_states(vllm_config)
    yield from connector_problems(vllm_config)
    yield from unsupported_speculation(vllm_config, SPECULATIVE)
    cache = vllm_config.cache_config
    if cache.cache_dtype not in SUPPORTED_CACHE_DTYPES and not scheme_of_checkpoint(vllm_config.model_config):
        yield (
            f"--kv-cache-dtype {cache.cache_dtype} names the format of cached keys and values, which this backend "
            'replaces; leave it out and set bits in --additional-config \'{"xquant": {"bits": 4}}\''
        )
    if cache.user_specified_block_size and cache.block_size % BLOCK_SIZE_MULTIPLE:
        yield f"--block-size {cache.block_size} would misalign the pages; set a multiple of {BLOCK_SIZE_MULTIPLE}"
    if vllm_config.lora_config is not None and settings_of(vllm_config).cache == "x":
        yield (
            '--enable-lora is not supported with "cache": "x", where adapters do not find the projection of queries; '
            'set "cache": "latent"'
        )
    transfer = getattr(vllm_config, "weight_transfer_config", None)
    if transfer is not None and transfer.backend not in WEIGHT_TRANSFER:
        yield (
            f"--weight-transfer-config with the backend {transfer.backend!r} is not supported, because it writes to a "
            f"model's parameters past its loaders; use one of {', '.join(WEIGHT_TRANSFER)}"
        )
    if vllm_config.load_config.load_format == "ipc_cache":
        yield "--load-format ipc_cache skips the factorization of the weights; use auto"


def _unsupported_beside_states(vllm_config: Any) -> Iterator[str]:
    """What states beside attention rule out: attention layers must be of one kind, in one table of blocks."""
    model = vllm_config.model_config
    if model is None or not model.is_hybrid:
        return
    settings = settings_of(vllm_config)
    if settings.method == "xquant-cl":
        yield (
            f"setting 'method': 'xquant-cl' cannot work on {model.architecture} ({model.model}): between its attention "
            f"layers are others, with states, and vLLM may give attention layers block tables of their own; {_NO_CHAIN}"
        )
    if vllm_config.attention_config.backend_per_kind:
        yield (
            f"backend_per_kind is not supported for {model.architecture} ({model.model}), a hybrid model whose states "
            "share the memory with pages of one size; leave it out"
        )


def _unsupported_model(model: Any, *, turns_keys: bool, with_states: bool) -> Iterator[str]:
    """What of a model is not supported, as far as its configuration tells; see :func:`unsupported_features`."""
    if model is None:
        return
    if _images_see_themselves(model):
        yield (
            f"{model.architecture} ({model.model}) lets the tokens of an image see each other in both directions: not "
            f"supported; serve its text part with --language-model-only, or {OTHER_BACKEND}"
        )
    if turns_keys and model.uses_mrope:
        yield from _unsupported_positions(model)
    text = model.hf_text_config
    # What no configuration tells (caches that layers share, sinks with KIVI) is refused where the layer is built.
    # So are all kinds of layers but the plain one, and those of a model that chooses their backends itself (see
    # load/weight_hook.py). What a configuration tells is named here, because a model may take long to load.
    for present, feature in (
        (model.use_mla, "multi-head latent attention (MLA), which already caches latents of its own"),
        (model.is_encoder_decoder, "cross attention between an encoder and a decoder"),
        (model.is_attention_free, "state-space or linear attention layers alone, which have no keys and values"),
        (model.is_hybrid and not with_states, "state-space or linear attention layers"),
        (model.uses_alibi, "ALiBi, a bias on the scores"),
        (
            not model.use_mla and _value_heads_differ(text, model.get_head_size()),
            "value heads of another size than keys",
        ),
        (bool(getattr(text, "param_sink_number", 0)), REFUSED_LAYERS["StaticSinkAttention"]),
        (_attends_in_chunks(text), REFUSED_LAYERS["ChunkedLocalAttention"]),
    ):
        if present:
            yield f"{model.architecture} ({model.model}) uses {feature}: not supported; {OTHER_BACKEND}"


def _unsupported_positions(model: Any) -> Iterator[str]:
    """Multimodal RoPE, unless nothing but text is served: then all positions of a token are equal."""
    if model.supports_multimodal_inputs:
        yield images_problem(model)
    elif not _tells_positions(model):
        yield (
            f"{model.architecture} ({model.model}) uses multimodal RoPE, but its class does not tell vLLM the "
            f"positions: not supported; {OTHER_BACKEND}"
        )


def images_problem(model: Any) -> str:
    """Why a model with multimodal RoPE is refused where it may be asked about images, and what to do."""
    embeds = " and without --enable-mm-embeds" if getattr(model.multimodal_config, "enable_mm_embeds", False) else ""
    return (
        f"{model.architecture} ({model.model}) uses multimodal RoPE, several positions per token of an image, which "
        f"pages do not hold: not supported; serve its text part with --language-model-only{embeds}, or {OTHER_BACKEND}"
    )


def _tells_positions(model: Any) -> bool:
    """Whether vLLM itself can serve a model with multimodal RoPE."""
    from vllm.model_executor.models import ModelRegistry

    model_class, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    return hasattr(model_class, "get_mrope_input_positions")


def _images_see_themselves(model: Any) -> bool:
    """Whether the tokens of an image attend to each other in both directions; not if only text is served."""
    return bool(getattr(model, "is_mm_prefix_lm", False))


def _attends_in_chunks(text: Any) -> bool:
    """Whether some layers of a model attend within chunks; those without RoPE never do."""
    kinds, ropes = getattr(text, "layer_types", None) or (), getattr(text, "no_rope_layers", None) or ()
    chunked = any(ropes) if ropes else "chunked_attention" in kinds
    return chunked and bool(getattr(text, "attention_chunk_size", None))


def _value_heads_differ(text: Any, head_size: int) -> bool:
    """Whether a model's configuration gives value heads, in some layers or all, another size than key heads."""
    sizes = ("v_head_dim", head_size), ("swa_v_head_dim", getattr(text, "swa_head_dim", head_size))
    return any((getattr(text, name, None) or of_keys) != of_keys for name, of_keys in sizes)
