"""benchmarks/serving/pages with a real engine of a tiny model."""

import json

import pytest

from benchmarks.files import read_json
from benchmarks.serving.pages.__main__ import main, rows
from tests.tiny_models import save_tiny_model


def answer(files: float, read: int) -> dict:
    times = {"computed": 2.0, "own": 0.1, "read_seconds": 0.01, "written_seconds": 0.02}
    return {**times, "files": files, "tokens": 100, "read_bytes": read, "written_bytes": read + 50}


def test_a_row_compares_with_16_bit_in_the_same_round() -> None:
    taken = {"16bit": [answer(0.4, 800), answer(0.8, 800)], "xquant": [answer(0.2, 200), answer(0.2, 200)]}
    plain, ours = rows(taken)
    assert (plain["bytes_ratio"], plain["files_ratio"]["median"]) == (1, 1)
    assert ours["bytes_ratio"] == 4
    assert ours["files_ratio"]["median"] == 0.375
    assert ours["read_bytes_per_token"] == 2
    assert ours["written_bytes_per_token"] == 2.5
    assert ours["files_ms"]["median"] == 200


@pytest.mark.e2e
@pytest.mark.nightly
def test_bytes_per_token_are_those_of_the_pages(tmp_path, capsys) -> None:
    model = save_tiny_model(tmp_path / "model", "llama")
    files = ["--model", str(model), "--logs", str(tmp_path), "--out", str(tmp_path / "result.json")]
    sizes = ["--prefix", "200", "--question", "8", "--rounds", "2", "--max-model-len", "512", "--cache-mib", "4"]
    main([*files, *sizes, "--enforce-eager", "--methods", "16bit", "--folder", str(tmp_path)])
    result = read_json(tmp_path / "result.json")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
    assert (result["prefix"], result["absent"]) == (256, {})
    (plain,) = result["rows"]
    # Keys and values of 3 layers of 2 kv heads of 32 channels, and when they are written the head of a file per block.
    assert plain["read_bytes_per_token"] == 3 * 2 * 2 * 32 * 2
    assert plain["written_bytes_per_token"] == plain["read_bytes_per_token"] + 100 / 128
    assert not list(tmp_path.glob("tmp*"))
