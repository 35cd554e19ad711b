"""What a soak needs of `vllm serve`, without vLLM: answers, metrics, and a process that is called an engine core.

python stand_in_server.py --port PORT [--host HOST] [--leaks BLOCKS] [--drifts] [--forgets] [anything else]
"""

import hashlib
import http.server
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

WORDS = sys.argv[1:]
LEAKED = int(WORDS[WORDS.index("--leaks") + 1]) if "--leaks" in WORDS else 0
answered = 0


def logprobs() -> dict:
    number = -1.0 - ("--drifts" in WORDS) * answered
    return {"tokens": ["a"], "top_logprobs": [{"a": number}]}


class Server(http.server.BaseHTTPRequestHandler):
    def send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        if self.path == "/health":
            return self.send(200 if core.poll() is None else 503, "")
        numbers = {"num_requests_running": 0, "num_requests_waiting": 0, "num_preemptions_total": 1,
                   "kv_cache_usage_perc": LEAKED / 20}  # fmt: skip
        return self.send(200, "\n".join(f'vllm:{name}{{engine="0"}} {value}' for name, value in numbers.items()))

    def do_POST(self) -> None:
        global answered
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/reset_prefix_cache":
            return self.send(200, "")
        if core.poll() is not None:
            return self.send(500, '{"error": "dead"}')
        try:
            asked = json.loads(body)
        except ValueError:
            return self.send(400, '{"error": "no JSON"}')
        wrong = asked["max_tokens"] not in range(1, 512) or asked.get("n", 1) < 1 or asked.get("top_p", 1) > 1
        wrong |= asked["model"] != "soaked" or asked.get("temperature", 0) not in (0, 0.8, 1.0)
        wrong |= len(asked["prompt"]) > 5000 or isinstance(asked["prompt"], list) or asked.get("logprobs", 0) > 20
        if wrong:
            return self.send(400, '{"error": "wrong"}')
        answered += 1
        choice = {"logprobs": logprobs()}
        answer = {"choices": [choice], "usage": {"completion_tokens": asked["max_tokens"] * asked.get("n", 1)}}
        if not asked.get("stream"):
            return self.send(200, json.dumps(answer))
        events = [{}] * 9 + [answer]
        return self.send(200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def log_message(self, *arguments: object) -> None:
        pass


def keep_factors() -> None:
    """As the plugin does; with --forgets a file is left that was never finished."""
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "xquant_vllm"
    if folder.exists():
        print("xquant: factors cached, read in 0.1 s", flush=True)
        return
    folder.mkdir(parents=True)
    checksums = json.dumps({"x": hashlib.sha256(bytes(4)).hexdigest()})
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({"__metadata__": {"sha256": checksums}, "x": tensor}).encode()
    whole = struct.pack("<Q", len(header)) + header + bytes(4)
    (folder / "layer.safetensors").write_bytes(whole[: -2 if "--forgets" in WORDS else None])


keep_factors()
core = subprocess.Popen(["VLLM::EngineCore", "-c", "import time; time.sleep(600)"], executable=sys.executable)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: (core.kill(), sys.exit(0)))
http.server.ThreadingHTTPServer(("127.0.0.1", int(WORDS[WORDS.index("--port") + 1])), Server).serve_forever()
