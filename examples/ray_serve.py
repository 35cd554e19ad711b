#!/usr/bin/env python3
"""One model behind Ray Serve: several replicas, each of them vLLM's OpenAI server with a compressed cache of its own.

    python -m pip install "ray[serve]>=2.60,<3"      # beside vLLM and xquant-vllm, on every node
    python examples/ray_serve.py MODEL --replicas 2 --gpus 1 --max-model-len 4096

Every option that is not this script's goes to vLLM, as for `vllm serve`. On a cluster that runs already, `serve run`
and files of `serve deploy` take the same application; there an option is NAME=VALUE:

    serve run --app-dir examples ray_serve:app model=MODEL replicas=2 gpus=1 max-model-len=4096
"""

from __future__ import annotations

import argparse
import contextlib
import os
import types
from typing import Any

from ray import serve


@serve.deployment(name="xquant", max_ongoing_requests=256, health_check_period_s=10, health_check_timeout_s=30)
@serve.ingress()
class Replica:
    """An engine and the HTTP application of `vllm serve` on top of it."""

    async def __init__(self, arguments: list[str]) -> None:
        """Load the model. Ray Serve sends requests once this returns, however long it takes.

        Args:
            arguments: of ``vllm serve``, the model first.
        """
        # A replica has threads, which would not survive in a copy of it.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        # On CPUs engines that know nothing of each other would all bind their threads to the same cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        self.options = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments)
        if self.options.model_tag is not None:
            self.options.model = self.options.model_tag
        validate_parsed_serve_args(self.options)
        self.resources = contextlib.AsyncExitStack()
        self.engine = await self.resources.enter_async_context(build_async_engine_client(self.options))

    async def __serve_build_asgi_app__(self) -> Any:
        """The application that answers; Ray Serve asks for it when the model is loaded."""
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self.engine.get_supported_tasks()
        app = build_app(self.options, tasks, self.engine.model_config)
        await init_app_state(self.engine, app.state, self.options, tasks)
        # vLLM ends this server when the engine dies. There is none here: Ray Serve sees it by check_health.
        app.state.server = types.SimpleNamespace()
        return app

    async def check_health(self) -> None:
        """Raise if the engine is dead; Ray Serve then starts another replica."""
        await self.engine.check_health()

    async def __del__(self) -> None:
        """End the engine's processes."""
        if hasattr(self, "resources"):
            await self.resources.aclose()


def application(arguments: list[str], replicas: int, gpus: float, cpus: float) -> serve.Application:
    """What Ray Serve runs.

    Args:
        arguments: of ``vllm serve``, the model first.
        replicas: how many.
        gpus: of a replica; must be what its engine takes, so 4 with ``--tensor-parallel-size 4``.
        cpus: of a replica; Ray also makes this its number of threads.
    """
    if "--attention-backend" not in arguments:
        arguments = [*arguments, "--attention-backend", "xquant"]
    resources = {"num_gpus": gpus, "num_cpus": cpus}
    return Replica.options(num_replicas=replicas, ray_actor_options=resources).bind(arguments)


def app(options: dict[str, Any]) -> serve.Application:
    """For `serve run` and `serve deploy`: ``model``, ``replicas``, ``gpus``, ``cpus``, and options of vLLM by name."""
    given = dict(options)
    if "model" not in given:
        raise ValueError("ray_serve: no model was given; say: serve run --app-dir examples ray_serve:app model=MODEL")
    model, replicas = str(given.pop("model")), int(given.pop("replicas", 1))
    gpus, cpus = float(given.pop("gpus", 0)), float(given.pop("cpus", 1))
    arguments = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return application([model, *arguments], replicas, gpus, cpus)


def main() -> None:
    """Serve until Ctrl-C, in the cluster of ``RAY_ADDRESS`` or in one that is started here."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hugging Face hub")
    parser.add_argument("--replicas", type=int, default=1, help="default 1")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a replica (default 0: CPUs)")
    parser.add_argument("--cpus", type=float, default=1, help="cores of a replica, which are its threads (default 1)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000")
    own, theirs = parser.parse_known_args()
    serve.start(http_options={"host": own.host, "port": own.port})
    serve.run(application([own.model, *theirs], own.replicas, own.gpus, own.cpus), name="xquant", blocking=True)


if __name__ == "__main__":
    main()
