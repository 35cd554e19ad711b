"""Serves a small model with the quantized cache, chats with it, and compares its cache with vLLM's 16-bit one.

`make demo` runs all of it; the last line on stdout is a JSON object with the results. `make serve` leaves the server
running until Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from vllm_process import Progress, ServerError, VllmServer, check_port, free_port

PROJECT = Path(__file__).resolve().parent.parent
CACHE_BYTES = 256 * 2**20
MAX_MODEL_LEN = 2048
STARTUP_SECONDS = 600
QUESTION = "What is the opposite of hot?"
STREAMED_QUESTION = "Explain in one sentence what a computer is."
SIXTEEN_BIT_BACKEND = "CPU_ATTN"

CACHE_TOKENS = r"KV cache size: ([\d,]+) tokens"
BITS = r"xquant: cache .*key (\d+) / value (\d+) bits"


def arguments_of_server(options: argparse.Namespace, checkpoint: Path, backend: str, eager: bool) -> list[str]:
    """What both servers are started with; only the backend differs."""
    arguments = [str(checkpoint), "--attention-backend", backend, "--served-model-name", options.model]
    arguments += ["--max-model-len", str(MAX_MODEL_LEN), "--kv-cache-memory-bytes", str(CACHE_BYTES)]
    if eager:
        arguments.append("--enforce-eager")
    settings = {name: value for name in ("bits", "method") if (value := getattr(options, name)) is not None}
    if backend == "xquant" and settings:
        arguments += ["--additional-config", json.dumps({"xquant": settings})]
    return arguments


def prepared_checkpoint(model: str) -> Path:
    """The model's folder, made if need be."""
    command = [sys.executable, str(PROJECT / "tools" / "prepare_model.py"), "--model", model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise ServerError(f"the model {model!r} could not be prepared (see above)")
    return Path(done.stdout.strip().splitlines()[-1])


def check_chat(checkpoint: Path, model: str) -> None:
    """Refuse a model that was never taught to chat."""
    config = checkpoint / "tokenizer_config.json"
    if (checkpoint / "chat_template.jinja").exists():
        return
    if not config.exists() or "chat_template" not in json.loads(config.read_text(encoding="utf-8")):
        raise ServerError(
            f"{model} is a base model without a chat template, and this demo chats; take MODEL=smollm2 or smollm2-mha, "
            f"or serve it with `make serve MODEL={model}` and ask for completions"
        )


def can_compile() -> bool:
    """Whether vLLM can use torch.compile, which builds C++ code that includes Python's headers."""
    return (Path(sysconfig.get_path("include")) / "Python.h").exists()


def cache_tokens(server: VllmServer) -> int:
    """How many tokens the cache holds, by vLLM's own account."""
    found = server.find(CACHE_TOKENS)
    if not found:
        raise ServerError(f"vLLM's log {server.log} has no line '... KV cache size: N tokens'")
    return int(found.group(1).replace(",", ""))


def bits_in_use(server: VllmServer, backend: str) -> int | dict[str, int]:
    """Bits per cached number, as the plug-in reports them at start-up."""
    if backend != "xquant":
        return 16
    found = server.find(BITS)
    if not found:
        raise ServerError(f"vLLM's log {server.log} has no line 'xquant: cache ... key N / value N bits'")
    key, value = int(found.group(1)), int(found.group(2))
    return key if key == value else {"key": key, "value": value}


def chat(server: VllmServer, model: str) -> tuple[str, str]:
    """Ask two questions, the second with a streamed answer; both answers."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300, max_retries=0)
    options: dict[str, Any] = {"model": model, "temperature": 0, "max_tokens": 64}
    print(f"\nquestion: {QUESTION}", flush=True)
    answer = client.chat.completions.create(messages=[{"role": "user", "content": QUESTION}], **options)
    reply = answer.choices[0].message.content or ""
    print(f"reply:    {reply}", flush=True)

    print(f"\nquestion: {STREAMED_QUESTION}\nstreamed: ", end="", flush=True)
    pieces: list[str] = []
    messages: Any = [{"role": "user", "content": STREAMED_QUESTION}]
    chunks: Any = client.chat.completions.create(messages=messages, stream=True, **options)
    for chunk in chunks:
        piece = chunk.choices[0].delta.content if chunk.choices else None
        if piece:
            pieces.append(piece)
            print(piece, end="", flush=True)
    print("\n", flush=True)
    streamed = "".join(pieces)
    for text, question in ((reply, QUESTION), (streamed, STREAMED_QUESTION)):
        if not text.strip():
            raise ServerError(f"the answer to {question!r} is empty; vLLM's log is {server.log}")
    return reply, streamed


def run_demo(options: argparse.Namespace, checkpoint: Path, eager: bool) -> dict[str, Any]:
    """Both servers, one after the other: they would share the processor's cores."""
    backend = options.attention_backend
    port = options.port or free_port()
    check_port(port)
    log = PROJECT / "logs" / f"demo-{backend}.log"
    print(f"starting vLLM with --attention-backend {backend} (log: {log})", flush=True)
    with VllmServer(arguments_of_server(options, checkpoint, backend, eager), log, port) as server:
        try:
            startup = server.wait(server.is_healthy, "it answered", STARTUP_SECONDS, Progress("starting"))
            print(f"ready after {startup:.0f} s at {server.url}", flush=True)
            reply, streamed = chat(server, options.model)
            tokens, bits = cache_tokens(server), bits_in_use(server, backend)
        except Exception:
            print(f"--- the end of {log}:\n{server.tail()}\n---", file=sys.stderr, flush=True)
            raise
        if not server.stop():
            print("note: vLLM had to be killed, it did not stop when asked", file=sys.stderr)

    log = PROJECT / "logs" / "demo-16bit.log"
    print(f"starting vLLM with --attention-backend {SIXTEEN_BIT_BACKEND} for its number of tokens (log: {log})")
    arguments = arguments_of_server(options, checkpoint, SIXTEEN_BIT_BACKEND, eager=True)
    with VllmServer(arguments, log, free_port()) as server:
        try:
            server.wait(lambda: server.find(CACHE_TOKENS), "its cache was made", STARTUP_SECONDS, Progress("starting"))
            tokens_16bit = cache_tokens(server)
        except Exception:
            print(f"--- the end of {log}:\n{server.tail()}\n---", file=sys.stderr, flush=True)
            raise
    return {
        "reply": reply,
        "streamed_reply": streamed,
        "bits": bits,
        "cache_tokens": tokens,
        "cache_tokens_16bit": tokens_16bit,
        "capacity_ratio": round(tokens / tokens_16bit, 3),
        "model": options.model,
        "startup_seconds": round(startup, 1),
    }


def print_table(result: dict[str, Any], backend: str) -> None:
    """What a person looks at."""
    bits = result["bits"]
    shown = bits if isinstance(bits, int) else f"{bits['key']}/{bits['value']}"
    rows = [
        ("attention backend", "bits", f"tokens in {CACHE_BYTES // 2**20} MiB", "capacity"),
        (SIXTEEN_BIT_BACKEND, "16", f"{result['cache_tokens_16bit']:,}", "1.00x"),
        (backend, f"{shown}", f"{result['cache_tokens']:,}", f"{result['capacity_ratio']:.2f}x"),
    ]
    print()
    for row in rows:
        print("  {:<18} {:>5} {:>18} {:>9}".format(*row))
    print(flush=True)


def serve(options: argparse.Namespace, checkpoint: Path, eager: bool) -> None:
    """Run the server until Ctrl-C."""
    check_port(options.port)
    log = PROJECT / "logs" / f"serve-{options.attention_backend}.log"
    arguments = arguments_of_server(options, checkpoint, options.attention_backend, eager)
    print(f"starting vLLM with --attention-backend {options.attention_backend} (log: {log})", flush=True)
    with VllmServer(arguments, log, options.port) as server:
        try:
            startup = server.wait(server.is_healthy, "it answered", STARTUP_SECONDS, Progress("starting"))
        except ServerError:
            print(f"--- the end of {log}:\n{server.tail()}\n---", file=sys.stderr, flush=True)
            raise
        print(
            f"""ready after {startup:.0f} s: {cache_tokens(server):,} tokens of cache. Talk to it from another terminal:

  curl -s {server.url}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "{options.model}", "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'

  .venv/bin/python - <<'EOF'
  from openai import OpenAI
  client = OpenAI(base_url="{server.url}/v1", api_key="none")
  messages = [{{"role": "user", "content": "{QUESTION}"}}]
  print(client.chat.completions.create(model="{options.model}", messages=messages).choices[0].message.content)
  EOF

Ctrl-C stops it.""",
            flush=True,
        )
        try:
            code = server.process.wait()
        except KeyboardInterrupt:
            print("\nstopping vLLM", flush=True)
            return
        print(f"--- the end of {log}:\n{server.tail()}\n---", file=sys.stderr, flush=True)
        raise ServerError(f"vLLM ended by itself with exit code {code}; its log is {log}")


def bits_option(text: str) -> Any:
    """A number, or JSON for keys and values apart; the plug-in says which numbers it takes."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is neither a number nor JSON; give for example 4, or {{"key": 4, "value": 2}}'
        ) from None


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="model of tools/prepare_model.py (default: smollm2)")
    parser.add_argument("--checkpoint", type=Path, help="folder of another checkpoint instead")
    parser.add_argument("--bits", type=bits_option, help="bits per cached number (default: the plug-in's)")
    parser.add_argument("--method", choices=["xquant", "xquant-cl"], help="method (default: the plug-in's)")
    parser.add_argument("--port", type=int, help="port (default: a free one; with --serve 8000)")
    parser.add_argument("--attention-backend", default="xquant", help="vLLM attention backend (default: xquant)")
    parser.add_argument("--enforce-eager", action="store_true", help="no torch.compile: starts faster, runs slower")
    parser.add_argument("--serve", action="store_true", help="leave the server running until Ctrl-C")
    options = parser.parse_args()
    if options.serve and options.port is None:
        options.port = 8000
    if not re.fullmatch(r"[\w.-]+", options.model):
        parser.error(f"--model {options.model!r} is no model name; take letters, digits, '.', '_' and '-'")
    return options


def main() -> int:
    """Run the demo or the server; 0 if all of it worked."""
    options = parse_arguments()
    # Also when ended by another program, stop the server; and heed Ctrl-C even if a shell started this ignoring it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        checkpoint = options.checkpoint.resolve() if options.checkpoint else prepared_checkpoint(options.model)
        eager = options.enforce_eager
        if not eager and not can_compile():
            print("note: Python.h is missing, so vLLM runs with --enforce-eager; apt-get install python3-dev cures it")
            eager = True
        if options.serve:
            serve(options, checkpoint, eager)
            return 0
        check_chat(checkpoint, options.model)
        result = run_demo(options, checkpoint, eager)
    except ServerError as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted, vLLM is stopped", file=sys.stderr)
        return 130
    except Exception as error:  # the openai client has many; its server's log has been shown
        print(f"demo: error: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print_table(result, options.attention_backend)
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
