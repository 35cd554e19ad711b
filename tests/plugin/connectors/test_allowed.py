"""Which KV connectors are served, as vLLM's own configuration of a real engine says it."""

import os
import re

import pytest
from vllm.config.kv_transfer import KVTransferConfig
from vllm.distributed import nixl_utils
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform

from tests.tiny_models import save_tiny_model
from xquant_vllm.plugin.connectors.allowed import connector_problems
from xquant_vllm.plugin.connectors.names import NIXL_CONNECTOR_MODULE, XQUANT_CONNECTOR_MODULE


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny"), "llama"))


def transfer(folder, role="kv_both", **more):
    return {
        "kv_connector": "XQuantConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"folder": str(folder)},
        **more,
    }


def configure(model, **arguments):
    arguments = {"attention_backend": "xquant", "skip_tokenizer_init": True, "max_model_len": 512, **arguments}
    return EngineArgs(model=model, **arguments).create_engine_config()


def refusal(model, **arguments):
    with pytest.raises(Exception) as error:  # noqa: PT011 - vLLM wraps it; what it says is checked
        configure(model, **arguments)
    return str(error.value)


def test_this_package_s_own_is_found_by_its_name(tiny, tmp_path):
    found = configure(tiny, kv_transfer_config=transfer(tmp_path / "a" / "b")).kv_transfer_config
    assert found.kv_connector_module_path == XQUANT_CONNECTOR_MODULE
    assert found.kv_load_failure_policy == "recompute"
    assert not (tmp_path / "a").exists()


def test_windows_keep_blocks_of_their_own(tmp_path):
    """vLLM turns that off for connectors that do not know several groups of blocks."""
    gemma3 = str(save_tiny_model(tmp_path, "gemma3"))
    config = configure(gemma3, dtype="bfloat16", kv_transfer_config=transfer(tmp_path / "pages"))
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager


# Of vLLM's, with conditions of their own below.
SERVED = ("NixlConnector", "OffloadingConnector")


def test_of_all_connectors_that_vllm_knows_only_these_are_served(tiny):
    """vLLM's own list: one that a new version brings is refused until it is looked at."""
    known = sorted(KVConnectorFactory._registry)
    assert {*SERVED, "ExampleConnector", "LMCacheConnectorV1", "MultiConnector"} < {*known}
    config = configure(tiny)
    for name in {*known} - {*SERVED}:
        config.kv_transfer_config = KVTransferConfig(kv_connector=name, kv_role="kv_both")
        (problem,) = connector_problems(config)
        assert problem.startswith(f"the KV connector {name} is not supported: it does not know what pages of this")


@pytest.mark.parametrize("name", ["LMCacheConnectorV1", "NobodyKnowsThis"])
@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_others_are_refused_by_name(tiny, name, backend):
    said = refusal(tiny, attention_backend=backend, kv_transfer_config={"kv_connector": name, "kv_role": "kv_both"})
    assert f"{backend}: the KV connector {name} is not supported" in said
    assert "XQuantConnector" in said or (backend == "kivi" and "leave it out" in said)


def test_kivi_has_none(tiny, tmp_path):
    said = refusal(tiny, attention_backend="kivi", kv_transfer_config=transfer(tmp_path))
    assert "kivi: the KV connector XQuantConnector is not supported" in said


def test_a_connector_of_the_same_name_from_elsewhere_is_refused(tiny, tmp_path):
    said = refusal(tiny, kv_transfer_config=transfer(tmp_path, kv_connector_module_path="somebody.elses"))
    assert "kv_connector_module_path somebody.elses is not where XQuantConnector is; leave it out" in said


def test_settings_that_cannot_work(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, parts in (
        ("pages", ["'folder': 'pages'", "set the absolute path"]),
        (tmp_path / "file", ["is no folder", "set the path of one"]),
        (tmp_path / "file" / "below", ["is no folder"]),
    ):
        said = refusal(tiny, kv_transfer_config=transfer(folder))
        for part in ("kv_connector_extra_config", *parts):
            assert part in said


def test_a_folder_that_may_not_be_written(tiny, tmp_path, monkeypatch):
    """As for another user: root may write everywhere."""
    may = {os.R_OK | os.X_OK: True, os.W_OK | os.X_OK: False}
    monkeypatch.setattr("xquant_vllm.plugin.connectors.allowed.os.access", lambda path, mode: may.get(mode, True))
    for role in ("kv_both", "kv_producer"):
        assert "this user may not write to" in refusal(tiny, kv_transfer_config=transfer(tmp_path, role))
    monkeypatch.undo()
    configure(tiny, kv_transfer_config=transfer(tmp_path, "kv_consumer"))


def test_layers_of_a_draft_model_are_refused(tiny, tmp_path):
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    config = configure(tiny, kv_transfer_config=transfer(tmp_path), speculative_config=ngram)
    config.speculative_config.method = "eagle"
    (problem,) = connector_problems(config)
    assert "not supported with speculative decoding by 'eagle'" in problem
    assert problem.endswith("use one of ngram, suffix")


def test_offloading_on_cpus(tiny):
    """vLLM's own is for GPUs; this says so, with what to do instead."""
    connector = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    for arguments, what in (
        ({"kv_offloading_size": 0.1}, "--kv-offloading-size 0.1"),
        ({"kv_transfer_config": connector}, "the KV connector OffloadingConnector"),
    ):
        said = refusal(tiny, **arguments)
        for part in (f"xquant: {what} is not supported on CPUs", '"XQuantConnector"', '"/dev/shm/pages"'):
            assert part in said


def problems(tiny, monkeypatch, **arguments):
    """On a GPU, of a configuration that was made without them."""
    config = configure(tiny)
    cache = {name: arguments[name] for name in arguments if name != "kv_transfer_config"}
    for name, value in cache.items():
        monkeypatch.setattr(config.cache_config, name, value)
    if "kv_transfer_config" in arguments:
        config.kv_transfer_config = KVTransferConfig(**arguments["kv_transfer_config"])
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    found = list(connector_problems(config))
    monkeypatch.undo()
    return found


def offloading(**settings):
    return {"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": settings}


def test_offloading_on_gpus(tiny, monkeypatch):
    assert problems(tiny, monkeypatch, kv_offloading_size=4) == []
    known = {"cpu_bytes_to_use": 1 << 30, "blocks_per_chunk": 2, "spec_name": "CPUOffloadingSpec"}
    assert problems(tiny, monkeypatch, kv_transfer_config=offloading(**known)) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"kv_offloading_size": 4, "kv_offloading_backend": "lmcache"}, "--kv-offloading-backend lmcache"),
        ({"kv_transfer_config": offloading(spec_name="TieringOffloadingSpec")}, "spec_name TieringOffloadingSpec"),
        ({"kv_transfer_config": offloading(canonical_layout=True)}, "canonical_layout"),
        ({"kv_transfer_config": offloading(spec_module_path="x")}, "spec_module_path"),
        ({"kv_transfer_config": {**offloading(), "kv_connector_module_path": "x.y"}}, "OffloadingConnector is not"),
    ],
)
def test_offloading_that_hands_pages_to_others_is_refused(tiny, monkeypatch, arguments, part):
    (problem,) = problems(tiny, monkeypatch, **arguments)
    assert part in problem
    assert "not supported" in problem


def test_the_simple_offloading_is_refused(tiny, monkeypatch):
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    (problem,) = problems(tiny, monkeypatch, kv_offloading_size=4)
    assert "unset VLLM_USE_SIMPLE_KV_OFFLOAD" in problem


def nixl(**more):
    return {"kv_connector": "NixlConnector", "kv_role": "kv_producer", **more}


def test_nixl_is_this_package_s_class(tiny, monkeypatch):
    monkeypatch.setattr(nixl_utils, "is_nixl_available", lambda: True)
    known = {"backends": ["UCX"], "num_threads": 2, "kv_lease_duration": 60, "enforce_handshake_compat": True}
    config = configure(tiny, kv_transfer_config=nixl(kv_connector_extra_config=known))
    assert config.kv_transfer_config.kv_connector_module_path == NIXL_CONNECTOR_MODULE
    assert KVConnectorFactory.get_connector_class(config.kv_transfer_config).__module__ == NIXL_CONNECTOR_MODULE
    # What becomes of a request that gets no pages is for its user to say.
    assert config.kv_transfer_config.kv_load_failure_policy == "fail"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"kv_connector_extra_config": {"enforce_handshake_compat": False}},
            "engines with other factors would exchange",
        ),
        (
            {"kv_connector_extra_config": {"bidirectional_kv_xfer": True}},
            "NixlConnector with bidirectional_kv_xfer is not",
        ),
        ({"kv_buffer_device": "cuda"}, "with kv_buffer_device cuda is not supported: .*; set cpu, or leave it out"),
        ({"enable_permute_local_kv": True}, "with enable_permute_local_kv is not supported"),
        (
            {"kv_connector_module_path": "x.y"},
            "kv_connector_module_path x.y is not where NixlConnector is; leave it out",
        ),
    ],
)
def test_nixl_with_what_would_hand_pages_to_others_is_refused(tiny, monkeypatch, more, said):
    monkeypatch.setattr(nixl_utils, "is_nixl_available", lambda: True)
    config = configure(tiny)
    config.kv_transfer_config = KVTransferConfig(**nixl(**more))
    (problem,) = connector_problems(config)
    assert re.search(said, problem)


def test_nixl_without_its_package_with_stages_and_adapters(tiny, monkeypatch):
    config = configure(tiny, enable_lora=True)
    config.kv_transfer_config = KVTransferConfig(**nixl())
    config.parallel_config.pipeline_parallel_size = 2
    config.parallel_config.tensor_parallel_size = 3
    monkeypatch.setattr(nixl_utils, "is_nixl_available", lambda: False)
    package, ranks, stages, adapters = connector_problems(config)
    assert "needs the package nixl; install it with `pip install nixl`, or share pages through a folder" in package
    assert "not supported with --tensor-parallel-size 3, which nobody has tried yet; set 1" in ranks
    assert "not supported with --pipeline-parallel-size 2, which nobody has tried yet; set 1" in stages
    assert "not supported with --enable-lora" in adapters
