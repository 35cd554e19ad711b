"""What the suite prints and writes."""

import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.layers import LLAMA_3

Row = Mapping[str, Any]

# Below this, launches and not the kernels decide how long a call takes.
_LEAST_JUDGED_US = 20.0
_STORE_TOKENS = 8192
_LONG_CONTEXT = 4096
_FOUR_BITS_PER_HEAD = ("allocated 4", "uniform 4")


def targets(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """What was to be reached, and whether it was: of every format the worst shape counts.

    ``reached`` is None where no shape was measured that is judged.
    """
    measured = [row for row in rows if row["kind"] == "xquant" and row.get("status") == "ok" and "label" not in row]
    stores = [row for row in measured if row["operation"] == "store" and row["batch"] == _STORE_TOKENS]
    decodes = [row for row in measured if row["operation"] == "decode" and row.get("floor_us", 0) >= _LEAST_JUDGED_US]
    long = [
        row
        for row in measured
        if row["operation"] == "decode"
        and row["model"] == LLAMA_3.name
        and row["format"] in _FOUR_BITS_PER_HEAD
        and row["query_len"] == 1
        and row["context"] >= _LONG_CONTEXT
    ]
    return [
        *_judged(f"store of {_STORE_TOKENS} tokens: at least 80% of copy bandwidth", stores, "share_of_roof", 0.8),
        *_judged("decode: at least 60% of its binding roof", decodes, "share_of_roof", 0.6),
        *_judged(
            "decode, latents per head at 4 bits, grouped queries, from 4K tokens on: faster than 16-bit attention",
            long,
            "speed_to_16_bit",
            1.0,
        ),
    ]


def _judged(target: str, rows: Sequence[Row], figure: str, least: float) -> list[dict[str, Any]]:
    of_variants: dict[str, list[Row]] = {}
    for row in rows:
        if figure in row:
            of_variants.setdefault(f"{row['model']}, {row['variant']}", []).append(row)
    if not of_variants:
        return [{"target": target, "of": "", "reached": None}]
    judged = []
    for variant, of_variant in of_variants.items():
        worst = min(of_variant, key=lambda row: row[figure])
        judged.append(
            {
                "target": target,
                "of": variant,
                "least": least,
                "worst": worst[figure],
                "at": worst["shape"] + (f", against {worst['compared_with']}" if least == 1.0 else ""),
                "shapes": len(of_variant),
                "reached": worst[figure] > least if least == 1.0 else worst[figure] >= least,
            }
        )
    return judged


def text(results: Mapping[str, Any]) -> str:
    """The results to be read."""
    lines = [f"{results['device']['name']}, seed {results['seed']}"]
    if results["label"]:
        lines.append(results["label"])
    lines += ["", *_checks(results["checks"]), "", *_roofs(results["roofs"]), ""]
    lines += [f"baseline {name}: {state}" for name, state in results["baselines"].items()]
    shapes: dict[str, list[Row]] = {}
    for row in results["timings"]:
        shapes.setdefault(row["shape"], []).append(row)
    for shape, rows in shapes.items():
        lines += ["", shape, *_table([_cells(row) for row in rows], _HEAD)]
    lines += ["", *_table([_target_cells(target) for target in results["targets"]], _TARGET_HEAD)]
    if results["left_out"]:
        lines += ["", "left out: " + "; ".join(results["left_out"])]
    return "\n".join(lines)


def _checks(checks: Sequence[Row]) -> list[str]:
    states: dict[str, int] = {}
    for check in checks:
        states[check["status"]] = states.get(check["status"], 0) + 1
    lines = ["checks: " + (", ".join(f"{count} {state}" for state, count in states.items()) or "none")]
    reasons: dict[str, int] = {}
    for check in checks:
        if check["status"] == "failed":
            lines.append(f"  failed: {check['name']} ({check['kernels']}): {check['reason']}")
        elif check["status"] != "passed":
            reasons[check["reason"]] = reasons.get(check["reason"], 0) + 1
    return lines + [f"  {count} x {reason}" for reason, count in reasons.items()]


def _roofs(roofs: Mapping[str, Any] | None) -> list[str]:
    if roofs is None:
        return ["roofs: not measured"]
    return [
        f"roofs: copy {roofs['copy_bytes_per_second'] / 1e12:.2f} TB/s (read + written), "
        f"BF16 products {roofs['matrix_flops_per_second'] / 1e12:.0f} TFLOP/s"
    ]


def line(row: Row) -> str:
    """A timing in one line."""
    if "us" not in row:
        return f"{row['variant']}: {row['status']}: {row['reason']}"
    parts = [f"{row['us']:.1f} us"]
    if "share_of_roof" in row:
        parts.append(f"{row['share_of_roof']:.0%} of {row['roof']}")
    if "speed_to_16_bit" in row:
        parts.append(f"{row['speed_to_16_bit']:.2f} x 16-bit")
    parts += [row["reason"]] if "reason" in row else []
    return f"{row['variant']}: {', '.join(parts)}" + (f" ({row['label']})" if "label" in row else "")


_HEAD = ("variant", "us", "(least - most)", "MB", "GFLOP", "floor us", "roof", "share", "speed to 16-bit", "")


def _cells(row: Row) -> list[str]:
    state = "" if row.get("status") == "ok" else f"{row.get('status')}: {row.get('reason')}"
    if "us" not in row:
        return [row["variant"], *[""] * 8, state]
    low, high = row["us_range"]
    return [
        row["variant"],
        f"{row['us']:.1f}",
        f"({low:.1f} - {high:.1f})",
        f"{row['bytes'] / 1e6:.1f}",
        f"{row['flops'] / 1e9:.1f}",
        f"{row['floor_us']:.1f}" if "floor_us" in row else "",
        row.get("roof", ""),
        f"{row['share_of_roof']:.0%}" if "share_of_roof" in row else "",
        f"{row['speed_to_16_bit']:.2f}" if "speed_to_16_bit" in row else "",
        "; ".join(part for part in (state, row.get("label", ""), *_method(row)) if part),
    ]


def _method(row: Row) -> list[str]:
    return ["launches included"] if row["method"] == "events" else []


_TARGET_HEAD = ("target", "of", "worst", "at", "shapes", "reached")


def _target_cells(target: Row) -> list[str]:
    reached = {None: "not measured", True: "yes", False: "no"}[target["reached"]]
    if target["reached"] is None:
        return [target["target"], "", "", "", "", reached]
    worst = f"{target['worst']:.2f}x" if target["least"] == 1.0 else f"{target['worst']:.0%}"
    return [target["target"], target["of"], worst, target["at"], str(target["shapes"]), reached]


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> list[str]:
    columns = list(zip(*[head, *rows], strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(re.match(r"[(\d]|$", cell) for cell in column[1:]) for column in columns]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in (head, *rows)
    ]


def as_json(results: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Strict JSON; numbers that are not finite become words."""
    return json.dumps(_finite(results), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def write(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write the results into a file named after the device, which is there as a whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", results["device"]["name"].lower()).strip("-")
    if results["label"]:
        name += "-tiny"
    path = folder / f"{name}.json"
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".new", dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(as_json(results, indent=1) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path
