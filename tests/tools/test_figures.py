"""The drawings of docs/how-it-works.md are those of the code, and can be read on dark pages."""

import json
import re
from pathlib import Path

import pytest
from draw_figures import draw_all
from figures.accuracy import MODEL, numbers
from figures.model import BLOCK_SIZE, PAGE, SIXTEEN_BIT_BYTES, sections
from figures.palette import DARK, darkened

from benchmarks.capacity_plot import RESULTS

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"
PICTURES = sorted((DOCS / "pictures").glob("*.svg"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return {path.name: path.read_text() for path in draw_all(tmp_path_factory.mktemp("pictures"))}


def content(svg):
    """Words and fillings of a drawing, and what it was drawn from: not how its version of matplotlib writes them."""
    words = re.findall(r"<!-- (.*?) -->", svg)
    return words, re.findall(r"<dc:description>(.*?)</dc:description>", svg), sorted(set(colors(svg)))


def colors(svg):
    return re.findall(r"#[0-9a-f]{6}\b", svg)


def test_the_files_are_up_to_date(drawn):
    assert set(drawn) == {path.name for path in PICTURES}
    old = [path.name for path in PICTURES if content(path.read_text()) != content(drawn[path.name])]
    assert old == [], "run make pictures"


def test_the_sections_of_a_page_follow_each_other_without_a_gap():
    at = 0
    for _, first, size in sections():
        assert first == at
        at += size
    assert at == PAGE.page_bytes == BLOCK_SIZE * PAGE.bytes_per_token


def test_every_color_has_a_dark_one(drawn):
    for name, svg in drawn.items():
        assert set(colors(svg)) <= set(DARK), name
        assert not set(colors(darkened(svg))) & (set(DARK) - set(DARK.values())), name


def _luminance(color):
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """Of two colors, as WCAG 2 has it."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_words_can_be_read_on_light_and_on_dark_paper():
    from figures import palette

    fillings = [palette.PAPER, palette.KEYS, palette.VALUES, palette.SCALES, palette.SIXTEEN, palette.INPUT]
    for filling in [*fillings, palette.HOT, palette.COLD]:
        assert contrast(palette.INK, filling) >= 4.5
        assert contrast(DARK[palette.INK], DARK[filling]) >= 4.5
    assert contrast(palette.FAINT, palette.PAPER) >= 4.5
    assert contrast(DARK[palette.FAINT], DARK[palette.PAPER]) >= 4.5


def test_the_page_says_what_the_drawings_show():
    text = " ".join((DOCS / "how-it-works.md").read_text().split())
    assert f"written once as {PAGE.bytes_per_token} bytes" in text
    assert f"takes {PAGE.page_bytes:,} bytes instead of {BLOCK_SIZE * SIXTEEN_BIT_BYTES:,}" in text


def test_the_page_says_what_the_results_say():
    divergence = {row["name"]: row["kl"] for row in json.loads((RESULTS / f"{MODEL}.json").read_text())["rows"]}
    ratios = [divergence[f"{name}, 3"] for name in ("xquant, per head", "xquant, joint", "xquant-cl")]
    free = divergence["xquant, data-free, 3"]
    # "about a third (per head), an eighth (`joint`) and less than a fifteenth (`xquant-cl`)"
    assert [round(free / value) for value in ratios[:2]] == [3, 8]
    assert free / ratios[2] > 15
    lines = numbers()
    (times, least), *_ = lines["KIVI, last 128 tokens in 16 bit"]
    ours = lines["xquant-cl, calibrated"]
    assert least < min(
        value
        for label, line in lines.items()
        if "xquant" not in label and "KIVI, last" not in label
        for _, value in line
    )
    assert times / ours[0][0] == pytest.approx(4 / 3, abs=0.03)
    assert ours[0][1] < least
