"""The structs of a C header, as far as the interfaces of the kernels need: to compare them with ctypes' structs."""

import ctypes
import re
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2] / "csrc"

_KINDS = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "uint16_t": ctypes.c_uint16,
    "uint8_t": ctypes.c_uint8,
    "float": ctypes.c_float,
}


def header_structs(*headers: str) -> dict[str, list[tuple[str, str]]]:
    """Fields of the structs in headers below csrc, as (name, type); arrays have their length in the type.

    Structs of sizes are left out: they are not handed over.
    """
    structs = {}
    for header in headers:
        text = re.sub(r"//.*", "", (CSRC / header).read_text())
        for body, name in re.findall(r"typedef struct \{(.*?)\} (\w+);", text, re.DOTALL):
            if not name.endswith("_struct_size"):
                structs[name] = [field for part in body.split(";") if part.strip() for field in _fields(part)]
    return structs


def _fields(declaration: str) -> list[tuple[str, str]]:
    kind, names = re.fullmatch(r"\s*(?:const )?(\w+(?: ?\*)?)\s+(.+?)\s*", declaration, re.DOTALL).groups()
    fields = []
    for name, length in re.findall(r"(\w+)(\[\d+\])?(?:,\s*|$)", names):
        fields.append((name, kind + length))
    return fields


def assert_mirrored(structs: dict[str, type[ctypes.Structure]], headers: dict[str, list[tuple[str, str]]]) -> None:
    """Structs of ctypes have the fields of their C namesakes: names, order, types; pointers may be untyped."""
    for name, struct in structs.items():
        of_header = [(field, _kind(kind, structs)) for field, kind in headers[name]]
        of_ctypes = [(field, _pointerless(kind)) for field, kind in struct._fields_]
        assert of_ctypes == of_header, name


def _kind(kind: str, structs: dict[str, type[ctypes.Structure]]) -> object:
    if kind.endswith("*"):
        return ctypes.c_void_p
    kind, _, length = kind.rstrip("]").partition("[")
    element = _KINDS.get(kind) or structs[kind]
    return (element, int(length)) if length else element


def _pointerless(kind: type) -> object:
    if issubclass(kind, ctypes._Pointer):
        return ctypes.c_void_p
    return (kind._type_, kind._length_) if issubclass(kind, ctypes.Array) else kind
