"""The picture of README.md is made of result files, and what README.md says beside it is what they say."""

import json
from pathlib import Path

import pytest

from benchmarks.capacity_plot import LINES, MODELS, RESULTS, draw, points

README = Path(__file__).resolve().parent.parent.parent / "README.md"
SMOLLM2, GEMMA = MODELS


@pytest.fixture(scope="module")
def results():
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in MODELS}


def test_every_line_has_its_points(results):
    for label, pattern, bits, *_ in LINES:
        assert len(points(results[SMOLLM2], pattern, bits)) == len(bits), label
    # Layers of several kinds have no chains.
    assert points(results[GEMMA], "xquant-cl, {}", (4, 3, 2)) == []


def test_capacities_grow_as_bits_fall(results):
    times = [times for times, _ in points(results[SMOLLM2], "xquant, per head, {}", (4, 3, 2))]
    assert times == sorted(times)
    assert times[0] > 3


def test_the_picture_is_drawn(results, tmp_path):
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_readme_has_the_figures_of_the_results(results):
    text = " ".join(README.read_text().split())

    def point(model: str, pattern: str, bits: int) -> tuple[float, float]:
        (found,) = points(results[model], pattern, (bits,))
        return found

    four, two = (point(SMOLLM2, "xquant, per head, {}", bits) for bits in (4, 2))
    assert f"{four[0]:.1f} times the tokens of a 16-bit cache at 4 bits" in text
    assert f"in perplexity of {four[1]:.1f}, and" in text
    joint, chain = (point(SMOLLM2, pattern, 2) for pattern in ("xquant, joint, {}", "xquant-cl, {}"))
    losses = f"+{two[1]:.1f} (one basis per head), +{joint[1]:.1f} (`joint`) or +{chain[1]:.1f} (`xquant-cl`)"
    assert f"{two[0]:.1f} times at 2 bits** with {losses}" in text
    gemma = [point(GEMMA, pattern, 4)[1] for pattern in ("xquant, per head, {}", "xquant, joint, {}")]
    assert f"4 bits cost +{gemma[0]:.2f} or +{gemma[1]:.2f} (`joint`)" in text

    free = {bits: point(SMOLLM2, "xquant, data-free, {}", bits) for bits in (4, 3, 2)}
    other = point(GEMMA, "xquant, data-free, {}", 4)
    holds = f"4 bits, holds {free[4][0]:.1f} times the tokens at +{free[4][1]:.2f} on SmolLM2"
    assert f"{holds}, and {other[0]:.1f} times at +{other[1]:.2f} on Gemma 3" in text
    assert f"increases by {free[3][1]:.1f} at 3 bits, and by {free[2][1]:.0f} at 2" in text


def test_the_page_on_settings_has_the_figures_of_the_results(results):
    page = (README.parent / "docs" / "choosing.md").read_text()
    rows = {row["name"]: row for row in results[SMOLLM2]["rows"]}

    def cells(name: str) -> str:
        row = rows[name]
        times, layers = row["bytes_per_token_16bit"] / row["bytes_per_token"], 30
        return f"{row['bytes_per_token'] / layers:.0f}, {times:.2f}x | {row['increase']:+.2f} ({row['kl']:.3f})"

    for bits in (4, 3, 2):
        assert f"| {bits} | {cells(f'xquant, data-free, {bits}')} | {cells(f'xquant, per head, {bits}')} |" in page
    for name in ("joint", "cl"):
        row = rows[f"xquant, {name}, 2" if name == "joint" else "xquant-cl, 2"]
        assert f"({row['bytes_per_token'] / 30:.0f} bytes: {row['increase']:+.2f}, {row['kl']:.3f})" in page
