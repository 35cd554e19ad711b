"""``xquant plan``: from arguments to a plan, and to what a trace gains from it."""

import argparse
import json
from typing import Any

from pydantic_core import PydanticCustomError

from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.writable import check_file
from xquant_vllm.planning.plan import Plan, PlanRequest, make_plan
from xquant_vllm.planning.recommend import MOST_LOSS
from xquant_vllm.planning.report import report
from xquant_vllm.planning.serving import this_device
from xquant_vllm.planning.traces.read import read_trace
from xquant_vllm.planning.traces.replay import Rates
from xquant_vllm.planning.traces.worth import TraceWorth, worth_of
from xquant_vllm.planning.traces.worth_report import check_plot, plot, worth_report
from xquant_vllm.scheme.hot_share import parse_share


def run(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: what :mod:`xquant_vllm.cli.plan_arguments` parsed.

    Raises:
        RefusedError: the model, an option or the trace cannot be used.
    """
    if options.tp < 1:
        raise RefusedError(f"xquant: --tp {options.tp} is no number of ranks; set 1 or more")
    _check_trace_options(options)
    plan = make_plan(
        PlanRequest(
            model=options.model,
            memory=options.memory,
            context=options.context,
            hot=_hot(options.hot),
            ranks=options.tp,
            device=options.device or this_device(),
            dtype=options.dtype,
            batched_tokens=options.max_num_batched_tokens,
            most_loss=MOST_LOSS if options.max_loss is None else options.max_loss,
        )
    )
    answer: dict[str, Any] = plan.as_json()
    text = report(plan)
    if options.trace is not None:
        worth = _worth(options, plan)
        answer["trace"] = worth.as_json()
        text = f"{text}\n\n{worth_report(worth)}"
        if options.plot is not None:
            plot(worth, options.plot)
    print(json.dumps(answer) if options.json else text)


def _check_trace_options(options: argparse.Namespace) -> None:
    """Refuse options that cannot work before a model is read."""
    for name in ("instances", "prefill_rate", "decode_rate", "max_num_seqs"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise RefusedError(f"xquant: --{name.replace('_', '-')} {value} cannot work; set more than 0")
    if options.plot is not None:
        if options.trace is None:
            raise RefusedError("xquant: --plot draws what a trace gains; add --trace, or leave --plot out")
        check_plot()
        check_file("--plot", options.plot)


def _worth(options: argparse.Namespace, plan: Plan) -> TraceWorth:
    if not plan.plain.supported:
        raise RefusedError(
            f"xquant: --trace compares with 16 bit, which cannot be served like this: {plan.plain.reason}"
        )
    trace = read_trace(options.trace, options.model, plan.serving.block_size)
    usual = Rates()
    rates = Rates(options.prefill_rate or usual.prefill, options.decode_rate or usual.decode, options.max_num_seqs)
    return worth_of(plan, trace, options.instances, rates)


def _hot(text: str | None) -> int | float | None:
    try:
        return parse_share(text)
    except PydanticCustomError as error:
        raise RefusedError(f"xquant: --hot {text} cannot work: {error.message()}") from None
