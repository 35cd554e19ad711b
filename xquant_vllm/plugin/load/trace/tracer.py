"""Follow tensors through an attention module, from its linear layers to its attention layer.

Linear layers are replaced by stand-ins that answer with codes of their rows (``codes.py``), whatever they are given.
Norms, RoPE and the like run, but hand on what came in, and are noted down. What arrives at attention then names its
rows, however a model's code splits, interleaves or transposes in between.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.checks import unsupported_model
from xquant_vllm.plugin.load.capture import capture_qkv
from xquant_vllm.plugin.load.random_input import random_input
from xquant_vllm.plugin.load.rope.positions import on_all_axes
from xquant_vllm.plugin.load.trace.codes import TOKENS, RowCodes
from xquant_vllm.plugin.load.trace.source import Source
from xquant_vllm.plugin.load.trace.stand_ins import Coded, Visit, descendants, is_linear, output_rows, watched


@dataclass(frozen=True)
class Trace:
    """How an attention module makes its keys and values.

    Attributes:
        key: the rows that are its keys.
        value: the rows that are its values.
        key_steps: calls of other modules that keys go through on their way, in order.
        value_steps: the same of values.
        query_steps: calls that neither keys nor values go through.
        linears: all linear layers that run before attention, by path.
        hidden_size: channels of the module's input.
    """

    key: Source
    value: Source
    key_steps: tuple[Visit, ...]
    value_steps: tuple[Visit, ...]
    query_steps: tuple[Visit, ...]
    linears: Mapping[str, Any]
    hidden_size: int


def trace(name: str, module: nn.Module, attention_child: str, kv_size: int, position_axes: int = 0) -> Trace:
    """Find the linear layers that make the keys and values of an attention module.

    Args:
        name: the module's name, for errors.
        module: the module.
        attention_child: name of its attention layer.
        kv_size: channels of the keys, and of the values, on this rank.
        position_axes: how many positions the module gets for a token; 0: one, without an axis for them.

    Raises:
        UnsupportedError: the module cannot be run, or its keys or values are not rows of one linear layer each.
    """
    who = f"{type(module).__name__} at {name}"
    parts = dict(descendants(module, attention_child))
    linears: dict[str, Any] = {path: part for path, part in parts.items() if is_linear(part)}
    if not linears:
        raise unsupported_model(f"{who} is not recognized: it has no linear layer beside its `{attention_child}`")
    rank = max(linear.tp_rank for linear in linears.values())
    codes = RowCodes({path: output_rows(linear) for path, linear in linears.items()}, seed=rank)
    others = {path: part for path, part in parts.items() if path not in linears}
    first_error: UnsupportedError | None = None
    # Mostly the first layer reads the module's input. A module of another width cannot run.
    for hidden_size in dict.fromkeys(linear.input_size for linear in linears.values()):
        coded = {path: Coded(path, linear, codes.of(path)) for path, linear in linears.items()}
        try:
            with watched(others) as visits:
                arrived = _arrived(name, module, attention_child, hidden_size, coded, position_axes)
        except UnsupportedError as error:
            first_error = first_error or error
            continue
        reached = {path: linears[path] for path, stand_in in coded.items() if stand_in.given is not None}
        key, value = (
            _source(who, what, reached, codes, tensor, kv_size)
            for what, tensor in zip(("keys", "values"), arrived[1:], strict=True)
        )
        _refuse_shared(who, key, value, coded)
        key_steps, value_steps = (
            tuple(visit for visit in visits if _meets(codes, visit, source)) for source in (key, value)
        )
        met = set(map(id, (*key_steps, *value_steps)))
        query_steps = tuple(visit for visit in visits if id(visit) not in met)
        return Trace(key, value, key_steps, value_steps, query_steps, reached, hidden_size)
    assert first_error is not None
    raise first_error


def _arrived(
    name: str,
    module: nn.Module,
    attention_child: str,
    hidden_size: int,
    coded: Mapping[str, Coded],
    position_axes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What reaches attention, ``[TOKENS, channels]`` each, for a random input in the model's dtype."""
    linear: Any = module.get_submodule(next(iter(coded)))
    device = next((parameter.device for parameter in linear.parameters()), torch.device("cpu"))
    hidden = random_input(TOKENS, hidden_size, linear.params_dtype, device)
    positions = on_all_axes(torch.arange(TOKENS, device="cpu"), position_axes).to(device)
    return capture_qkv(name, module, attention_child, hidden, positions, coded)


def _source(
    who: str, what: str, linears: Mapping[str, Any], codes: RowCodes, tensor: torch.Tensor, kv_size: int
) -> Source:
    """The linear layer and the rows that channels ``[TOKENS, kv_size]`` are."""
    if tensor.shape[1] != kv_size:
        raise unsupported_model(f"{who} is not recognized: it has {tensor.shape[1]} channels of {what}, not {kv_size}")
    factor = codes.factor(tensor) or 1.0
    numbers = codes.read(tensor, factor)
    unknown = (numbers < 0).nonzero().flatten()
    if unknown.numel():
        raise unsupported_model(
            f"{who} is not recognized: {unknown.numel()} of {kv_size} channels of its {what}, the first of them "
            f"{int(unknown[0])}, are not just output rows of its linear layers ({', '.join(linears)}) on this rank: "
            "they are clamped, scaled one by one, added to, or come from elsewhere"
        )
    if numbers.unique().numel() != kv_size:
        raise unsupported_model(f"{who} is not recognized: several channels of its {what} are one and the same row")
    owners = codes.owners(numbers)
    if len(owners) > 1:
        raise unsupported_model(
            f"{who} is not recognized: its {what} come from several linear layers ({', '.join(owners)})"
        )
    ((child, rows),) = owners.items()
    return Source(child, linears[child], rows, factor)


def _refuse_shared(who: str, key: Source, value: Source, coded: Mapping[str, Coded]) -> None:
    """Refuse keys and values that are the same rows, or are made of different inputs."""
    if key.child == value.child:
        if torch.isin(key.rows, value.rows).any():
            raise unsupported_model(f"{who} is not recognized: rows of its {key.child} are keys and values at once")
        return
    inputs = [coded[source.child].given for source in (key, value)]
    if inputs[0] is None or inputs[1] is None or not torch.equal(inputs[0], inputs[1]):
        raise unsupported_model(
            f"{who} is not recognized: its {key.child} and its {value.child} are given different inputs"
        )


def _meets(codes: RowCodes, visit: Visit, source: Source) -> bool:
    """Whether a module was given any of these rows, before or after their factor.

    Tokens are in any dimension, or tokens and heads in the first.
    """
    numbers = codes.numbers(source.child, source.rows)
    return any(
        bool(torch.isin(codes.read(rows, factor), numbers).any())
        for factor in {1.0, source.factor}
        for tensor in visit.given
        for rows in _by_token(tensor)
    )


def _by_token(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor as ``[TOKENS, channels]``, in all ways in which it may be meant."""
    for dimension, size in enumerate(tensor.shape):
        if size == TOKENS:
            yield tensor.movedim(dimension, 0).flatten(1)
    if tensor.dim() and tensor.shape[0] != TOKENS and tensor.shape[0] % TOKENS == 0:
        yield tensor.reshape(TOKENS, -1)
