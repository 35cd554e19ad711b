"""What the ranks of a server must have in common, and ways to share a model out that are refused.

Ranks may be on several machines, each with packages, variables and files of its own. If they differ in what is named
here, a rank's pages hold something else than its neighbours', and its part of the answer is wrong. That is found twice:
an engine writes what it has into its configuration, which travels to all ranks that it starts; and the ranks of tensor
parallelism, which may have been started by hand on every machine, ask each other.
"""

import os
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from xquant_vllm import __version__
from xquant_vllm.attention import dispatch
from xquant_vllm.attention.per_object import per_object
from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.engine_factors import factors_of
from xquant_vllm.plugin.registration import BACKEND_NAME, BACKENDS, selected_backends
from xquant_vllm.scheme.factor_header import header_checksum

# Where an engine's version and facts are in `additional_config`.
VERSION_KEY, FACTS_KEY = "xquant_version", "xquant_engine"
# Variables that decide what is computed.
_VARIABLES = (dispatch.OVERRIDE_VARIABLE,)


def write_facts(vllm_config: Any) -> None:
    """Write down what this process has, for the ranks; called where the configuration is made.

    vLLM's key of compiled graphs covers ``additional_config``, but nothing else of this package: so another version
    does not reuse a graph, either.
    """
    if isinstance(vllm_config.additional_config, dict):
        facts = {VERSION_KEY: __version__, FACTS_KEY: _facts(vllm_config)}
        vllm_config.additional_config = {**vllm_config.additional_config, **facts}


def has_facts(vllm_config: Any) -> bool:
    """Whether a configuration was made from that of an engine, whose facts are written down in it: a draft's is."""
    return isinstance(vllm_config.additional_config, Mapping) and FACTS_KEY in vllm_config.additional_config


@per_object
def check_rank(vllm_config: Any) -> None:
    """Refuse a rank that is not set up like its engine, when its first layer is built.

    Ranks of tensor parallelism wait for :func:`check_neighbours`: if one of them ended alone, the others would say no
    more than that a connection was closed.

    Raises:
        SettingsError: it names the rank, its machine, what differs, and what to do.
    """
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        _compare_with_engine(vllm_config)


def check_neighbours(vllm_config: Any) -> None:
    """Refuse ranks of tensor parallelism that are not set up alike, or not like their engine.

    All of them call this, and all are refused, with the same words.

    Raises:
        SettingsError: likewise, of the first rank that is not like its engine, or else not like the first of all.
    """
    size = vllm_config.parallel_config.tensor_parallel_size
    if size == 1:
        return
    from vllm.distributed import get_tp_group

    unlike_engine = None
    try:
        _compare_with_engine(vllm_config)
    except SettingsError as error:
        unlike_engine = str(error)
    own = _who(vllm_config), {"version": __version__, **_facts(vllm_config)}, unlike_engine
    found: list[Any] = [None] * size
    torch.distributed.all_gather_object(found, own, group=get_tp_group().cpu_group)
    for *_, problem in found:
        if problem is not None:
            raise SettingsError(problem)
    first, expected, _ = found[0]
    for who, facts, _ in found[1:]:
        _compare(who, facts, first, expected)


def _compare_with_engine(vllm_config: Any) -> None:
    additional = vllm_config.additional_config
    if isinstance(additional, Mapping) and FACTS_KEY in additional:
        engine = {"version": additional[VERSION_KEY], **additional[FACTS_KEY]}
        _compare(_who(vllm_config), {"version": __version__, **_facts(vllm_config)}, "the engine", engine)


def _who(vllm_config: Any) -> str:
    return f"rank {vllm_config.parallel_config.rank} on {platform.node()}"


def _facts(vllm_config: Any) -> dict[str, Any]:
    """What this process has, as JSON."""
    additional, header = vllm_config.additional_config, None
    if BACKEND_NAME in selected_backends(vllm_config.attention_config):
        _, header = factors_of(vllm_config)
    settings = additional if isinstance(additional, Mapping) else {}
    return {
        "model": getattr(vllm_config.model_config, "model", None),
        "settings": {name.lower(): settings.get(name.lower()) for name in BACKENDS},
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "factors": None if header is None else header_checksum(header.model_dump(mode="json")),
    }


def _compare(who: str, facts: Mapping[str, Any], other: str, expected: Mapping[str, Any]) -> None:
    if facts["version"] != expected["version"]:
        raise SettingsError(
            f"xquant: {who} has version {facts['version']} of xquant-vllm, {other} has {expected['version']}; install "
            "the same on every node"
        )
    for kind, remedy in (("variables", "set it alike on every node"), ("settings", "give every node the same")):
        for name, value in expected[kind].items():
            if facts[kind].get(name) != value:
                raise SettingsError(
                    f"xquant: {who} runs with {_given(name, facts[kind].get(name))}, {other} with "
                    f"{_given(name, value)}; {remedy}"
                )
    # A draft model has a configuration of its own, with the facts of the model that it is for.
    if facts["model"] == expected["model"] and facts["factors"] != expected["factors"]:
        has = "no factors" if facts["factors"] is None else "factors"
        theirs = "none" if expected["factors"] is None else "factors that are not the same"
        raise SettingsError(
            f"xquant: {who} finds {has} in {facts['model']}, where {other} has {theirs}; copy one folder to every "
            "node, or put it where all nodes read it"
        )


def _given(name: str, value: Any) -> str:
    return f"no {name}" if value is None else f"{name}={value}"


def unsupported_ranks(vllm_config: Any) -> Iterator[str]:
    """Ways to share a model out that the platform does not have: for each that is asked for a line with what to do."""
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    for option, by_ray in (
        ("--distributed-executor-backend", parallel.use_ray),
        ("--data-parallel-backend", parallel.data_parallel_backend == "ray"),
    ):
        if by_ray and not current_platform.ray_device_key:
            yield (
                f"{option} ray cannot work on the platform {current_platform.device_type!r}, whose devices vLLM does "
                "not offer to Ray, whatever the cache; set mp"
            )
    stages = parallel.pipeline_parallel_size
    # What a later rank receives into is made while a traced model is warmed up.
    if stages > 1 and current_platform.is_cpu() and not vllm_config.compilation_config.mode:
        yield (
            f"--pipeline-parallel-size {stages} cannot work on CPUs with --enforce-eager, with which vLLM's model "
            "runner for CPUs does not prepare for it, whatever the cache; leave --enforce-eager out"
        )
