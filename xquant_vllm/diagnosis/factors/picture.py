"""A folder's factors in words and as a picture of characters."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from xquant_vllm.scheme.certificate import Certificate

_COLUMNS = 32
# Of 0 to 8 bits, and of more.
_BLOCKS, _PLAIN = "·▁▂▃▄▅▆▇██", "012345678+"


def in_words(facts: Mapping[str, Any], encoding: str | None) -> Iterator[str]:
    """The lines of a report.

    Args:
        facts: see :func:`xquant_vllm.diagnosis.factors.described.describe_factors`.
        encoding: of the terminal; without blocks in it the picture is made of digits.
    """
    model, calibration = facts["model"], facts["calibration"]
    yield (
        f"{facts['folder']}: factors of {model['architecture']} with {model['layers']} layers, hidden size "
        f"{model['hidden_size']}, {model['kv_heads']} kv heads of {model['head_size']}"
    )
    yield f"made by xquant-vllm {facts['package']} (format {facts['format']}), for --dtype {facts['dtype']}"
    yield f"method {facts['method']}, basis {facts['basis']}, {_bits(facts)}{_chain(facts)}"
    yield (
        "data-free: from the weights alone"
        if calibration is None
        else f"calibrated on {calibration['tokens']} tokens of {calibration['text']}"
    )
    if facts["certificate"] is not None:
        bits = "" if facts["bits_built_in"] else ", at these bits"
        yield f"measured loss{bits} {Certificate.model_validate(facts['certificate']).describe()}"
    yield from _layers(facts["layers"], _marks(encoding))
    yield (
        f"all layers: {facts['bytes_per_token']} bytes per token, 16-bit keys and values take "
        f"{facts['bytes_per_token_16bit']} ({_times(facts)})"
    )
    if facts["problems"]:
        yield from (f"NOT WHOLE: {problem}" for problem in facts["problems"])
    else:
        header = (
            "those of the header and" if facts["header_checked"] else "the header has none (an older release); those"
        )
        yield f"checksums: {header} of all {facts['tensors']} tensors match"


def bars(bits: Sequence[float], marks: str) -> str:
    """Bits of channels as a row of characters, each for as many channels.

    Args:
        bits: of every channel.
        marks: characters for 0, 1, ... 8 bits, and for more.
    """
    columns = min(_COLUMNS, len(bits))
    row = ""
    for column in range(columns):
        part = bits[column * len(bits) // columns : (column + 1) * len(bits) // columns]
        mean = sum(part) / len(part)
        row += marks[9] if mean > 8.5 else marks[round(mean)]
    return row


def _marks(encoding: str | None) -> str:
    try:
        _BLOCKS.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return _PLAIN
    return _BLOCKS


def _layers(layers: Sequence[Mapping[str, Any]], marks: str) -> Iterator[str]:
    yield ""
    yield "bits of every layer's channels, the most important ones first, and bytes per token"
    for layer in layers:
        shown = []
        for stream in layer["streams"]:
            mean = sum(stream["bits"]) / len(stream["bits"])
            shown.append(f"{stream['of']} {bars(stream['bits'], marks)} {mean:.2f}")
        reads = f", reads {len(layer['reads'])} before it" if layer["reads"] else ""
        yield f"{layer['layer']:>4}  {'  '.join(shown)}  {layer['bytes_per_token']} ({_times(layer)}{reads})"
    yield ""


def _bits(facts: Mapping[str, Any]) -> str:
    bits = facts["bits"]
    number = str(bits["key"]) if bits["key"] == bits["value"] else f"key {bits['key']} / value {bits['value']}"
    return f"{number} bits ({'the mean over all channels, built in' if facts['bits_built_in'] else 'a default'})"


def _chain(facts: Mapping[str, Any]) -> str:
    chain = facts["chain"]
    return (
        "" if chain is None else f", first layers {chain['first_layers']}, anchor interval {chain['anchor_interval']}"
    )


def _times(of: Mapping[str, Any]) -> str:
    return f"{of['bytes_per_token_16bit'] / of['bytes_per_token']:.2f}x"
