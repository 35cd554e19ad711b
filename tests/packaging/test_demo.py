"""examples/demo.py as users run it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import vllm_process

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO = str(ROOT / "examples" / "demo.py")


def _demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, DEMO, *arguments], capture_output=True, text=True, check=False, cwd=ROOT, timeout=800
    )


def _servers() -> set[str]:
    return {
        entry.name
        for entry in Path("/proc").glob("[0-9]*")
        if b"--served-model-name\0demo-test" in (entry / "cmdline").read_bytes()
    }


@pytest.mark.e2e
def test_demo_chats_and_compares_and_leaves_nothing(smollm2):
    done = _demo("--enforce-eager", "--bits", "4", "--checkpoint", str(smollm2), "--model", "demo-test")
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {
        *("reply", "streamed_reply", "bits", "cache_tokens", "cache_tokens_16bit", "capacity_ratio", "model"),
        "startup_seconds",
    }
    assert "cold" in result["reply"].lower(), "What is the opposite of hot?"
    assert "computer" in result["streamed_reply"].lower()
    assert result["bits"] == 4
    assert result["capacity_ratio"] == pytest.approx(result["cache_tokens"] / result["cache_tokens_16bit"], abs=1e-3)
    assert result["capacity_ratio"] > 3
    assert _servers() == set()


@pytest.mark.e2e
def test_demo_says_why_the_server_did_not_start(smollm2):
    done = _demo("--enforce-eager", "--bits", "5", "--checkpoint", str(smollm2), "--model", "demo-test")
    assert done.returncode == 1
    assert "demo: error: " in done.stderr
    assert "bits" in done.stderr.splitlines()[-1]
    assert "logs/demo-xquant.log" in done.stderr.splitlines()[-1]
    assert _servers() == set()


def test_taken_port_is_refused_at_once():
    port = vllm_process.free_port()
    with vllm_process.socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        with pytest.raises(vllm_process.ServerError, match=f"port {port} cannot be used"):
            vllm_process.check_port(port)


def test_log_is_read_for_news_and_reasons(tmp_path):
    server = vllm_process.VllmServer.__new__(vllm_process.VllmServer)
    server.log = tmp_path / "log"
    server.log.write_text("(APIServer pid=1) INFO 01-01 [model.py:1] Resolved architecture: LlamaForCausalLM\nnoise\n")
    assert server.last_news() == "read the configuration of a LlamaForCausalLM"
    server.log.write_text(
        "(EngineCore pid=2) ERROR 01-01 [core.py:1] ValueError: head size 65 is odd\nKeyError: later\n"
    )
    assert server._reason() == f" (ValueError: head size 65 is odd); its log is {server.log}"
