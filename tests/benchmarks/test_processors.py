"""Speeds by processor, and what a result says of its machine."""

from benchmarks.cpu.machine import machine_facts, processor_facts
from benchmarks.cpu.processors import about, processors, table
from benchmarks.files import write_json

CPUINFO = """processor	: 0
vendor_id	: GenuineIntel
cpu family	: 6
model		: 207
model name	: INTEL(R) XEON(R) PLATINUM 8581C
flags		: fpu avx2 avx512f amx_bf16 avx512_bf16 sse

processor	: 1
model		: 1
flags		: none
"""


def test_processor_facts() -> None:
    facts = processor_facts(CPUINFO, "266240K\n")
    assert facts == {"processor": "INTEL(R) XEON(R) PLATINUM 8581C", "family": 6, "model": 207, "l3": "266240K",
                     "flags": ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]}  # fmt: skip
    assert about(facts) == "family 6, model 207; avx2 avx512f avx512_bf16 amx_bf16; 266240K of L3"


def test_nothing_is_known() -> None:
    facts = processor_facts("", "")
    assert facts["processor"]
    assert (facts["model"], facts["flags"], facts["l3"]) == (None, [], None)
    assert about(facts) == ""


def test_this_machine() -> None:
    assert {"processor", "flags", "l3", "threads", "commit"} <= machine_facts().keys()


def offline(processor: str, date: str, ratio: float, **changes) -> dict:
    row = {"method": "xquant", "context": 512, "decode_ratio": {"median": ratio, "low": ratio, "high": ratio}}
    return {"benchmark": "offline", "machine": {"processor": processor, "date": date}, "compiled": True,
            "model": "smollm2-135m-instruct", "rows": [row], **changes}  # fmt: skip


def test_the_worst_is_first_and_the_newest_counts(tmp_path) -> None:
    write_json(tmp_path / "cpu/a.json", offline("fast", "2026-01-02", 0.99))
    write_json(tmp_path / "cpu/b.json", offline("fast", "2026-01-01", 0.3))
    write_json(tmp_path / "cpu/deeper/c.json", offline("slow", "2026-01-01", 0.6))
    # Not of the default as it is served.
    write_json(tmp_path / "cpu/d.json", offline("fast", "2026-01-03", 0.1, model="another"))
    write_json(tmp_path / "cpu/e.json", offline("fast", "2026-01-03", 0.1, compiled=False))
    assert [(one.name, one.worst()) for one in processors(tmp_path)] == [("slow", 0.6), ("fast", 0.99)]
    assert "| fast |  |  | 0.99 (0.99-0.99) |  |  |" in table(tmp_path)


def test_one_name_for_two_processors(tmp_path) -> None:
    old, new = offline("a name", "2026-01-01", 0.9), offline("a name", "2026-01-02", 0.6)
    new["machine"] |= {"model": 173, "instruction_set": "amx"}
    write_json(tmp_path / "cpu/old.json", old)
    write_json(tmp_path / "cpu/new.json", new)
    assert [(one.about, one.worst()) for one in processors(tmp_path)] == [("model 173", 0.6), ("", 0.9)]
