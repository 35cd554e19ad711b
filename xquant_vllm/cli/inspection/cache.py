"""``xquant cache``: what is in the factor cache, and how it is emptied."""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xquant_vllm.cli.inspection.amounts import ago, amount
from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.scheme.factor_cache_entries import CacheEntry, cache_entries, remove
from xquant_vllm.scheme.factor_cache_folder import cache_folder


def list_cache(options: argparse.Namespace) -> None:
    """Print the entries, those of one model and one set of settings together.

    Args:
        options: what :mod:`xquant_vllm.cli.inspection.arguments` parsed.

    Raises:
        RefusedError: the folder cannot be read.
    """
    folder = _folder()
    entries = _entries(folder)
    groups = grouped(entries)
    size = sum(entry.size for entry in entries)
    if options.json:
        print(json.dumps({"folder": str(folder), "bytes": size, "files": len(entries), "entries": groups}, indent=1))
        return
    print(f"{folder}: {counted(len(entries), 'file')}, {amount(size)}")
    now = time.time()
    for group in groups:
        created = "unknown" if group["created"] is None else ago(now - group["created"])
        print(f"{group['model'] or ('left by processes that were killed' if group['parts'] else 'model not noted')}")
        if group["settings"] is not None:
            print(f"  settings: {_plain(group['settings'])}")
        layers = f"{counted(len(group['layers']), 'layer')} in " if group["layers"] else ""
        print(f"  {layers}{counted(group['files'], 'file')}, {amount(group['bytes'])}")
        print(f"  made: {created}; used last: {ago(now - group['last_used'])}")


def clear_cache(options: argparse.Namespace) -> None:
    """Remove entries.

    Args:
        options: what :mod:`xquant_vllm.cli.inspection.arguments` parsed.

    Raises:
        RefusedError: the folder cannot be read, or an entry cannot be removed; the others are.
    """
    folder = _folder()
    entries, now = _entries(folder), time.time()
    chosen = [
        entry
        for entry in entries
        if (options.older_than is None or now - entry.last_used > options.older_than)
        and (options.model is None or entry.is_of(options.model))
    ]
    if options.model is not None and not any(entry.is_of(options.model) for entry in entries):
        models = sorted({entry.model for entry in entries if entry.model is not None})
        known = f"it has entries of {', '.join(models)}" if models else "it has no entry that names its model"
        print(f"xquant: {folder} has nothing of {options.model}; {known}", file=sys.stderr)
    if options.dry_run:
        print(f"would remove {_said(chosen)} of {counted(len(entries), 'file')} in {folder}")
        return
    removed, failed = [], None
    for entry in chosen:
        try:
            if remove(entry):
                removed.append(entry)
        except OSError as error:
            failed = failed or error
    print(f"removed {_said(removed)} of {counted(len(entries), 'file')} in {folder}")
    if failed is not None:
        raise RefusedError(
            f"xquant: {failed.filename} cannot be removed ({failed.strerror}); run the command as the user whose cache "
            "it is"
        )


def grouped(entries: list[CacheEntry]) -> list[dict[str, Any]]:
    """Entries of one model and one set of settings together, as JSON, those that were used last first.

    Each has ``model``, ``settings``, ``layers``, ``files``, ``bytes``, ``created`` (seconds since 1970, of the oldest;
    None where that was not noted), ``last_used`` (of the newest) and ``parts``: whether it is what is left of entries.
    """
    groups: dict[str, list[CacheEntry]] = {}
    for entry in entries:
        key = json.dumps([entry.part, entry.model, entry.about.get("settings")], sort_keys=True)
        groups.setdefault(key, []).append(entry)
    described = [_described(group) for group in groups.values()]
    return sorted(described, key=lambda group: -group["last_used"])


def _described(group: list[CacheEntry]) -> dict[str, Any]:
    created = [entry.about["created"] for entry in group if isinstance(entry.about.get("created"), int | float)]
    layers = {entry.about["layer"] for entry in group if isinstance(entry.about.get("layer"), int)}
    return {
        "model": group[0].model,
        "settings": group[0].about.get("settings"),
        "layers": sorted(layers),
        "files": len(group),
        "bytes": sum(entry.size for entry in group),
        "created": min(created, default=None),
        "last_used": max(entry.last_used for entry in group),
        "parts": group[0].part,
    }


def _folder() -> Path:
    folder = cache_folder()
    if folder is None:
        raise RefusedError("xquant: there is no cache: HOME is not set; set HOME or XDG_CACHE_HOME")
    return folder


def _entries(folder: Path) -> list[CacheEntry]:
    try:
        return cache_entries(folder)
    except OSError as error:
        raise RefusedError(
            f"xquant: the cache {folder} cannot be read ({error.strerror}); set XDG_CACHE_HOME to where it is"
        ) from None


def _said(entries: list[CacheEntry]) -> str:
    return f"{counted(len(entries), 'file')} ({amount(sum(entry.size for entry in entries))})"


def _plain(settings: Any) -> str:
    if not isinstance(settings, Mapping):
        return json.dumps(settings)
    words = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
    return ", ".join(f"{name} {value}" for name, value in words.items())
