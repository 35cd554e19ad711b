"""Whether a library of kernels was built from the structs that Python hands it.

A library that was left from another version of this package would read fields where they no longer are. So each says
how large its structs are, and what loads it compares. tests/attention/cpu/test_abi.py compares names and types of
the fields as well, against the C headers.
"""

import ctypes
from collections.abc import Mapping


class StructSize(ctypes.Structure):
    """``xquant_struct_size``."""

    _fields_ = [("name", ctypes.c_char_p), ("size", ctypes.c_int64)]


def struct_sizes(library: ctypes.CDLL, function: str) -> dict[str, int]:
    """Sizes in bytes of a library's structs, by their C names; none if it is older than this check.

    Args:
        library: the library.
        function: which of its functions returns them, up to one without a name.
    """
    if not hasattr(library, function):
        return {}
    table = getattr(library, function)
    table.restype = ctypes.POINTER(StructSize)
    rows = table()
    sizes: dict[str, int] = {}
    while rows[len(sizes)].name is not None:
        row = rows[len(sizes)]
        sizes[row.name.decode()] = int(row.size)
    return sizes


def check_structs(
    library: ctypes.CDLL, function: str, structs: Mapping[str, type[ctypes.Structure]], rebuild: str
) -> None:
    """Refuse a library with other structs.

    Args:
        library: the library.
        function: see :func:`struct_sizes`.
        structs: what Python hands it, by the structs' C names.
        rebuild: the command that builds the library, for the message.

    Raises:
        OSError: a struct has another size there, or none; the message names it.
    """
    sizes = struct_sizes(library, function)
    for name, struct in structs.items():
        ours, theirs = ctypes.sizeof(struct), sizes.get(name)
        if theirs != ours:
            found = "an unknown size" if theirs is None else f"{theirs} bytes"
            raise OSError(
                f"{library._name} is of another version of this package: its struct {name} has {found}, not {ours} "
                f"bytes; build it anew with `{rebuild}`, or install the package again"
            )
