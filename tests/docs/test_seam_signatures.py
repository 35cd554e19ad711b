"""What passes between vLLM and this package has the parameters and attributes that this package takes for granted.

After an upgrade of vLLM the messages say which seam of docs/design/seams.md has moved, and how.
"""

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

from tests.docs.seam_calls import CALLED, READ, REPLACED
from tests.docs.test_seams import MODULES, PAGE, ROOT, exists

SECTIONS = {line.removeprefix("### ").removeprefix("## ") for line in PAGE.read_text().splitlines() if line[:2] == "##"}
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _lines(table: dict[str, list[str]]) -> list[Any]:
    return [pytest.param(seam, line, id=line.partition("(")[0]) for seam, lines in table.items() for line in lines]


def _moved(seam: str, what: str) -> str:
    return f"seam {seam!r} of docs/design/seams.md moved: {what}"


def problem_of_call(line: str) -> str | None:
    """Why vLLM would refuse a call that this package makes, or None."""
    call = ast.parse(line, mode="eval").body
    assert isinstance(call, ast.Call)
    name = ast.unparse(call.func)
    try:
        signature = inspect.signature(pkgutil.resolve_name(name))
    except (ImportError, AttributeError):
        return f"there is no {name}"
    try:
        signature.bind(*call.args, **{word.arg: None for word in call.keywords if word.arg})
    except TypeError as error:
        return f"{name}{signature} is called as {line.removeprefix(name)}: {error}"
    return None


def problem_of_replacement(line: str) -> str | None:
    """What vLLM has for parameters of something that this package replaces, if others than expected, or None."""
    name, _, expected = line.rstrip(")").partition("(")
    try:
        parameters = inspect.signature(pkgutil.resolve_name(name)).parameters.values()
    except (ImportError, AttributeError):
        return f"there is no {name}"
    found = ", ".join(str(parameter).split(":")[0].split("=")[0].strip() for parameter in parameters)
    return None if found == expected else f"{name} has the parameters ({found}), and ({expected}) are expected"


@pytest.mark.parametrize(("seam", "line"), _lines(CALLED))
def test_vllm_takes_what_it_is_called_with(seam, line):
    problem = problem_of_call(line)
    assert problem is None, _moved(seam, str(problem))


@pytest.mark.parametrize(("seam", "line"), _lines(REPLACED))
def test_what_is_replaced_has_the_parameters_of_its_replacement(seam, line):
    problem = problem_of_replacement(line)
    assert problem is None, _moved(seam, str(problem))


@pytest.mark.parametrize("owner", READ)
def test_what_vllm_hands_over_has_what_is_read(owner):
    kind = pkgutil.resolve_name(owner)
    known = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    lost = [name for name in READ[owner].split() if name not in known and not exists(f"{owner}.{name}")]
    assert not lost, _moved(owner, f"it has no {', '.join(lost)}")


def test_seams_are_sections_of_the_page():
    assert set(CALLED) | set(REPLACED) <= SECTIONS


def test_what_has_moved_is_named():
    assert problem_of_call("vllm.v1.engine.core.EngineCore.no_such()") == (
        "there is no vllm.v1.engine.core.EngineCore.no_such"
    )
    assert "missing a required argument" in str(problem_of_call("vllm.config.get_layers_from_vllm_config(config)"))
    assert "unexpected keyword" in str(problem_of_call("vllm.v1.engine.core.EngineCore.reset_prefix_cache(self, x=1)"))
    name = "vllm.lora.worker_manager.WorkerLoRAManager._load_adapter"
    assert problem_of_replacement(f"{name}(self)") == (
        f"{name} has the parameters (self, lora_request), and (self) are expected"
    )


def _overrides() -> Iterator[tuple[type, str, Any, Any]]:
    """Functions of this package's classes that stand for one of vLLM's class: class, name, ours, vLLM's."""
    for module in MODULES:
        name = ".".join(module.path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for kind in vars(importlib.import_module(name)).values():
            if not inspect.isclass(kind) or kind.__module__ != name:
                continue
            for attribute, ours in vars(kind).items():
                above = (vars(base)[attribute] for base in kind.__mro__[1:] if attribute in vars(base))
                theirs = next((f for f in map(_plain, above) if _is_vllms(f)), None)
                if theirs is not None and inspect.isfunction(_plain(ours)):
                    yield kind, attribute, _plain(ours), theirs


def _plain(function: Any) -> Any:
    return getattr(function, "__func__", getattr(function, "fget", function))


def _is_vllms(function: Any) -> bool:
    return inspect.isfunction(function) and function.__module__.startswith("vllm.")


def problem_of_override(ours: Any, theirs: Any) -> str | None:
    """What vLLM may pass and this package's function does not take, or None."""
    mine, base = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in mine.values()):
        return None
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    if {parameter.kind for parameter in base.values()} >= set(kinds):
        return None  # whoever overrides it says what it takes
    wanted = [name for name, parameter in base.items() if parameter.kind not in kinds]
    if lost := [name for name in wanted if name not in mine]:
        return f"does not take {', '.join(lost)}"
    in_order = [name for name, parameter in base.items() if parameter.kind in _POSITIONAL]
    if list(mine)[: len(in_order)] != in_order:
        return f"takes {', '.join(mine)} in another order than {', '.join(in_order)}"
    more = [n for n, p in mine.items() if n not in base and p.default is p.empty and p.kind not in kinds]
    return f"asks for {', '.join(more)}, which vLLM does not pass" if more else None


def test_overrides_take_what_vllm_passes():
    found = list(_overrides())
    problems = [
        f"{kind.__module__}.{kind.__name__}.{name} {problem}"
        for kind, name, ours, theirs in found
        if (problem := problem_of_override(ours, theirs))
    ]
    assert not problems, _moved("an interface of vLLM's", "; ".join(problems))
    assert {"forward", "build", "get_kv_cache_spec", "start_load_kv"} <= {f[1] for f in found}


def test_overrides_that_do_not_fit_are_seen():
    def theirs(self, a, b=0, *, c=None): ...

    assert problem_of_override(lambda self, a, b=0, *, c=None: None, theirs) is None
    assert problem_of_override(lambda self, **kwargs: None, theirs) is None
    assert problem_of_override(lambda self, a, b=0: None, theirs) == "does not take c"
    assert "another order" in str(problem_of_override(lambda self, b, a, c: None, theirs))
    assert "asks for d" in str(problem_of_override(lambda self, a, b, c, d: None, theirs))
