"""What docs/connectors.md says of the time of a hit is what was measured."""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NAMES = {"16bit": "16 bit", "xquant": "xquant, 4 bits", "xquant-2": "xquant, 2 bits"}
COLUMNS = ("computed_ms", "files_ms", "read_seconds_ms", "own_ms")


def test_times_are_those_of_the_result():
    page = (ROOT / "docs" / "connectors.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu" / "xeon-amx" / "pages.json").read_text())
    for row in result["rows"]:
        cells = [f"{row[name]['median']:.0f} ({row[name]['low']:.0f}-{row[name]['high']:.0f})" for name in COLUMNS]
        assert f"| {NAMES[row['method']]} | {' | '.join(cells)} |" in page
    assert f"{result['prefix']:,} tokens in files and {result['question']} new ones" in page
    plain, *ours = (row["files_ms"]["median"] for row in result["rows"])
    assert all(0.4 < time / plain < 0.6 for time in ours)  # "half as long"
