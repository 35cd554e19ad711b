"""docs/design/seams.md lists what the plugin rooms take from vLLM and change in it, all of it in the installed vLLM.

What the code does is read from its syntax: names imported from vLLM, attributes of other objects that are assigned, and
private names of others that are read.
"""

import ast
import dataclasses
import inspect
import pkgutil
import re
from functools import cached_property
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

PAGE = ROOT / "docs" / "design" / "seams.md"
ROOMS = (ROOT / "xquant_vllm" / "plugin", ROOT / "xquant_vllm" / "kivi" / "plugin")
# Attributes that are assigned on objects of Python and of this package.
_OWN = {
    "__code__",
    "_xquant_wrapped",
    "_xquant_hooked",
    "_kivi_hooked",
    "_xquant_unwraps",
    "_xquant_shares",
    "_xquant_guards",
    "__class__",
    "own_folder",
    "served",
}
_WORDS = re.compile(r"`([\w.]+)`")


class Module:
    """The syntax of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.tree = path, ast.parse(path.read_text())

    @cached_property
    def imported(self) -> set[str]:
        """Dotted names imported from vLLM."""
        names = set()
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names if alias.name.startswith("vllm.")}
        return names

    @cached_property
    def assigned(self) -> set[str]:
        """Attributes that are assigned on something else than ``self``, also by ``setattr``."""
        names = set()
        for function, node in _with_functions(self.tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                for part in ast.walk(target) if target is not None else ():
                    stored = isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store)
                    if stored and not _is_self(part.value):
                        names.add(part.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                names |= self._set_by(node, function)
        return names

    def _set_by(self, call: ast.Call, function: ast.AST | None) -> set[str]:
        """Attributes that a call of ``setattr`` may set: its literal, or words in its function and in calls of it."""
        if isinstance(call.args[1], ast.Constant):
            return {call.args[1].value}
        places = [function, *(node for node in ast.walk(self.tree) if _calls(node, getattr(function, "name", None)))]
        words = {
            node.value
            for place in places
            for node in ast.walk(place)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier()
        }
        constants = {
            node.targets[0].id: node.value.value
            for node in self.tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        name = call.args[1]
        if isinstance(name, ast.Name) and name.id in constants:
            return {constants[name.id]}
        # A mark on a function of this package, named by the callers in other files.
        assert words or "marker" in ast.dump(name), f"{self.path}:{call.lineno}: what is set here?"
        return words

    @cached_property
    def private(self) -> set[str]:
        """Names with an underscore that are read from other objects, and those read from ``self`` but not made here."""
        own = {getattr(node, "name", None) for node in ast.walk(self.tree)}
        own |= {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute) and _stored(node)}
        return {
            node.attr
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr) and node.attr not in own
        }


def _stored(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and _is_self(node.value)


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def _calls(node: ast.AST, name: str | None) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _with_functions(tree: ast.AST, function: ast.AST | None = None):
    """All nodes, with the function that each is in."""
    for node in ast.iter_child_nodes(tree):
        yield function, node
        yield from _with_functions(node, node if isinstance(node, ast.FunctionDef) else function)


MODULES = [Module(path) for room in ROOMS for path in sorted(room.rglob("*.py"))]
LISTED = set(_WORDS.findall(PAGE.read_text()))
DOTTED = sorted(name for name in LISTED if name.startswith("vllm.") and name != "vllm.general_plugins")
LAST = {name.rpartition(".")[2] for name in DOTTED}


def exists(name: str) -> bool:
    """Whether the installed vLLM has a module, a class, or an attribute of a class or of its instances."""
    try:
        pkgutil.resolve_name(name)
        return True
    except (ImportError, AttributeError):
        pass
    try:
        owner = pkgutil.resolve_name(name.rpartition(".")[0])
    except (ImportError, AttributeError):
        return False
    attribute = name.rpartition(".")[2]
    if not inspect.isclass(owner):
        return False
    if dataclasses.is_dataclass(owner) and attribute in {field.name for field in dataclasses.fields(owner)}:
        return True
    source = "".join(inspect.getsource(kind) for kind in owner.__mro__ if kind.__module__.startswith("vllm"))
    return re.search(rf"self\.{attribute}\b.* = |register_buffer\(\s*\"{attribute}\"", source) is not None


@pytest.mark.parametrize("name", DOTTED)
def test_what_the_page_lists_is_in_vllm(name):
    assert exists(name)


def test_what_is_not_in_vllm_is_noticed():
    assert not exists("vllm.platforms.cpu.CpuPlatform.no_such_method")
    assert not exists("vllm.no_such_module.Name")
    assert not exists("vllm.model_executor.layers.attention.Attention.no_such_attribute")
    assert exists("vllm.model_executor.layers.attention.Attention.head_size")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module.path.relative_to(ROOT)))
def test_the_page_lists_what_the_code_touches(module):
    assert module.imported - LISTED == set(), "imported from vLLM, but not in docs/design/seams.md"
    assert module.assigned - _OWN - LISTED - LAST == set(), "replaced in vLLM, but not in docs/design/seams.md"
    assert module.private - LISTED - LAST == set(), "private names of others, but not in docs/design/seams.md"


def test_every_seam_says_why_what_if_and_until_when():
    for section in re.split(r"^### ", PAGE.read_text(), flags=re.M)[1:]:
        title = section.splitlines()[0]
        assert re.search(r"`(vllm\.[\w.]+)`", section), f"{title}: of which name of vLLM's does it speak?"
        for part in ("* **Why.**", "* **If vLLM changes it.**", "* **Can go**"):
            assert part in section, f"{title} lacks {part}"


def test_touching_is_seen():
    module = Module.__new__(Module)
    module.path, module.tree = (
        Path("x.py"),
        ast.parse(
            """
import vllm.envs
from vllm.config import VllmConfig as C

class K:
    def __init__(self, other):
        self._mine, other.theirs = 1, 2
        self._mine, self._inherited, other._private

def put(owner, name, value):
    setattr(owner, name, value)

put(1, "literal", 2)
setattr(1, "direct", 2)
"""
        ),
    )
    assert module.imported == {"vllm.envs", "vllm.config.VllmConfig"}
    assert module.assigned == {"theirs", "literal", "direct"}
    assert module.private == {"_inherited", "_private"}
