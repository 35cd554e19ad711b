"""What the dashboard of docker/compose.yaml asks Prometheus for."""

import json
import re
from pathlib import Path

DASHBOARD = Path(__file__).resolve().parent.parent.parent / "docker" / "observe" / "grafana" / "dashboard.json"


def expressions() -> list[str]:
    """All queries, in PromQL with Grafana's variables."""
    return [target["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for target in panel["targets"]]


def metric_names() -> set[str]:
    """The samples that they name, of this package and of vLLM."""
    return {name for expression in expressions() for name in re.findall(r"\b(?:vllm:|xquant_)\w+", expression)}
