"""The cache of factors that a server leaves behind: whole files, and the next server reads them."""

import json
from hashlib import sha256
from pathlib import Path

_READ = "factors cached, read in"


def entries(folder: Path) -> dict[str, str]:
    """Name of a file -> SHA-256 of its bytes, of all files below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in files}


def faults(folder: Path, before: dict[str, str], log: str) -> list[str]:
    """What is wrong with a cache after a kill and a restart.

    Args:
        folder: the cache.
        before: its :func:`entries` before the kill.
        log: of the server that was started again.
    """
    now = entries(folder)
    found = [f"{name} is new or changed" for name in now if now[name] != before.get(name)]
    found += [f"{name} is gone" for name in before if name not in now]
    found += [f"{name} is damaged" for name in now if not _is_whole(folder / name)]
    if not before:
        found.append("no factors were kept")
    elif _READ not in log:
        found.append("the server that was started again did not read them")
    return [f"the factor cache after the kill: {fault}" for fault in found]


def _is_whole(path: Path) -> bool:
    """Whether a file's tensors are those that its own checksums tell."""
    from safetensors import safe_open

    from xquant_vllm.projection.factor_file import tensor_bytes

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            checksums = json.loads((file.metadata() or {})["sha256"])
            found = {name: sha256(tensor_bytes(file.get_tensor(name))).hexdigest() for name in file.keys()}  # noqa: SIM118
    except Exception:  # whatever the file may be
        return False
    return bool(found) and found == checksums
