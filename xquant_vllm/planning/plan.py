"""A plan: every cache of a model in some memory, and the one that is recommended. The API of ``xquant plan``."""

from dataclasses import dataclass, replace
from typing import Any

from xquant_vllm.errors import RefusedError, SettingsError
from xquant_vllm.planning.caches import HEAD, PLAIN, Kind, kinds, of_formats
from xquant_vllm.planning.commands import serve_folder
from xquant_vllm.planning.factor_folder import folder_formats, folder_losses, kind_of
from xquant_vllm.planning.losses import Losses, nearest_losses
from xquant_vllm.planning.model_files import ModelFiles, read_model
from xquant_vllm.planning.options import Option, option_of, plan_option
from xquant_vllm.planning.planned_model import PlannedModel, planned_model
from xquant_vllm.planning.recommend import MOST_LOSS, recommend
from xquant_vllm.planning.serving import Device, Serving
from xquant_vllm.scheme.factor_conflicts import factors_in, over_factors
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.settings import XQuantSettings


@dataclass(frozen=True)
class PlanRequest:
    """What is asked.

    Attributes:
        model: a folder, or a name on the hub.
        memory: bytes for the cache, of every rank.
        context: tokens of a request, ``--max-model-len``; None: the longest that the configuration names.
        hot: setting ``"hot"``; None: its default.
        ranks: of tensor parallelism.
        device: where it is served.
        dtype: of the model: ``"auto"``, or by its name.
        batched_tokens: ``--max-num-batched-tokens``; None: vLLM's default.
        most_loss: increase in perplexity that a recommended cache may have.
    """

    model: str
    memory: int
    context: int | None = None
    hot: int | float | None = None
    ranks: int = 1
    device: Device = "cpu"
    dtype: str = "auto"
    batched_tokens: int | None = None
    most_loss: float = MOST_LOSS


@dataclass(frozen=True)
class Plan:
    """What is answered.

    Attributes:
        model: the model.
        serving: how it is served.
        losses: where the expected losses come from.
        options: every cache, the 16-bit one first.
        recommended: one of them, None if none can be served.
    """

    model: PlannedModel
    serving: Serving
    losses: Losses
    options: tuple[Option, ...]
    recommended: Option | None

    @property
    def plain(self) -> Option:
        """The 16-bit cache."""
        return self.options[0]

    def as_json(self) -> dict[str, Any]:
        """As ``xquant plan --json`` prints it."""
        return {
            "model": self.model.name,
            "architecture": self.model.architecture,
            "memory": self.serving.memory,
            "context": self.serving.context,
            "device": self.serving.device,
            "tensor_parallel_size": self.serving.ranks,
            "weight_bytes": self.model.weight_bytes,
            "loss_of": self.losses.model,
            "loss_is_of_this_shape": self.losses.alike,
            "notes": [*self.model.notes],
            "options": [option.as_json() for option in self.options],
            "recommended": None if self.recommended is None else self.recommended.as_json(),
        }


def make_plan(request: PlanRequest) -> Plan:
    """Plan a model's cache, without loading a weight.

    Raises:
        RefusedError: the model cannot be read, or an option does not fit it.
    """
    files = read_model(request.model)
    model = planned_model(files)
    serving = _serving(request, model)
    losses = nearest_losses(model)
    try:
        header = None if files.folder is None else factors_in(files.folder)
    except SettingsError as error:
        raise RefusedError(str(error)) from None
    if header is not None and header.settings.allocation is not None:
        losses = folder_losses(files, header) or losses
        plain = plan_option(Kind(PLAIN, 16), model, serving, losses)
        options: tuple[Option, ...] = (plain, _of_folder(files, header, model, serving, losses))
    else:
        options = tuple(plan_option(kind, model, serving, losses) for kind in kinds(model))
    return Plan(model, serving, losses, options, recommend(options, request.most_loss))


def _of_folder(
    files: ModelFiles, header: FactorHeader, model: PlannedModel, serving: Serving, losses: Losses
) -> Option:
    """The cache that is built into a folder of calibrated factors."""
    settings = over_factors(XQuantSettings(), files.folder, header)
    kind = kind_of(header)
    loss = losses.of(kind)
    reason = None
    if model.problems:
        reason = model.problems[0]
    elif kind.method != HEAD and serving.ranks > 1:
        reason = "its latents do not shard, so it serves --tensor-parallel-size 1"
    made = of_formats(folder_formats(settings, header, model, serving), model, serving)
    found = option_of(kind, made, reason, model, serving, None if loss is None else (loss.increase, loss.kl))
    return found if found.command is None else replace(found, command=serve_folder(files.name, serving))


def _serving(request: PlanRequest, model: PlannedModel) -> Serving:
    context = request.context or model.positions
    if context is None:
        raise RefusedError(f"xquant: {model.name} names no longest context in config.json; set --context")
    ranks = request.ranks
    if model.heads % ranks or (model.kv_heads % ranks and ranks % model.kv_heads):
        raise RefusedError(
            f"xquant: --tp {ranks} cannot work: the model has {model.heads} query heads and {model.kv_heads} kv heads; "
            f"set a divisor of {model.heads}"
        )
    return Serving(
        memory=request.memory,
        context=context,
        hot=request.hot,
        ranks=ranks,
        device=request.device,
        dtype=model.serving_dtype(request.dtype),
        batched_tokens=request.batched_tokens,
    )
