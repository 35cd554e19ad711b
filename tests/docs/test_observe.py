"""docs/observe.md has exactly the metrics that there are, each with its kind."""

import re

from tests.docs.pages import ROOT
from xquant_vllm.plugin.observe.metrics import METRICS

PAGE = ROOT / "docs" / "observe.md"


def test_the_table_has_all_metrics_and_no_other():
    rows = re.findall(r"^\| `(xquant_\w+)` \| (\w+) \|", PAGE.read_text(), re.M)
    names = [metric.name if metric.kind == "summary" else metric.samples[0] for metric in METRICS]
    assert rows == [(name, metric.kind) for name, metric in zip(names, METRICS, strict=True)]
