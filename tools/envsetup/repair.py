"""Finds packages that an interrupted run left half installed, so that pip installs them anew."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path


def _is_whole(metadata: Path) -> bool:
    """Whether all files that a distribution's RECORD lists are there, each with its size."""
    record = metadata / "RECORD"
    if not record.exists() or not (metadata / "METADATA").exists():
        return False
    with record.open(newline="", encoding="utf-8") as lines:
        for row in csv.reader(lines):
            if not row or row[0].endswith(".pyc"):
                continue
            try:
                size = (metadata.parent / row[0]).stat().st_size
            except OSError:
                return False
            if len(row) > 2 and row[2] and int(row[2]) != size:
                return False
    return True


def forget_damaged(site_packages: Path) -> list[str]:
    """Remove the metadata of damaged distributions: pip then takes them for not installed.

    Returns:
        their names.
    """
    damaged = [path for path in sorted(site_packages.glob("*.dist-info")) if not _is_whole(path)]
    for path in damaged:
        shutil.rmtree(path)
    return [path.name.removesuffix(".dist-info") for path in damaged]


def drop_blank_lines(site_packages: Path, distribution: str) -> None:
    """Remove blank lines from a distribution's RECORD; readers of Python's package metadata trip over them."""
    for record in site_packages.glob(f"{distribution}-*.dist-info/RECORD"):
        lines = record.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.strip()]
        if kept != lines:
            record.write_text("\n".join(kept) + "\n", encoding="utf-8")
