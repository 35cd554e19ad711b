"""What `make bench-cpu` runs: how fast xquant is on this CPU, number by number, against 16 bit in the same run.

The last line is a JSON object. Of the default, latents per head at 4 bits:

* ``decode_ratio_512``, ``decode_ratio_4096``: decode throughput of 8 sequences with so many tokens of context, relative
  to vLLM's CPU_ATTN on BF16 (bench_offline.py); ``kivi_ratio_512``: likewise of the KIVI cache;
* ``pressure_ratio``: total throughput over HTTP under a multi-turn load whose histories fit xquant's cache and not the
  16-bit one in the same memory (bench_serving.py);
* ``attention_512``, ``attention_4096``: speed of the attention operation alone, relative to CPU_ATTN;
  ``roof_fraction``: share of its binding roof that it reaches, the smaller of the two (bench_decode_attention.py).

Of hot blocks (``--only hot`` measures these and the operation):

* ``hot_WHAT_512``, ``hot_WHAT_2048``: decode throughput with all blocks hot. ``x`` is X at 4 bits and ``cl`` XQuant-CL
  at 2, both on the model with multi-head attention; ``chain`` is the calibrated chain at 3 bits in groups of 4,
  ``joint`` calibrated joint latents at 4, ``head`` latents per head at 4, on the model with grouped queries;
* ``cold_x_512``, ``cold_cl_512``: X at 4 bits and XQuant-CL at 2 without a pool;
* ``capacity_cl``: tokens that XQuant-CL at 2 bits holds with the default pool, in times 16 bit, as vLLM counts them;
* ``ttft_prefix_hit``: time to the first token of a prefix hit of 1,536 tokens that are not hot, with the same cache, as
  a share of prefilling them with the 16-bit cache (bench_prefix_hit.py);
* ``pressure_cl``: like ``pressure_ratio``, of XQuant-CL at 2 bits with half of the memory as pool, under a load whose
  histories fit that.

All are medians of interleaved repeats.
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
from benchmarks.cpu import hot  # noqa: E402
from benchmarks.cpu.summary import CONTEXTS, METHOD, default_numbers, operation_numbers  # noqa: E402
from benchmarks.files import read_json  # noqa: E402
from benchmarks.models import ModelError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Run all of it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("default", "hot"), help="one part: the default method, or hot blocks")
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "bench-cpu", help="folder of the results")
    parser.add_argument("--rounds", type=int, default=5, help="of decoding")
    parser.add_argument("--repeats", type=int, help="of the pressure loads (default 2, with --only hot 1)")
    parser.add_argument("--model", default=str(ROOT / "models" / "smollm2-135m-instruct"), help="folder or hub name")
    parser.add_argument("--mha-model", help="with multi-head attention (default: SmolLM2 with its kv heads repeated)")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (1 if options.only == "hot" else 2)
    attention = bench_decode_attention.main(["--bits", "4", "--out", str(options.out / "decode-attention.json")])
    numbers = operation_numbers(attention)
    try:
        if options.only != "hot":
            numbers = _default(options) | numbers
        if options.only != "default":
            numbers |= hot.measure(options.out, options.model, options.mha_model, options.rounds, options.repeats)
    except (hot.PartError, ModelError) as error:
        print(f"bench_cpu: {error}", file=sys.stderr)
        return 1
    print(json.dumps(numbers))
    return 0


def _default(options: argparse.Namespace) -> dict[str, Any]:
    out: Path = options.out
    decode = {}
    for context, methods in zip(CONTEXTS, ([METHOD, "kivi"], [METHOD]), strict=True):
        file = out / f"offline-{context}.json"
        arguments = ["--model", options.model, "--contexts", str(context), "--methods", *methods, "--same-prompts"]
        decode[context] = bench_offline.main([*arguments, "--rounds", str(options.rounds), "--out", str(file)])
    file = out / "serving-pressure.json"
    arguments = ["--model", options.model, "--quick", "--repeats", str(options.repeats), "--out", str(file)]
    if bench_serving.main(arguments):
        raise hot.PartError("the pressure load failed")
    return default_numbers(decode, read_json(file))


if __name__ == "__main__":
    sys.exit(main())
