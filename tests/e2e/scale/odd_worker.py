"""A worker for CPUs whose second rank is set up otherwise than the first, as if it were on another node."""

import json
import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class OddWorker(CPUWorker):
    """``ODD_RANK`` has variables as JSON, ``ODD_SETTINGS`` the settings under ``"xquant"``."""

    def load_model(self, **arguments: Any) -> None:
        if self.rank == 1:
            os.environ.update(json.loads(os.environ.get("ODD_RANK", "{}")))
            if "ODD_SETTINGS" in os.environ:
                # And nothing of the engine's: it made a configuration of its own.
                self.vllm_config.additional_config = {"xquant": json.loads(os.environ["ODD_SETTINGS"])}
        super().load_model(**arguments)
