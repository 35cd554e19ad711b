"""What `make bench-cpu` runs: how fast xquant is on this CPU, in five numbers, each against 16 bit in the same run.

The last line is a JSON object:

* ``decode_ratio_512``, ``decode_ratio_4096``: decode throughput of 8 sequences with so many tokens of context, 4 bits
  per head, relative to vLLM's CPU_ATTN on BF16 (bench_offline.py);
* ``kivi_ratio_512``: likewise of the KIVI cache;
* ``pressure_ratio``: total throughput over HTTP under a multi-turn load whose histories fit xquant's cache and not the
  16-bit one in the same memory (bench_serving.py);
* ``roof_fraction``: share of its binding roof that the attention operation alone reaches, the smaller of two contexts
  (bench_decode_attention.py).

All are medians of interleaved repeats. It takes 25 minutes on two cores that do nothing else.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import bench_decode_attention, bench_offline, bench_serving  # noqa: E402
from benchmarks.files import read_json  # noqa: E402

_METHOD = "xquant"
_CONTEXTS = (512, 4096)


def main() -> int:
    """Run all of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "bench-cpu", help="folder of the results")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding")
    parser.add_argument("--repeats", type=int, default=2, help="of the pressure load")
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder or hub name")
    options = parser.parse_args()
    out: Path = options.out
    attention = bench_decode_attention.main(["--bits", "4", "--out", str(out / "decode-attention.json")])
    decode = {}
    for context, methods in zip(_CONTEXTS, ([_METHOD, "kivi"], [_METHOD]), strict=True):
        file = out / f"offline-{context}.json"
        arguments = ["--model", options.model, "--contexts", str(context), "--methods", *methods, "--same-prompts"]
        decode[context] = bench_offline.main([*arguments, "--rounds", str(options.rounds), "--out", str(file)])
    file = out / "serving-pressure.json"
    arguments = ["--model", options.model, "--quick", "--repeats", str(options.repeats), "--out", str(file)]
    if bench_serving.main(arguments):
        return 1
    print(json.dumps(summary(attention, decode, read_json(file))))
    return 0


def summary(attention: dict[str, Any], decode: dict[int, dict[str, Any]], serving: dict[str, Any]) -> dict[str, Any]:
    """The five numbers; None of a method that this vLLM does not have."""
    short, long = _CONTEXTS
    fractions = [row["roof"] for row in attention["rows"] if row["variant"].startswith("xquant")]
    return {
        "decode_ratio_512": _decode_ratio(decode[short], _METHOD),
        "decode_ratio_4096": _decode_ratio(decode[long], _METHOD),
        "pressure_ratio": _median(serving["rows"], _METHOD, "throughput_ratio"),
        "roof_fraction": round(min(fractions), 3),
        "kivi_ratio_512": _decode_ratio(decode[short], "kivi"),
    }


def _decode_ratio(result: dict[str, Any], method: str) -> float | None:
    return _median(result["rows"], method, "decode_ratio")


def _median(rows: list[dict[str, Any]], method: str, key: str) -> float | None:
    found = [row[key]["median"] for row in rows if row["method"] == method]
    return round(found[0], 3) if found else None


if __name__ == "__main__":
    sys.exit(main())
