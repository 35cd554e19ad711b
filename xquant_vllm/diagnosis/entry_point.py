"""Whether vLLM finds the plugin: by its entry point, as vLLM itself looks for it."""

from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

GROUP, NAME = "vllm.general_plugins", "xquant"
VALUE = "xquant_vllm.plugin.entry_point:register"


def entry_point_facts(environment: Mapping[str, str]) -> dict[str, Any]:
    """``found``: what the entry point names, or None; ``allowed``: whether ``VLLM_PLUGINS`` lets vLLM load it."""
    found = [point.value for point in entry_points(group=GROUP) if point.name == NAME]
    plugins = environment.get("VLLM_PLUGINS")
    return {"found": found[0] if found else None, "allowed": plugins is None or NAME in plugins.split(",")}
