"""Parts of the soak that need no vLLM: its requests, its client on a server of our own, and what it concludes."""

import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from benchmarks.soak import factor_files, memory, result
from benchmarks.soak.caches import CACHES, CONTROL
from benchmarks.soak.client import Outcome, events, send, send_all
from benchmarks.soak.drift import largest_difference
from benchmarks.soak.life import Turn
from benchmarks.soak.load import WEIGHTS, Load, Request, probe
from xquant_vllm.scheme.factor_cache import FactorCache

WORDS = [f"word{i}" for i in range(5000)]


def test_a_load_is_its_seeds_and_has_all_kinds() -> None:
    requests = Load(WORDS, 3).requests(400)
    assert requests == Load(WORDS, 3).requests(400)
    assert requests != Load(WORDS, 4).requests(400)
    kinds = Counter(request.kind.partition(":")[0] for request in requests)
    assert kinds.keys() == WEIGHTS.keys()
    invalid = {request.kind for request in requests if not request.is_valid}
    assert all(kind.startswith("invalid: ") for kind in invalid)
    assert len(invalid) > 10
    for request in requests:
        leaves = request.kind in ("aborted stream", "disconnected")
        assert (request.leaves_after is not None) == leaves
        assert (request.tokens > 0) == (request.is_valid and not leaves)
        if request.is_valid:
            body = json.loads(request.body)
            assert body.get("stream", False) == request.streams
            assert leaves or request.tokens == body["max_tokens"] * body.get("n", 1)


def test_greedy_loads_do_not_sample() -> None:
    bodies = [json.loads(request.body) for request in Load(WORDS, 3, samples=False).requests(200) if request.is_valid]
    assert all(body["temperature"] == 0 and "n" not in body for body in bodies)


def test_probes_differ_by_their_salt_alone() -> None:
    first, second = (json.loads(probe(salt).body) for salt in "12")
    assert first.pop("cache_salt") != second.pop("cache_salt")
    assert first == second


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers as its path of action, the "model" of a request, says."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        action = json.loads(body)["model"]
        good = {"choices": [], "usage": {"completion_tokens": 5}}
        sent = {
            "good": json.dumps(good),
            "cut": "data: {}\n\n",
            "stream": f"data: {{}}\n\ndata: {json.dumps(good)}\n\ndata: [DONE]\n\n",
            "fails in the stream": 'data: {"error": "no"}\n\n',
        }.get(action, '{"error": "no"}')
        self.send_response(int(action) if action.isdigit() else 200)
        self.end_headers()
        self.wfile.write(sent.encode())

    def log_message(self, *arguments: object) -> None:
        """Silent."""


@pytest.fixture
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def ask(port: int, action: str, **options) -> Outcome:
    return send(Request("kind", json.dumps({"model": action}).encode(), **options), "127.0.0.1", port)


def test_what_is_a_failure(port: int) -> None:
    assert ask(port, "good", tokens=5).failure == ""
    assert ask(port, "good", tokens=6).failure == "5 tokens, expected 6"
    assert ask(port, "500", tokens=5).failure.startswith("status 500")
    assert ask(port, "400", is_valid=False).failure == ""
    assert ask(port, "500", is_valid=False).failure.startswith("status 500")
    assert ask(port, "good", is_valid=False).failure.startswith("status 200")


def test_streams(port: int) -> None:
    assert ask(port, "stream", streams=True, tokens=5) == Outcome("kind")
    assert ask(port, "stream", streams=True, leaves_after=1) == Outcome("kind", aborted=True)
    assert "without [DONE]" in ask(port, "cut", streams=True, tokens=5).failure
    assert "an error in the stream" in ask(port, "fails in the stream", streams=True, tokens=5).failure
    with pytest.raises(ValueError, match="without"):
        list(events([b"data: {}\n", b"\n"]))


def test_clients_that_leave_and_servers_that_are_gone(port: int) -> None:
    left = send_all([Request("disconnected", b'{"model": "good"}', leaves_after=0)] * 3, "127.0.0.1", port, 2)
    assert left == [Outcome("disconnected", aborted=True)] * 3
    assert "Error" in ask(9, "good", tokens=5).failure


SMAPS = """\
55d0-55d1 rw-p 00000000 00:00 0                          [heap]
Rss:                2048 kB
7f00-7f01 rw-p 00000000 00:00 0
Rss:                1024 kB
7f02-7f03 r-xp 00000000 08:01 77                         /usr/lib/a library.so
Rss:                 512 kB
7f04-7f05 rw-s 00000000 00:01 9                          /dev/shm/psm
Rss:                 256 kB
"""


def test_memory_by_kind() -> None:
    assert memory.by_kind(SMAPS.splitlines()) == {"heap": 2, "anonymous": 1, "files": 0.5, "shared": 0.25}
    before, after = {"a": {"heap": 1.0, "total": 1.0}}, {"a": {"heap": 3.5, "total": 4.0}, "b": {"total": 1.0}}
    assert memory.growth(before, after) == {"a": {"heap": 2.5, "total": 3.0}, "b": {"total": 1.0}}
    assert memory.total(after) == 5


def answer(tokens: list[str], number: float) -> dict:
    return {"tokens": tokens, "top_logprobs": [{token: number, "other": -9.0} for token in tokens]}


def test_drift() -> None:
    assert largest_difference(answer(["a"], -1.0), answer(["a"], -1.0)) == 0
    assert largest_difference(answer(["a"], -1.0), answer(["a"], -1.5)) == 0.5
    assert largest_difference(answer(["a"], -1.0), answer(["b"], -1.0)) == float("inf")


def turn(grown: float, drift: float = 0.0, preemptions: int = 2, **changes) -> Turn:
    outcomes = [Outcome("whole"), Outcome("disconnected", aborted=True)]
    return Turn(outcomes, drift, growth={"API server": {"total": grown}}, preemptions=preemptions, **changes)


def test_the_sum_of_it() -> None:
    summary = result.summary({CONTROL: turn(30), "latent": turn(40), "x-hot": turn(20, 0.01)})
    expected = {"requests": 6, "aborted": 3, "failed": 0, "leaked_blocks": 0, "drift": 0.0, "drift_hot": 0.01,
                "rss_growth_mb": 40, "rss_growth_mb_16bit": 30}  # fmt: skip
    assert {name: summary[name] for name in expected} == expected
    assert result.faults(summary, 50) == []
    assert "grew by 40 MB" in result.faults(summary, 5)[0]


def test_faults_are_named() -> None:
    turns = {CONTROL: turn(0), "x": turn(0, 0.5, preemptions=0, leaked_blocks=3)}
    turns["x"].outcomes.append(Outcome("stream", "status 500"))
    said = "\n".join(result.faults(result.summary(turns), 50))
    assert all(part in said for part in ("x: stream: status 500", "3 blocks", "0.5 of a log", "x: no request was pree"))


def test_what_may_happen_to_a_factor_cache(tmp_path) -> None:
    cache, weights = FactorCache(tmp_path), (torch.eye(4), torch.ones(4, 4))
    path = cache.path("recipe", *weights)
    cache.store(path, {"x": torch.arange(6.0)})
    before, log = factor_files.entries(tmp_path), "xquant: factors cached, read in 0.1 s"
    assert factor_files.faults(tmp_path, before, log) == []
    assert "did not read them" in factor_files.faults(tmp_path, before, "xquant: factors computed in 1 s")[0]
    assert "no factors were kept" in factor_files.faults(tmp_path / "nothing", {}, log)[0]
    path.write_bytes(path.read_bytes()[:-1])
    assert [fault.rpartition(" is ")[2] for fault in factor_files.faults(tmp_path, before, log)] == [
        "new or changed", "damaged"]  # fmt: skip
    path.unlink()
    assert "is gone" in factor_files.faults(tmp_path, before, log)[0]


def test_caches_as_flags() -> None:
    assert CACHES[CONTROL].flags() == []
    assert '{"xquant": {"bits": 4, "cache": "x", "hot": 0}}' in CACHES["x"].flags()
    assert '{"xquant": {"bits": 4, "cache": "x", "hot": "50%"}}' in CACHES["x-hot"].flags()
