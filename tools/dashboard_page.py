"""Draws the panels of docker/observe/grafana/dashboard.json without Grafana, for pictures: one HTML page with SVG.

The queries are the dashboard's own. A Prometheus answers them, one that has scraped a server:

    tools/dashboard_page.py http://localhost:9090 --model smollm2 --minutes 5 --out dashboard.html
"""

from __future__ import annotations

import argparse
import html
import json
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).resolve().parent.parent / "docker" / "observe" / "grafana" / "dashboard.json"
# Of a panel, in pixels: a column of Grafana's grid, a row, and what is left around a graph.
COLUMN, ROW = 50, 30
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 34, 44
COLORS = ("#73bf69", "#5794f2", "#f2cc0c", "#ff780a", "#b877d9")
STYLE = """
body { margin: 0; background: #111217; color: #ccccdc; font: 12px sans-serif }
h1 { font-size: 17px; font-weight: 500; margin: 12px 10px 6px }
main { position: relative }
section { position: absolute; box-sizing: border-box; background: #181b1f; border: 1px solid #2c2f36 }
h2 { font-size: 13px; font-weight: 500; margin: 8px 10px }
.stat { display: flex; justify-content: space-around; text-align: center; margin-top: 6px }
.stat b { display: block; font-size: 28px; font-weight: 500; color: #73bf69 }
"""


def variables(model: str, step: int) -> dict[str, str]:
    """What Grafana would fill in: over how much a rate is taken, and whose numbers are shown."""
    return {"$model": model, "$__rate_interval": f"{4 * step}s", "$probe": "1m"}


def filled(expression: str, values: dict[str, str]) -> str:
    """A query without variables."""
    for name, value in values.items():
        expression = expression.replace(name, value)
    return expression


def series(url: str, expression: str, start: float, end: float, step: int) -> list[dict[str, Any]]:
    """What Prometheus answers for a range of time."""
    query = {"query": expression, "start": f"{start:.0f}", "end": f"{end:.0f}", "step": str(step)}
    with urllib.request.urlopen(f"{url}/api/v1/query_range?{urllib.parse.urlencode(query)}", timeout=30) as answer:
        return json.loads(answer.read())["data"]["result"]


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """A number as it is written in a panel."""
    if unit in ("bytes", "decbytes"):
        base = 1024 if unit == "bytes" else 1000
        for prefix in ("", "Ki" if base == 1024 else "k", "Mi" if base == 1024 else "M", "Gi" if base == 1024 else "G"):
            if abs(value) < base or prefix in ("Gi", "G"):
                return f"{value:.3g} {prefix}B"
            value /= base
    if unit == "percentunit":
        return f"{100 * value:.3g}%"
    if decimals is not None:
        return f"{value:,.{decimals}f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def lines_of(
    panel: dict[str, Any], answers: list[list[dict[str, Any]]]
) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Name and points of every line of a panel."""
    for target, answer in zip(panel["targets"], answers, strict=True):
        for one in answer:
            name = target["legendFormat"]
            for label, value in one["metric"].items():
                name = name.replace("{{" + label + "}}", value)
            points = [(at, float(text)) for at, text in one["values"] if text != "NaN"]
            if points:
                yield name, points


def graph(panel: dict[str, Any], lines: list[tuple[str, list[tuple[float, float]]]], start: float, end: float) -> str:
    """A panel of lines over time, as SVG."""
    unit = panel["fieldConfig"]["defaults"]["unit"]
    width, height = panel["gridPos"]["w"] * COLUMN - 10, panel["gridPos"]["h"] * ROW - 10
    most = max((value for _, points in lines for _, value in points), default=0) or 1
    wide, high = width - LEFT - RIGHT, height - TOP - BOTTOM
    parts = [f'<svg width="{width}" height="{height}" font-size="11" fill="#9fa7b3">']
    for fifth in range(5):
        y = TOP + high * (1 - fifth / 4)
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + wide}" y1="{y:.1f}" y2="{y:.1f}" stroke="#2c2f36"/>')
        text = shown(most * fifth / 4, unit)
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for quarter in range(5):
        at, x = start + (end - start) * quarter / 4, LEFT + wide * quarter / 4
        clock = time.strftime("%H:%M:%S", time.gmtime(at))
        anchor = "end" if quarter == 4 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{TOP + high + 16}" text-anchor="{anchor}">{clock}</text>')
    x = float(LEFT)
    for (name, points), color in zip(lines, COLORS, strict=False):
        path = " ".join(
            f"{LEFT + wide * (at - start) / (end - start):.1f},{TOP + high * (1 - value / most):.1f}"
            for at, value in points
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<rect x="{x:.0f}" y="{height - 18}" width="12" height="3" fill="{color}"/>')
        parts.append(f'<text x="{x + 16:.0f}" y="{height - 13}">{html.escape(name)}</text>')
        x += 30 + 6.2 * len(name)
    return "".join((*parts, "</svg>"))


def stat(panel: dict[str, Any], lines: list[tuple[str, list[tuple[float, float]]]]) -> str:
    """A panel of numbers, the last of each line."""
    defaults = panel["fieldConfig"]["defaults"]
    cells = [
        f"<div><b>{shown(points[-1][1], defaults['unit'], defaults.get('decimals'))}</b>{html.escape(name)}</div>"
        for name, points in lines
    ]
    return f'<div class="stat">{"".join(cells)}</div>'


def page(url: str, model: str, start: float, end: float, step: int) -> str:
    """The dashboard as a page."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    values = variables(model, step)
    parts = [
        f"<!doctype html><meta charset=utf-8><style>{STYLE}</style><h1>{html.escape(dashboard['title'])}</h1><main>"
    ]
    for panel in dashboard["panels"]:
        answers = [series(url, filled(target["expr"], values), start, end, step) for target in panel["targets"]]
        lines, place = list(lines_of(panel, answers)), panel["gridPos"]
        body = stat(panel, lines) if panel["type"] == "stat" else graph(panel, lines, start, end)
        title = f"<h2>{html.escape(panel['title'])}</h2>"
        if panel["type"] != "stat":
            title = f'<h2 style="position: absolute">{html.escape(panel["title"])}</h2>'
        parts.append(
            f'<section style="left: {place["x"] * COLUMN + 5}px; top: {place["y"] * ROW}px; '
            f'width: {place["w"] * COLUMN - 8}px; height: {place["h"] * ROW - 8}px">{title}{body}</section>'
        )
    return "".join((*parts, "</main>"))


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="of a Prometheus")
    parser.add_argument("--model", required=True, help="the model's name in the metrics")
    parser.add_argument("--minutes", type=float, default=5, help="how far back (default %(default)s)")
    parser.add_argument("--step", type=int, default=2, help="seconds between points (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the page")
    options = parser.parse_args()
    end = time.time()
    text = page(options.url, options.model, end - 60 * options.minutes, end, options.step)
    options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
