"""The dashboard drawn without Grafana: the queries that reach Prometheus, and what of its answers is shown."""

import json
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, HTTPServer

import dashboard_page
import pytest

from tests.packaging.dashboard import expressions


class Answers(BaseHTTPRequestHandler):
    """Of a Prometheus: two points of a line; of per-layer queries two lines."""

    asked: list[str] = []

    def do_GET(self) -> None:
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        self.asked.append(query["query"][0])
        at = float(query["start"][0])
        values = [[at, "1"], [at + 30, "NaN"], [at + 60, "3"]]
        metrics = [{"layer": "7"}, {"layer": "8"}] if "by (layer)" in query["query"][0] else [{}]
        result = [{"metric": metric, "values": values} for metric in metrics]
        body = json.dumps({"data": {"result": result}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        """Quiet."""


@pytest.fixture
def prometheus():
    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Answers.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_query_is_asked_and_every_panel_drawn(prometheus):
    page = dashboard_page.page(prometheus, "m", 1000, 1060, 2)
    assert len(Answers.asked) == len(expressions())
    assert not [query for query in Answers.asked if "$" in query]
    assert all('model_name="m"' in query for query in Answers.asked)
    assert page.count("<section") == 10
    assert page.count("<svg") == 7
    assert page.count("<polyline") == len(expressions()) - 6 + 1
    assert {"layer 7", "layer 8"} <= set(re.findall(r">([^<]+)<", page))
    # What is no number is left out.
    assert all(len(points.split()) == 2 for points in re.findall(r'points="([^"]+)"', page))


@pytest.mark.parametrize(
    ("value", "unit", "decimals", "text"),
    [
        (6660, "decbytes", None, "6.66 kB"),
        (3 << 29, "bytes", None, "1.5 GiB"),
        (512, "bytes", None, "512 B"),
        (0.0612, "percentunit", None, "6.12%"),
        (3.459, "none", 2, "3.46"),
        (161234, "locale", 0, "161,234"),
        (0.0123, "none", None, "0.0123"),
    ],
)
def test_numbers_are_written_by_their_unit(value, unit, decimals, text):
    assert dashboard_page.shown(value, unit, decimals) == text
