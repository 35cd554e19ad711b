"""A client that sends requests when a trace says, as tokens, and measures what comes back, word by word."""

import http.client
import itertools
import json
import statistics
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.serving.trace_file import FileTrace
from examples.vllm_process import ServerError

_TIMEOUT_S = 900
# Requests that may wait for an answer at the same time.
_MOST = 256


def replay_over_http(load: FileTrace, url: str, model: str) -> dict[str, Any]:
    """Send all requests at their times and wait for the answers.

    Returns:
        Throughputs, and of TTFT, TPOT and ITL the mean and the 99th percentile in milliseconds.

    Raises:
        ServerError: a request was not answered.
    """
    place = urllib.parse.urlsplit(url)
    assert place.hostname is not None
    start = time.monotonic()

    def send(at: int) -> list[float]:
        request = load.trace.requests[at]
        time.sleep(max(0.0, start + request.time - time.monotonic()))
        body = {"model": model, "prompt": [*load.prompts[at]], "max_tokens": request.output, "ignore_eos": True,
                "temperature": 0, "stream": True}  # fmt: skip
        return _ask(place.hostname or "", place.port, body)

    with ThreadPoolExecutor(_MOST) as pool:
        answers = list(pool.map(send, range(len(load.prompts))))
    duration = time.monotonic() - start
    prompt, output = load.trace.prompt_tokens, sum(request.output for request in load.trace.requests)
    first = [times[0] for times in answers]
    gaps = [later - earlier for times in answers for earlier, later in itertools.pairwise(times)]
    per_token = [(times[-1] - times[0]) / (len(times) - 1) for times in answers if len(times) > 1]
    measured: dict[str, Any] = {
        "duration": duration,
        "completed": len(answers),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(answers) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
    }
    for name, seconds in (("ttft", first), ("tpot", per_token), ("itl", gaps)):
        measured[f"mean_{name}_ms"] = 1e3 * statistics.fmean(seconds or [0.0])
        measured[f"p99_{name}_ms"] = 1e3 * sorted(seconds or [0.0])[int(0.99 * max(0, len(seconds) - 1))]
    return measured


def _ask(host: str, port: int | None, body: dict[str, Any]) -> list[float]:
    """Seconds from the request to every piece of the answer."""
    sent = time.monotonic()
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            raise ServerError(f"a request was answered with {answer.status}: {answer.read(300)!r}")
        times = [time.monotonic() - sent for line in answer if line.startswith(b"data: {")]
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"a request was not answered ({error})") from None
    finally:
        connection.close()
    if not times:
        raise ServerError("an answer was empty")
    return times
