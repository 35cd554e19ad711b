"""A model hub on this machine, as much of one as a plan asks: files of folders over HTTP, also in part."""

import hashlib
import http.server
import json
import threading
from pathlib import Path


class FakeHub:
    """Serves folders under the names of models while it is entered.

    Attributes:
        bytes_of_weights: bytes of safetensors files that were sent.
    """

    def __init__(self, models: dict[str, Path]) -> None:
        self.bytes_of_weights = 0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def _answer(self, with_body: bool) -> None:
                path = self.path.split("?")[0]
                for name, folder in models.items():
                    if path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
                        files = [{"rfilename": file.name} for file in folder.iterdir()]
                        return self._send(200, json.dumps({"id": name, "sha": "0" * 40, "siblings": files}).encode())
                    start = f"/{name}/resolve/"
                    file = folder / path.removeprefix(start).split("/", 1)[-1]
                    if path.startswith(start) and file.is_file():
                        return self._file(file, with_body)
                return self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"} if "/resolve/" in path else {})

            def _file(self, file: Path, with_body: bool) -> None:
                content = file.read_bytes()
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": "0" * 40,
                           "Accept-Ranges": "bytes"}  # fmt: skip
                status, part = 200, content
                wanted = self.headers.get("Range")
                if wanted:
                    first, last = wanted.removeprefix("bytes=").split("-")
                    part = content[int(first) : int(last or len(content)) + 1]
                    status = 206
                    headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
                if with_body and file.suffix == ".safetensors":
                    hub.bytes_of_weights += len(part)
                self._send(status, part, headers, with_body)

            def _send(
                self, status: int, body: bytes, headers: dict[str, str] | None = None, with_body: bool = True
            ) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
