"""docs/settings.md: every setting of the backends, from the models that check them."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import xquant_vllm
from reference import MARK
from xquant_vllm.kivi.plugin import settings as kivi
from xquant_vllm.scheme import settings as xquant

_INTRODUCTION = """\
Every setting of the two backends: what it does, what you can set, and what it is if you leave it out. Which to choose
is in [choosing.md](choosing.md), as is a [table of all of them](choosing.md#all-settings).

Settings are JSON under the name of the backend. On the command line:

```console
$ vllm serve MODEL --attention-backend xquant --additional-config '{"xquant": {"bits": 3, "skip_layers": [0, 1]}}'
```

In Python:

<!-- not run: takes minutes -->
```python
from vllm import LLM

llm = LLM("MODEL", attention_backend="xquant", additional_config={"xquant": {"bits": 3, "skip_layers": [0, 1]}})
```

They are checked when the server starts. One that is not known or cannot work ends the start with one line: the setting,
its value, why, and what to set instead ([troubleshooting.md](troubleshooting.md#a-setting-cannot-work)). In a folder
that `xquant factorize` has calibrated, everything that decides what is stored is built in ([factors.md](factors.md)).
"""

_ELSEWHERE = """\
## Elsewhere

* `XQuantConnector`, which keeps pages in files, has settings of its own: [connectors.md](connectors.md#settings).
* Where only some layers are to be compressed, vLLM's `backend_per_kind` says which:
  [families.md](families.md#layers-that-keep-keys-and-values).
"""

# How a variable is named in the code.
_VARIABLE = re.compile(r'"(XQUANT_[A-Z_]+)"')
# Variables of the environment; those that the package does not read are left out.
_VARIABLES = {
    "XQUANT_CUDA_KERNELS": "`1` takes the CUDA C++ kernels in place of the Triton ones",
    "XQUANT_ATTENTION_KERNELS": "names the kernels on CPUs; for tests",
}


def page() -> str:
    """The page in Markdown."""
    lines = ["# Settings", "", MARK, "", _INTRODUCTION]
    lines += ["## Of the backend xquant", ""]
    lines += _sections(xquant.XQuantSettings, xquant._ADVICE, "")
    lines += ["## Of the backend kivi", ""]
    lines += ["This backend is there to compare with ([kivi.md](design/kivi.md)). Its settings stand under `kivi`.", ""]
    lines += _sections(kivi.KiviSettings, kivi._ADVICE, "kivi: ")
    lines += [_ELSEWHERE, "Environment variables, read at start-up only:", ""]
    lines += [f"* `{name}`: {_VARIABLES[name]}" for name in variables()]
    return "\n".join(lines) + "\n"


def variables() -> list[str]:
    """Names of the environment variables of its own that the package reads.

    Raises:
        KeyError: one is not described in ``_VARIABLES``.
    """
    folder = Path(xquant_vllm.__file__).parent
    read = {name for path in folder.rglob("*.py") for name in _VARIABLE.findall(path.read_text())}
    return sorted(read)


def _sections(model: type[BaseModel], advice: Mapping[str, str], prefix: str) -> Iterator[str]:
    meanings = attributes(model)
    for name, field in model.model_fields.items():
        yield f"### {prefix}{name}"
        yield ""
        yield f"{_sentence(meanings[name])}"
        yield ""
        yield f"* Set: {_values(advice[name])}"
        yield f"* Default: {_default(field.default)}"
        yield ""


def attributes(model: type[BaseModel]) -> dict[str, str]:
    """What a model's docstring says of its fields, in Markdown, on one line each.

    Raises:
        ValueError: it says nothing of one.
    """
    text = (model.__doc__ or "").partition("Attributes:")[2]
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if start := re.match(r"        (\w+): (.*)$", line):
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    missing = set(model.model_fields) - set(found)
    if missing:
        raise ValueError(f"{model.__name__}: the docstring says nothing of {', '.join(sorted(missing))}")
    return {name: _markdown(text) for name, text in found.items()}


def _markdown(text: str) -> str:
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    text = text.replace("``", "`")
    text = re.sub(r"\bNone takes\b", "not set, it is", text)
    return re.sub(r"\bNone\b", "not set", text)


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    text = re.sub(r"\. not set", ". Not set", text)
    return text if text.endswith(".") else f"{text}."


def _default(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, BaseModel):
        parts = value.model_dump()
        return f"`{json.dumps(parts if len(set(parts.values())) > 1 else next(iter(parts.values())))}`"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value)}`"


def _values(advice: str) -> str:
    """What a setting may be: what the message that refuses another value tells users to set."""
    values = advice.removeprefix("set ").removesuffix(", or leave it out")
    return re.sub(r'(\{[^}]*\}|\[[^\]]*\]|"[^"]*"|\btrue\b|\bfalse\b)', r"`\1`", values)
