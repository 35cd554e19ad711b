"""When AMX is chosen, and that its instructions are in the library."""

import shutil
import subprocess

import pytest

from tests.cpu_kernels import has_kernels

if not has_kernels():
    pytest.skip("no kernels", allow_module_level=True)

from xquant_vllm.attention.cpu import library


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing")
def test_the_library_has_the_instructions() -> None:
    if library.tiles_refused() == "this build was made by a compiler without AMX":
        pytest.skip("the compiler lacks AMX")
    command = ["objdump", "-d", "--no-show-raw-insn", str(library.LIBRARY_PATH)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for instruction in (
        "ldtilecfg",
        "tilerelease",
        "tileloadd",
        "tilestored",
        "tdpbsud",
        "tdpbf16ps",
        "vcvtne2ps2bf16",
    ):
        assert instruction in listed, instruction


TILE, INT8, BFLOAT, VECTOR_BFLOAT, STATE = 1 << 24, 1 << 25, 1 << 22, 1 << 5, 3 << 17
REFUSALS = {
    "": (TILE | INT8 | BFLOAT, VECTOR_BFLOAT, STATE | 7, True),
    "the processor has no AMX": (INT8 | BFLOAT, VECTOR_BFLOAT, STATE, True),
    "the processor's AMX lacks INT8 or BF16": (TILE | INT8, VECTOR_BFLOAT, STATE, True),
    "the operating system does not save AMX's state": (TILE | INT8 | BFLOAT, VECTOR_BFLOAT, 1 << 17, True),
    "the kernel does not let this process use AMX": (TILE | INT8 | BFLOAT, VECTOR_BFLOAT, STATE, False),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_who_may_use_tiles(reason: str) -> None:
    said = library.library.xquant_cpu_why_no_tiles(*REFUSALS[reason])
    assert (said or b"").decode() == reason


def test_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    library.set_isa(None)
    assert library.isa() != "amx-emulated"
    assert (library.isa() == "amx") == (library.tiles_refused() is None)
    assert library.set_isa("amx") == (library.tiles_refused() is None)
    library.set_isa(None)
    monkeypatch.setattr(library, "tiles_refused", lambda: library.NO_TILES)
    assert library.describe() == library.isa()
    monkeypatch.setattr(library, "tiles_refused", lambda: "the kernel does not let this process use AMX")
    assert library.describe().endswith(" (not AMX: the kernel does not let this process use AMX)")
