"""What a worker writes is what a collector of another process reads."""

import subprocess
import sys
from types import SimpleNamespace

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from xquant_vllm.plugin.observe import board as board_module
from xquant_vllm.plugin.observe import metrics
from xquant_vllm.plugin.observe.board import Board, board_of

LABELS = ("smollm2", "0", "1")


def scraped(folder):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))
    return generate_latest(registry).decode().splitlines()


def test_gauges_counters_and_summaries_are_scraped(tmp_path):
    board = Board(tmp_path, LABELS)
    board.set(metrics.HOT, 7)
    board.set(metrics.HOT, 5)
    board.set(metrics.PROMOTED, 3)
    board.set(metrics.PROMOTED, 12.5)
    board.begin(metrics.KEY_ERROR, [0, 3, 4])
    board.add(metrics.KEY_ERROR, 0.25, layer=4)
    board.add(metrics.KEY_ERROR, 0.5, layer=4)
    board.add(metrics.KEY_ERROR, 1, layer=0)
    lines = scraped(tmp_path)
    labels = 'engine="0",{}model_name="smollm2",rank="1"'
    plain, fourth, third, first = (labels.format(f'layer="{of}",' if of else "") for of in ("", "4", "3", "0"))
    assert {
        f"xquant_hot_tokens{{{plain}}} 5.0",
        f"xquant_promoted_tokens_total{{{plain}}} 12.5",
        f"xquant_probe_key_error_sum{{{fourth}}} 0.75",
        f"xquant_probe_key_error_count{{{fourth}}} 2.0",
        f"xquant_probe_key_error_count{{{third}}} 0.0",
        f"xquant_probe_key_error_sum{{{first}}} 1.0",
        "# TYPE xquant_hot_tokens gauge",
        "# TYPE xquant_promoted_tokens_total counter",
        "# TYPE xquant_probe_key_error summary",
    } <= set(lines)


def test_ranks_are_told_apart_and_files_of_others_left_alone(tmp_path):
    for rank in ("0", "1"):
        board = Board(tmp_path / rank, ("m", "0", rank))
        (tmp_path / rank).mkdir()
        board.set(metrics.COLD, 1)
    other = tmp_path / "0" / "gauge_mostrecent_1.db"
    assert not other.exists()
    code = (
        "from pathlib import Path; from xquant_vllm.plugin.observe import metrics, board;"
        f"board.Board(Path({str(tmp_path / '1')!r}), ('m', '0', '0')).set(metrics.COLD, 4)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    values = sorted(line.rsplit(" ", 1)[1] for line in scraped(tmp_path / "1") if line.startswith("xquant_cold"))
    assert values == ["1.0", "4.0"]


class Config:
    """Of vLLM; can be weakly referenced."""

    instance_id = "12"
    model_config = SimpleNamespace(served_model_name="m")
    parallel_config = SimpleNamespace(data_parallel_index=2, rank=3)


def test_without_a_folder_there_is_no_board(tmp_path, monkeypatch):
    folder = tmp_path / "metrics"
    monkeypatch.setattr(board_module, "folder_of", lambda config: folder)
    assert board_of(Config()) is None
    folder.mkdir()
    board_of(Config()).set(metrics.HOT, 1)
    assert 'xquant_hot_tokens{engine="2",model_name="m",rank="3"} 1.0' in scraped(folder)


def test_names_are_of_this_package_and_told_once():
    samples = [sample for metric in metrics.METRICS for sample in metric.samples]
    assert len(set(samples)) == len(samples)
    assert all(sample.startswith("xquant_") for sample in samples)
    named = {value.name for value in vars(metrics).values() if isinstance(value, metrics.Metric)}
    assert named == {metric.name for metric in metrics.METRICS}
