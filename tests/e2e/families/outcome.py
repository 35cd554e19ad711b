"""What becomes of a family of models: served as with the 16-bit cache, refused by name, or broken in vLLM itself."""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.e2e.engine import EngineFailed, Engines
from tests.e2e.families.test_families import EIGHT, ENGINE, PROMPT
from tests.model_hub.family import HubFamily, save

SERVED, BROKEN, REFUSED = "served", "broken", "refused"
_TASKS = [{"kind": "prompt_logprobs", "prompts": [PROMPT]}]
# Of log-probabilities that are not all alike.
_SPREAD = 0.3
# Mean absolute difference of log-probabilities: of 8 bits from 16, and of programs that compute the same. Some models
# change more at 8 bits; that it is by rounding alone shows without quantization.
BOUND, LOOSE, SAME = 0.03, 0.1, 0.01


@dataclass(frozen=True)
class Outcome:
    """What became of a family.

    Attributes:
        kind: ``SERVED``, ``BROKEN`` or ``REFUSED``.
        why: it is not served; "" if it is.
        change: mean absolute change of log-probability of 8 bits against 16; None if it is not served.
    """

    kind: str
    why: str = ""
    change: float | None = None


def outcome_of(engines: Engines, family: HubFamily, folder: Path) -> Outcome:
    """Build a family's checkpoint in ``folder`` and serve it.

    Raises:
        AssertionError: it is served, and wrong; or it ends in another error than a refusal where 16 bits are served.
    """
    model = save(family, folder)
    try:
        ours = _logprobs(engines, folder, family, "xquant", xquant=EIGHT)
    except EngineFailed as error:
        if said := _refusal(error.log, folder):
            return Outcome(REFUSED, said)
        try:
            _logprobs(engines, folder, family, "CPU_ATTN")
        except EngineFailed as of_vllm:
            return Outcome(BROKEN, _last_words(of_vllm.log, folder))
        raise
    expected = _logprobs(engines, folder, family, "CPU_ATTN")
    assert statistics.pstdev(expected) > _SPREAD, "the model says the same of every token: it tells nothing"
    change = _difference(ours, expected)
    assert change <= LOOSE, f"served, but log-probabilities are {change:.3f} from those of the 16-bit cache"
    if change > BOUND:
        unquantized = _logprobs(engines, folder, family, "xquant", xquant={**EIGHT, "bits": 16})
        apart = _difference(unquantized, expected)
        assert apart <= SAME, (
            f"served, but without quantization log-probabilities are {apart:.3f} from the 16-bit cache's"
        )
    if model is not None and (apart := _difference(expected, _by_transformers(model))) > SAME:
        return Outcome(
            BROKEN, f"log-probabilities {apart:.2f} from those of transformers, with this cache as with its own"
        )
    return Outcome(SERVED, change=round(change, 4))


def _logprobs(engines: Engines, folder: Path, family: HubFamily, backend: str, **settings: Any) -> list[float]:
    result = engines.run(folder, backend, _TASKS, **{**ENGINE, **family.engine, **settings})
    if backend == "xquant":
        assert re.search(r"layers [\d, -]+ are compressed", result.log), "no layer is compressed"
        assert "keep keys and values" not in result.log, "some layers are not compressed"
    return result.tasks[0]["logprobs"][0]


def _difference(ours: list[float], expected: list[float]) -> float:
    return statistics.mean(abs(p - q) for p, q in zip(ours, expected, strict=True))


def _by_transformers(model: torch.nn.Module) -> list[float]:
    """Log-probability of every token of the prompt but the first."""
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = model.eval()(tokens).logits[0, :-1].float().log_softmax(-1)
    return logits.gather(-1, tokens[0, 1:, None])[:, 0].tolist()


def _refusal(log: str, folder: Path) -> str:
    """Why our last line says that the model is not served; "" if the last line is not ours."""
    own = re.search(r"xquant_vllm\.errors\.\w+: ((?:xquant: [^\n]*\n?)+)\s*$", log)
    if own is None:
        return ""
    reasons = []
    for line in own[1].strip().splitlines():
        line = re.sub(r"; (choose another --attention-backend for this model|leave it out)$", "", line)
        line = re.sub(r"^xquant: (\S+ \(\S+\) uses )?", "", line).removesuffix(": not supported")
        reasons.append(line.replace(f" ({folder})", ""))
    return "; ".join(reasons)


def _last_words(log: str, folder: Path) -> str:
    """The last error in a log, without the places that only this machine has."""
    errors = re.findall(r"^[\w.]+(?:Error|Exception)\b.*$", log, re.M)
    last = errors[-1] if errors else log.strip().splitlines()[-1]
    # pydantic's have a first line without content.
    if "ValidationError" in last and (own := re.findall(r"^  (?:Value error, )?(.*?) \[type=.*$", log, re.M)):
        last = own[-1]
    return re.sub(r"\S*/\S+", "...", last.replace(str(folder), "the checkpoint"))[:200]
