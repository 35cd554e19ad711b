"""All families, and what was recorded of them."""

import json
from pathlib import Path

from tests.model_hub.dense import DENSE
from tests.model_hub.experts import EXPERTS
from tests.model_hub.images import IMAGES
from tests.model_hub.other_caches import OTHER_CACHES
from tests.model_hub.remote_code import REMOTE_CODE
from tests.model_hub.transformers_backend import TRANSFORMERS_BACKEND

FAMILIES = (*DENSE, *EXPERTS, *TRANSFORMERS_BACKEND, *REMOTE_CODE, *IMAGES, *OTHER_CACHES)
RESULTS_PATH = Path(__file__).with_name("results.json")


def results() -> dict[str, dict]:
    """By family, what ``results.json`` says of it."""
    return json.loads(RESULTS_PATH.read_text())["families"]
