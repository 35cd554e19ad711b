"""Sends requests to a server, some of them only in part, and says what became of each."""

import http.client
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from benchmarks.soak.load import Request

_SECONDS = 120


@dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        kind: of the request.
        failure: what is not as it should be; "" if all is.
        aborted: the client left before the answer was complete.
        answer: of a request that was answered at once and well, the JSON.
    """

    kind: str
    failure: str = ""
    aborted: bool = False
    answer: dict[str, Any] | None = None


def send(request: Request, host: str, port: int) -> Outcome:
    """Send one request on a connection of its own; never raises for what the server does."""
    connection = http.client.HTTPConnection(host, port, timeout=_SECONDS)
    try:
        connection.request("POST", "/v1/completions", request.body, {"Content-Type": "application/json"})
        if request.leaves_after == 0:
            return Outcome(request.kind, aborted=True)
        response = connection.getresponse()
        if not request.is_valid or response.status != 200:
            return _without_answer(request, response)
        if request.streams:
            return _follow(request, response)
        answer = json.loads(response.read())
        return Outcome(request.kind, _is_short(request, answer), answer=answer)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return Outcome(request.kind, f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def send_all(requests: Sequence[Request], host: str, port: int, at_once: int) -> list[Outcome]:
    """Send all, so many at a time."""
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda request: send(request, host, port), requests))


class Background:
    """Requests that are under way while something else happens."""

    def __init__(self, requests: Sequence[Request], host: str, port: int) -> None:
        """Send all of them at once."""
        self.outcomes: list[Outcome] = []
        self._threads = [
            threading.Thread(target=lambda request=request: self.outcomes.append(send(request, host, port)))
            for request in requests
        ]
        for thread in self._threads:
            thread.start()

    def wait(self) -> list[Outcome]:
        """Until every client has an answer, or an error."""
        for thread in self._threads:
            thread.join()
        return self.outcomes


def _without_answer(request: Request, response: http.client.HTTPResponse) -> Outcome:
    text = response.read().decode(errors="replace")
    if request.is_valid or not 400 <= response.status < 500:
        return Outcome(request.kind, f"status {response.status}: {text[:200]}")
    return Outcome(request.kind, "" if "error" in text else f"status {response.status} without a reason: {text[:200]}")


def _is_short(request: Request, answer: dict[str, Any]) -> str:
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return "" if tokens == request.tokens else f"{tokens} tokens, expected {request.tokens}"


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events; ends at ``[DONE]``.

    Raises:
        ValueError: the stream ends without it.
    """
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return
        yield json.loads(line[6:])
    raise ValueError("the stream ended without [DONE]")


def _follow(request: Request, response: http.client.HTTPResponse) -> Outcome:
    last: dict[str, Any] = {}
    for count, event in enumerate(events(response), 1):
        if "error" in event:
            return Outcome(request.kind, f"an error in the stream: {str(event['error'])[:200]}")
        if count == request.leaves_after:
            return Outcome(request.kind, aborted=True)
        last = event
    return Outcome(request.kind, _is_short(request, last))
