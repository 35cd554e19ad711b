"""What ranks must have in common with their engine, and the ways to share a model out that are refused."""

import json
import pickle
import platform
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import SettingsError, UnsupportedError
from xquant_vllm.kivi.plugin.impl import KiviImpl
from xquant_vllm.offline.factorize import factorize
from xquant_vllm.offline.factorize_options import FactorizeOptions
from xquant_vllm.plugin import ranks
from xquant_vllm.plugin.backend.impl import XQuantImpl

RANK = 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model and its factors; copy before changing."""
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny_model(folder / "model", "llama")
    factorize(FactorizeOptions(model, folder / "factors", dtype="bfloat16", bits=8))
    return model, folder / "factors"


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny[1], tmp_path / "served")


def configure(model, **arguments):
    arguments = {"attention_backend": "xquant", "skip_tokenizer_init": True, "max_model_len": 256, **arguments}
    return EngineArgs(model=str(model), dtype="bfloat16", **arguments).create_engine_config()


def build_layer(config, implementation=XQuantImpl):
    """What a rank does with a configuration that has come from its engine."""
    config = pickle.loads(pickle.dumps(config))
    config.parallel_config.rank = RANK
    with set_current_vllm_config(config):
        return implementation(4, 32, 1.0, 2)


def refused(config, problem, implementation=XQuantImpl):
    with pytest.raises(SettingsError) as error:
        build_layer(config, implementation)
    message = str(error.value)
    assert message.startswith(f"xquant: rank {RANK} on {platform.node()} {problem}")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_a_rank_that_is_set_up_like_its_engine_is_served(tiny, monkeypatch, backend):
    implementation = {"xquant": XQuantImpl, "kivi": KiviImpl}[backend]
    for value in (None, "reference"):
        if value is not None:
            monkeypatch.setenv("XQUANT_ATTENTION_KERNELS", value)
        for model in tiny:
            build_layer(configure(model, attention_backend=backend), implementation)


@pytest.mark.parametrize(("backend", "implementation"), [("xquant", XQuantImpl), ("kivi", KiviImpl)])
def test_another_version_is_refused(tiny, monkeypatch, backend, implementation):
    config = configure(tiny[0], attention_backend=backend)
    monkeypatch.setattr(ranks, "__version__", "9.9")
    message = refused(config, "has version 9.9 of xquant-vllm, the engine has", implementation)
    assert message.endswith("install the same on every node")


@pytest.mark.parametrize(
    ("engines", "ranks_own", "named"),
    [
        (None, "reference", "runs with XQUANT_ATTENTION_KERNELS=reference, the engine with no XQUANT_ATTENTION_KERNEL"),
        ("portable", None, "runs with no XQUANT_ATTENTION_KERNELS, the engine with XQUANT_ATTENTION_KERNELS=portable"),
    ],
)
def test_a_variable_of_one_node_is_found(tiny, monkeypatch, engines, ranks_own, named):
    def set_variable(value):
        monkeypatch.delenv("XQUANT_ATTENTION_KERNELS", raising=False)
        if value is not None:
            monkeypatch.setenv("XQUANT_ATTENTION_KERNELS", value)

    set_variable(engines)
    config = configure(tiny[0])
    set_variable(ranks_own)
    assert refused(config, named).endswith("set it alike on every node")


def test_factors_that_one_node_lacks(folder):
    """It would make its own, at the default number of bits: 4 instead of 8."""
    config = configure(folder)
    (folder / "xquant_factors.json").unlink()
    (folder / "xquant_factors.safetensors").unlink()
    message = refused(config, f"finds no factors in {folder}, where the engine has factors that are not the same")
    assert "copy one folder to every node" in message


def test_factors_that_only_one_node_has(tiny, tmp_path):
    model = shutil.copytree(tiny[0], tmp_path / "served")
    config = configure(model)
    factorize(FactorizeOptions(tiny[0], tmp_path / "made", dtype="bfloat16"))
    for name in ("xquant_factors.json", "xquant_factors.safetensors"):
        shutil.copy(tmp_path / "made" / name, model)
    refused(config, f"finds factors in {model}, where the engine has none")


def test_other_factors_of_the_same_model(tiny, folder, tmp_path):
    """Of other bits: all that is checked of them on a rank by itself is right."""
    config = configure(folder)
    factorize(FactorizeOptions(tiny[0], tmp_path / "made", dtype="bfloat16", bits=4))
    shutil.copy(tmp_path / "made" / "xquant_factors.json", folder)
    refused(config, f"finds factors in {folder}, where the engine has factors that are not the same")


def test_a_draft_model_is_not_held_to_the_factors_of_the_other(tiny):
    config = configure(tiny[1])
    config.model_config = configure(tiny[0]).model_config
    build_layer(config)


def test_the_facts_are_json_and_keep_nothing_secret(tiny):
    facts = configure(tiny[1]).additional_config[ranks.FACTS_KEY]
    assert json.loads(json.dumps(facts)) == facts
    assert set(facts) == {"model", "settings", "variables", "factors"}


def ask_each_other(monkeypatch, configs):
    """What ranks of tensor parallelism say, in threads: their errors, or None."""
    barrier, answers, here = threading.Barrier(len(configs)), [None] * len(configs), threading.local()

    def all_gather_object(found, own, group):
        assert group == "the group"
        answers[here.rank] = pickle.loads(pickle.dumps(own))
        barrier.wait(30)
        found[:] = answers

    def rank(number):
        here.rank, parallel = number, configs[number].parallel_config
        parallel.rank, parallel.tensor_parallel_size = number, len(configs)
        try:
            ranks.check_neighbours(configs[number])
        except SettingsError as error:
            return str(error)

    monkeypatch.setattr(torch.distributed, "all_gather_object", all_gather_object)
    monkeypatch.setattr("vllm.distributed.get_tp_group", lambda: SimpleNamespace(cpu_group="the group"))
    with ThreadPoolExecutor(len(configs)) as pool:
        return list(pool.map(rank, range(len(configs))))


def test_ranks_that_are_started_by_hand_ask_each_other(tiny, folder, monkeypatch):
    """As with `vllm serve --nnodes`: every machine has a configuration of its own."""
    node = platform.node()
    same = [configure(tiny[1]) for _ in range(3)]
    assert ask_each_other(monkeypatch, same) == [None] * 3
    settings = [configure(tiny[0], additional_config={"xquant": {"bits": bits}}) for bits in (4, 4, 8)]
    assert (
        ask_each_other(monkeypatch, settings)
        == [
            f"xquant: rank 2 on {node} runs with xquant={{'bits': 8}}, rank 0 on {node} with xquant={{'bits': 4}}; "
            "give every node the same"
        ]
        * 3
    )
    configs = [configure(folder), configure(folder)]
    for config in configs:
        del config.additional_config[ranks.FACTS_KEY]
    found = {0: ranks.factors_of(configs[0]), 1: (folder, None)}
    monkeypatch.setattr(ranks, "factors_of", lambda config: found[config.parallel_config.rank])
    assert (
        ask_each_other(monkeypatch, configs)
        == [
            f"xquant: rank 1 on {node} finds no factors in {folder}, where rank 0 on {node} has factors that are not "
            "the same; copy one folder to every node, or put it where all nodes read it"
        ]
        * 2
    )


def test_all_ranks_say_that_one_is_unlike_its_engine(tiny, monkeypatch):
    """That one does not end alone, which would leave the others with a connection that was closed."""
    configs = [configure(tiny[0], tensor_parallel_size=2) for _ in range(2)]
    configs[1].additional_config[ranks.FACTS_KEY]["variables"]["XQUANT_ATTENTION_KERNELS"] = "portable"
    for config in configs:
        build_layer(config)
    (said,) = set(ask_each_other(monkeypatch, configs))
    assert said == (
        f"xquant: rank 1 on {platform.node()} runs with no XQUANT_ATTENTION_KERNELS, the engine with "
        "XQUANT_ATTENTION_KERNELS=portable; set it alike on every node"
    )


def test_one_rank_asks_nobody(tiny):
    ranks.check_neighbours(configure(tiny[0]))


@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_ray_on_cpus_is_refused_before_a_rank_is_started(tiny, backend):
    """vLLM gives Ray no CPUs, with any cache, which it finds out in the engine's process."""
    named = (
        f"^{backend}: --distributed-executor-backend ray cannot work on the platform 'cpu', whose devices vLLM does "
        "not offer to Ray, whatever the cache; set mp$"
    )
    with pytest.raises(UnsupportedError, match=named):
        configure(tiny[0], attention_backend=backend, tensor_parallel_size=2, distributed_executor_backend="ray")


@pytest.mark.parametrize("backend", ["xquant", "kivi"])
def test_a_pipeline_on_cpus_is_not_served_eagerly(tiny, backend):
    """The engine would end at its first request (``tests/e2e/scale/test_pipeline_parallel.py``)."""
    named = (
        f"^{backend}: --pipeline-parallel-size 2 cannot work on CPUs with --enforce-eager, .*; leave --enforce-eager"
    )
    pipeline = {"attention_backend": backend, "pipeline_parallel_size": 2}
    with pytest.raises(UnsupportedError, match=named):
        configure(tiny[0], enforce_eager=True, **pipeline)
    configure(tiny[0], **pipeline)
    configure(tiny[0], enforce_eager=True, attention_backend=backend)


def test_a_pipeline_serves_a_chain(tiny):
    configure(
        tiny[0], additional_config={"xquant": {"method": "xquant-cl", "calibration": "none"}}, pipeline_parallel_size=2
    )
