"""The caches that are compared when serving, as data: what `vllm serve` and `vllm.LLM` are told."""

import json
from dataclasses import dataclass, field
from typing import Any

BASELINE = "16bit"


@dataclass(frozen=True)
class Method:
    """One cache.

    Attributes:
        name: what options and tables call it.
        label: for people.
        engine: arguments of ``vllm.LLM``; `vllm serve` has options of the same names.
        absent_on_cpu: why CPUs do not have it, though vLLM starts; None where they do, or where vLLM refuses itself.
        calibrated: options of `xquant factorize` that make the folder that is served; None: the model's own is.
    """

    name: str
    label: str
    engine: dict[str, Any] = field(default_factory=dict)
    absent_on_cpu: str | None = None
    calibrated: tuple[str, ...] | None = None

    def settings(self) -> dict[str, Any]:
        """What the plugin is told; empty without it."""
        told: dict[str, Any] = {}
        for settings in self.engine.get("additional_config", {}).values():
            told |= settings
        return told

    def flags(self) -> list[str]:
        """The options of `vllm serve`."""
        words = []
        for name, value in self.engine.items():
            words += [f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict) else str(value)]
        return words


def _plugin(
    name: str, label: str, backend: str, settings: dict[str, Any], calibrated: tuple[str, ...] | None = None
) -> Method:
    engine = {"attention_backend": backend, "additional_config": {backend: settings}}
    return Method(name, label, engine, calibrated=calibrated)


# What is measured is the speed of a format, and those that are calibrated say so.
_DATA_FREE = {"calibration": "none"}
_CHAIN = {"method": "xquant-cl", **_DATA_FREE}

METHODS = {
    method.name: method
    for method in (
        Method(BASELINE, "16 bit"),
        Method("fp8", "FP8", {"kv_cache_dtype": "fp8"}),
        Method(
            "turboquant",
            "TurboQuant 4 bits",
            {"kv_cache_dtype": "turboquant_4bit_nc"},
            "vLLM's TurboQuant kernels are for GPUs; on CPUs it takes the pages for those of its own CPU_ATTN",
        ),
        _plugin("kivi", "KIVI 4 bits", "kivi", {"bits": 4}),
        _plugin("kivi-2", "KIVI 2 bits", "kivi", {"bits": 2}),
        _plugin("xquant", "xquant 4 bits", "xquant", {"bits": 4}),
        _plugin("xquant-3", "xquant 3 bits", "xquant", {"bits": 3, **_DATA_FREE}),
        _plugin("xquant-2", "xquant 2 bits", "xquant", {"bits": 2, **_DATA_FREE}),
        _plugin("calibrated-4", "xquant 4 bits, calibrated", "xquant", {}, ("--bits", "4")),
        _plugin("calibrated-3", "xquant 3 bits, calibrated", "xquant", {}, ("--bits", "3")),
        _plugin("calibrated-2", "xquant 2 bits, calibrated", "xquant", {}, ("--bits", "2")),
        _plugin("x", "X 4 bits, not hot", "xquant", {"bits": 4, "cache": "x", "hot": 0}),
        _plugin("x-hot", "X 4 bits, hot", "xquant", {"bits": 4, "cache": "x", "hot": "50%"}),
        _plugin("chain-2", "xquant-cl 2 bits, not hot", "xquant", {**_CHAIN, "bits": 2, "hot": 0}),
        _plugin("chain-2-hot", "xquant-cl 2 bits, hot", "xquant", {**_CHAIN, "bits": 2, "hot": "50%"}),
        _plugin("xquant-hot", "xquant 4 bits, hot", "xquant", {"bits": 4, "hot": "50%"}),
        _plugin(
            "joint-4-hot",
            "joint 4 bits, calibrated, hot",
            "xquant",
            {"hot": "50%"},
            ("--basis", "joint", "--bits", "4"),
        ),
        _plugin(
            "chain-3-hot",
            "xquant-cl 3 bits, calibrated, hot",
            "xquant",
            {"hot": "50%"},
            ("--method", "xquant-cl", "--bits", "3", "--anchor-interval", "4"),
        ),
        _plugin("xquant-cl", "xquant-cl 4 bits", "xquant", {**_CHAIN, "bits": 4}),
        _plugin("xquant-cl-2", "xquant-cl 2 bits", "xquant", {**_CHAIN, "bits": 2}),
    )
}

UNCALIBRATED = {name: method for name, method in METHODS.items() if method.calibrated is None}
