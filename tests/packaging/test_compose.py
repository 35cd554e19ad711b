"""docker/compose.yaml: what it builds and mounts is there, its parts find each other, and the dashboard asks for what
there is. (That a server has all of it is in tests/e2e/test_server.py. No container engine runs in the tests.)
"""

import json
import re
from pathlib import Path

import pytest
import yaml

from tests.packaging.dashboard import DASHBOARD, expressions, metric_names
from tests.packaging.image_build import ROOT
from xquant_vllm.plugin.observe.metrics import LABELS, METRICS
from xquant_vllm.scheme.settings import XQuantSettings, parse_settings

COMPOSE = ROOT / "docker" / "compose.yaml"
SERVICES = yaml.safe_load(COMPOSE.read_text())["services"]
VOLUMES = yaml.safe_load(COMPOSE.read_text())["volumes"]


def mounts(service: str) -> dict[str, Path]:
    """Files of this repository by where a container finds them."""
    parts = [volume.split(":") for volume in SERVICES[service]["volumes"]]
    return {where: (COMPOSE.parent / what).resolve() for what, where, *_ in parts if what.startswith("./")}


def test_what_is_built_and_mounted_is_there():
    build = SERVICES["vllm"]["build"]
    context = (COMPOSE.parent / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    files = [file for service in ("prometheus", "grafana") for file in mounts(service).values()]
    assert len(files) == 4
    assert all(file.is_file() for file in files)


def test_volumes_are_declared_and_images_pinned():
    for name, service in SERVICES.items():
        assert re.fullmatch(r"[\w/-]+:(cpu|v?\d+\.\d+\.\d+)", service["image"]), name
        for volume in service["volumes"]:
            assert volume.startswith((".", "$")) or volume.split(":")[0] in VOLUMES


def test_the_server_is_given_settings_that_there_are():
    """Each of the form `--additional-config.xquant.NAME=${VARIABLE:-default}`."""
    found = [
        re.fullmatch(r"--additional-config\.xquant\.(\w+)=\$\{\w+:-([^}]+)\}", of) for of in SERVICES["vllm"]["command"]
    ]
    given = {match[1]: json.loads(match[2]) for match in found if match is not None}
    assert given == {"bits": 4, "quality_probe": 0.001}
    assert isinstance(parse_settings(given), XQuantSettings)


def test_the_parts_find_each_other():
    (scraped,) = yaml.safe_load(mounts("prometheus")["/etc/prometheus/prometheus.yml"].read_text())["scrape_configs"]
    (target,) = scraped["static_configs"][0]["targets"]
    host, port = target.split(":")
    assert f"{port}:{port}" in SERVICES[host]["ports"]
    inside = mounts("grafana")
    provisioning = "/etc/grafana/provisioning"
    (source,) = yaml.safe_load(inside[f"{provisioning}/datasources/xquant.yaml"].read_text())["datasources"]
    host, port = re.fullmatch(r"http://(\w+):(\d+)", source["url"]).groups()
    assert f"127.0.0.1:{port}:{port}" in SERVICES[host]["ports"]
    (provider,) = yaml.safe_load(inside[f"{provisioning}/dashboards/xquant.yaml"].read_text())["providers"]
    assert [where for where, file in inside.items() if file == DASHBOARD] == [
        f"{provider['options']['path']}/xquant.json"
    ]
    sources = {
        of["datasource"]["uid"]
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for of in (panel, *panel["targets"])
    }
    assert sources == {source["uid"]}


def test_the_dashboard_shows_every_metric_and_no_other():
    ours = {name for name in metric_names() if name.startswith("xquant_")}
    assert ours == {sample for metric in METRICS for sample in metric.samples}
    assert any(name.startswith("vllm:") for name in metric_names())


def test_the_dashboards_labels_are_those_of_the_metrics():
    """All filters go by the model; `rank` is of this package's metrics alone, of which each has a rank 0."""
    for expression in expressions():
        for name, labels in re.findall(r"([\w:]+)\{([^}]*)\}", expression):
            used = set(re.findall(r"(\w+)=", labels))
            assert used <= set(LABELS)
            assert "model_name" in used
            assert "rank" not in used or name.startswith("xquant_")


@pytest.mark.parametrize("expression", expressions())
def test_brackets_are_closed(expression):
    for pair in ("()", "[]", "{}"):
        assert expression.count(pair[0]) == expression.count(pair[1])
