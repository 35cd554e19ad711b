"""`xquant plan` from the command line: what is printed, and every error in one line."""

import json
import subprocess
import sys

import pytest

from tests.planning.fake_hub import FakeHub
from tests.planning.models import config_folder
from xquant_vllm.cli.main import main


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    return config_folder(tmp_path / "model", tensors={"model.layers.0.self_attn.k_proj.weight": (128, 256)})


def write_trace(path, users):
    """Users who come back in turns, each with a block more than before."""
    lines = []
    for turn in range(1, 7):
        for user in range(users):
            ids = list(range(100 * user, 100 * user + turn))
            lines.append(
                {"timestamp": len(lines) * 60_000, "input_length": 512 * turn, "output_length": 10, "hash_ids": ids}
            )
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.fixture
def trace(tmp_path):
    return write_trace(tmp_path / "trace.jsonl", 2)


def planned(capsys, *words):
    assert main(["plan", *words, "--json", "--device", "cpu"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def refused(capsys, *words):
    assert main(["plan", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_json_is_one_line_with_options_and_a_recommendation(folder, capsys):
    answer = planned(capsys, folder, "--memory", "1GiB", "--context", "2k")
    assert answer["context"] == 2048
    assert answer["memory"] == 1 << 30
    assert answer["weight_bytes"] == 128 * 256 * 2
    assert answer["recommended"] in answer["options"]
    assert " serve " in answer["recommended"]["command"]


def test_people_get_a_table_and_the_command(folder, capsys):
    assert main(["plan", folder, "--memory", "64MiB", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "0.0625 GiB for the cache on CPUs, requests of up to 4,096 tokens" in out
    assert "\n16 bit " in out
    assert "\nxquant, per head, 4 bits, calibrated " in out
    assert "Recommended: xquant, per head" in out
    assert "--kv-cache-memory-bytes 67108864" in out


def test_options_are_heard(folder, capsys):
    words = [folder, "--memory", "64MB", "--context", "1000"]
    usual = planned(capsys, *words)["options"]
    assert planned(capsys, *words, "--tp", "2")["options"][0]["bytes_per_token"] * 2 == usual[0]["bytes_per_token"]
    float32 = planned(capsys, *words, "--dtype", "float32")["options"][0]
    assert float32["bytes_per_token"] == 2 * usual[0]["bytes_per_token"]
    hot = [option["hot_tokens"] for option in planned(capsys, *words, "--hot", "40%")["options"]]
    assert max(hot) > 1.9 * max(option["hot_tokens"] for option in usual)
    assert planned(capsys, *words, "--max-loss", "0")["recommended"]["method"] == "16bit"


def test_a_trace_says_what_a_larger_cache_is_worth(folder, trace, capsys, tmp_path):
    plot = tmp_path / "plot.png"
    words = [folder, "--memory", "8MiB", "--context", "1024", "--trace", trace, "--plot", str(plot)]
    worth = planned(capsys, *words)["trace"]
    assert (worth["requests"], worth["instances"], worth["block_size"]) == (12, 1, 512)
    rows = {(row["method"], row["bits"]): row for row in worth["rows"] if not row["calibrated"]}
    plain, ours = rows["16bit", 16], rows["xquant", 4]
    assert plain["prefill"] == 1
    assert plain["hit_rate"] < ours["hit_rate"] <= worth["endless_hit_rate"]
    assert ours["prefill"] < 1
    assert plot.stat().st_size > 10_000
    assert main(["plan", *words]) == 0
    out = capsys.readouterr().out
    assert "trace.jsonl: 12 requests with 21,504 prompt tokens" in out
    assert "\nendless " in out


def test_fewer_instances_do_for_a_larger_cache(folder, tmp_path, capsys):
    trace = write_trace(tmp_path / "many.jsonl", 20)
    words = [folder, "--memory", "16MiB", "--context", "2048", "--trace", trace, "--instances", "4"]
    rows = planned(capsys, *words)["trace"]["rows"]
    assert rows[0]["instances"] == 4
    assert min(row["instances"] for row in rows) < 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tp", "0"], "--tp 0 is no number of ranks"),
        (["--tp", "3"], "--tp 3 cannot work"),
        (["--hot", "lots"], "--hot lots cannot work"),
        (["--hot", "100%"], "--hot 100% cannot work"),
        (["--plot", "x.png"], "--plot draws what a trace gains; add --trace"),
        (["--trace", "none.jsonl"], "--trace none.jsonl cannot be read"),
        (["--trace", "none.jsonl", "--instances", "0"], "--instances 0 cannot work"),
        (["--trace", "none.jsonl", "--decode-rate", "0"], "--decode-rate 0.0 cannot work"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(folder, capsys, words, message):
    assert message in refused(capsys, folder, "--memory", "64MiB", *words)


@pytest.mark.parametrize("words", [["--memory", "much"], ["--memory", "0"], ["--memory", "1GiB", "--context", "long"]])
def test_amounts_that_are_none_are_refused_by_the_parser(folder, capsys, words):
    with pytest.raises(SystemExit):
        main(["plan", folder, *words])
    assert "set for example" in capsys.readouterr().err


def test_a_plot_needs_matplotlib(folder, trace, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    words = ["--memory", "64MiB", "--trace", trace, "--plot", "x.png"]
    assert "--plot needs matplotlib: pip install matplotlib" in refused(capsys, folder, *words)


def test_there_is_no_such_model(capsys):
    assert "there is no folder './none'" in refused(capsys, "./none", "--memory", "1GiB")


def run_alone(tmp_path, *words, **environment):
    import os

    variables = {**os.environ, "HF_HOME": str(tmp_path / "hub"), **environment}
    command = [sys.executable, "-c", "import sys; from xquant_vllm.cli.main import main; status = main(sys.argv[1:]); "
               "assert 'vllm' not in sys.modules; sys.exit(status)", "plan", *words]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, env=variables, check=False, timeout=120)


def test_offline_a_name_on_the_hub_is_one_clear_error(tmp_path):
    done = run_alone(tmp_path, "someone/some-model", "--memory", "1GiB", HF_HUB_OFFLINE="1")
    assert done.returncode == 2
    assert "which HF_HUB_OFFLINE forbids to do now; unset HF_HUB_OFFLINE, or name the folder" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_of_a_model_on_the_hub_headers_alone_are_fetched(tmp_path, llama):
    """And vLLM is not imported."""
    with FakeHub({"someone/some-model": llama}) as hub:
        words = ["someone/some-model", "--memory", "64MiB", "--json", "--device", "cpu"]
        done = run_alone(tmp_path, *words, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="0")
        assert done.returncode == 0, done.stderr
        fetched = hub.bytes_of_weights
    weights = (llama / "model.safetensors").stat().st_size
    assert 0 < fetched < weights / 2 or fetched <= 200_000
    answer = json.loads(done.stdout)
    assert answer["options"][0]["bytes_per_token"] == 3 * 4 * 2 * 32
    assert answer["weight_bytes"] == pytest.approx(weights, rel=0.05)
