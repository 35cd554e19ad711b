"""benchmarks/gpu/counts reads machine code rightly, and the served default's decode kernel stays within its budget."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.counts.pipes import A100, H100, pipe
from benchmarks.gpu.counts.sass import Instruction, SassError, executed, parse, token_loops
from benchmarks.gpu.counts.simulate import resident, simulate

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = json.loads((Path(__file__).parent / "gpu_budgets.json").read_text())
# A gain that is larger than this must be written down, so that it cannot be lost again unseen.
_UNWRITTEN = 0.05


@pytest.fixture(scope="module")
def counted():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.counts", "--served"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_others_read_is_there(counted):
    assert counted.keys() == BUDGETS.keys() | {"decode_speed_ipc25"}
    # 16-bit attention takes 2,954 clocks; the memory that latents of 4 bits need takes 796.
    assert counted["decode_speed_ipc25"] == pytest.approx(
        2954 / max(counted["decode_warp_instructions"] / 2.5, 796), 0.01
    )


@pytest.mark.parametrize("what", BUDGETS)
def test_the_served_default_stays_within_its_budget(what, counted):
    found, budget = counted[what], BUDGETS[what]
    assert found <= budget, f"{what}: {found} is more than {budget} of tests/benchmarks/gpu_budgets.json"
    assert found >= budget * (1 - _UNWRITTEN), f"{what}: {found}; write it into tests/benchmarks/gpu_budgets.json"


def _listing(*lines: str) -> str:
    """As nvdisasm prints it; encodings that stall for two clocks."""
    text = []
    for line in lines:
        if line.endswith(":"):
            text.append(line)
        else:
            text.append(f"        /*0000*/                   {line} ;        /* 0x0000000000000000 */")
            text.append("                                                   /* 0x000fc40000000000 */")
    return "\n".join(text)


NESTED = _listing(
    "MOV R1, R2", ".L_x_0:", "LDG.E R2, [R4]", ".L_x_1:", "HMMA.16816.F32 R8, R4, R6, R8", "@P0 BRA `(.L_x_1)",
    "FMNMX R3, R3, R8, !PT", "MUFU.EX2 R3, R3", "HMMA.16816.F32 R12, R4, R6, R12", "@!P1 BRA `(.L_x_0)", "EXIT",
)  # fmt: skip


def test_the_loop_over_tokens_is_that_with_a_softmax():
    code, loops = parse(NESTED)
    assert [instruction.opcode for instruction in code[:3]] == ["MOV", "LDG", "HMMA"]
    assert (code[3].predicate, code[3].stall, code[3].sets) == ("@P0", 2, (7, 7))
    (loop,) = token_loops(code, loops)
    assert (loop.first, loop.last) == (1, 7)
    assert sum(often for _, often in executed(code, loop, [5])) == 5 + 2 * 5


def test_a_loop_that_nobody_knows_of_is_not_counted_as_one_round():
    code, loops = parse(NESTED)
    with pytest.raises(SassError, match="1 loops inside, of"):
        executed(code, token_loops(code, loops)[0])


def _repeated(name: str, operands: str = "R1, R2, R3") -> list[tuple[Instruction, float]]:
    return [(Instruction(name, operands), 1.0)] * 64


@pytest.mark.parametrize(
    ("sm", "name", "operands", "per_clock"),
    [
        (H100, "FFMA", "R1, R2, R3, R4", 4.0),
        (A100, "FFMA", "R1, R2, R3, R4", 2.0),
        (H100, "IMAD", "R1, R2, R3, R4", 2.0),
        (H100, "LOP3.LUT", "R1, R2, R3", 2.0),
        (H100, "MUFU.EX2", "R1, R2", 0.5),
        (H100, "LDS.128", "R4, [R1]", 0.25),
        (H100, "SHFL.BFLY", "R1, R2, R3", 1.0),
        (A100, "HMMA.16816.F32", "R8, R4, R6, RZ", 0.5),
        (H100, "HGMMA.64x64x16.F32", "R24, gdesc[UR4], R24, gsb0", 4 / 32),
    ],
)
def test_a_full_pipe_has_the_published_rate(sm, name, operands, per_clock):
    found = simulate(_repeated(name, operands), sm, 4, 4, 40)
    assert found.issued == pytest.approx(per_clock, rel=0.05)


def test_products_that_add_to_each_other_take_turns():
    chain = simulate(_repeated("HMMA.16816.F32", "R8, R4, R6, R8"), A100, 1, 4, 40)
    assert chain.issued < 0.25


def test_a_scoreboard_holds_the_next_instruction_back():
    load = Instruction("LDG.E", "R2, [R4]", sets=(0, 7))
    use = Instruction("IADD3", "R3, R2, R2", waits=1)
    near, far = (simulate([(load, 1.0), (use, 1.0)], H100, 1, 4, latency).clocks for latency in (40, 480))
    assert far - near == pytest.approx(440, rel=0.05)


def test_programs_that_fit():
    assert resident(H100, 8, 246, 25088) == 1
    assert resident(H100, 4, 240, 64000) == 2
    assert resident(H100, 4, 64, 115000) == 2


def test_opcodes():
    names = {
        "IMAD.WIDE": "imad",
        "F2FP.BF16.F32.PACK_AB": "alu",
        "I2F.S8": "xu",
        "I2FP.F32.S32": "alu",
        "LDSM.16.M88.4": "lsu",
    }
    names |= {
        "UIADD3": "uniform",
        "BAR.SYNC": "other",
        "QGMMA.64x64x32": "tensor",
        "UTCHMMA": "tensor",
        "HADD2.F32": "fma",
    }
    assert {name: pipe(Instruction(name, "")) for name in names} == names
