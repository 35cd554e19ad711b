"""Memory of a server's processes, by what it is mapped for, read from /proc."""

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path

MIB = 1 << 20
KINDS = ("heap", "anonymous", "files", "shared")


def processes(session: int) -> dict[int, str]:
    """Ids and names of the processes of a session that run."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        # A process may end while it is looked at.
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, _, of = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(of) == session and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
    return found


def engine_core(session: int) -> int | None:
    """The process that runs the model, or None."""
    return next((pid for pid, name in processes(session).items() if "EngineCore" in name), None)


def resident(session: int) -> dict[str, dict[str, float]]:
    """Name of a process -> MiB resident by kind, and of which "total"; processes of one name together."""
    found: dict[str, dict[str, float]] = {}
    for pid, name in processes(session).items():
        with contextlib.suppress(OSError):
            kinds = by_kind(Path(f"/proc/{pid}/smaps").read_text().splitlines())
            of = found.setdefault(_short(name), dict.fromkeys((*KINDS, "total"), 0.0))
            for kind, size in kinds.items():
                of[kind] += size
                of["total"] += size
    return found


def by_kind(smaps: Iterable[str]) -> dict[str, float]:
    """MiB resident by kind: malloc's main arena, other private memory, files and shared memory."""
    sizes = dict.fromkeys(KINDS, 0.0)
    kind = "anonymous"
    for line in smaps:
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            path = line.split(maxsplit=5)[5:]
            kind = _kind(path[0] if path else "", line.split()[1])
        elif line.startswith("Rss:"):
            sizes[kind] += int(line.split()[1]) / 1024
    return sizes


def _kind(path: str, permissions: str) -> str:
    if path == "[heap]":
        return "heap"
    if path.startswith("/dev/shm") or (permissions.endswith("s") and "/dev/zero" in path) or "memfd:" in path:
        return "shared"
    return "files" if path.startswith("/") else "anonymous"


def _short(name: str) -> str:
    if name.startswith("VLLM::"):
        return name
    return "resource tracker" if "resource_tracker" in name else "API server"


def growth(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What every process has more than before, in MiB."""
    nothing: dict[str, float] = {}
    return {
        name: {kind: round(size - before.get(name, nothing).get(kind, 0.0), 1) for kind, size in kinds.items()}
        for name, kinds in after.items()
    }


def total(sizes: dict[str, dict[str, float]]) -> float:
    """Of all processes."""
    return sum(kinds["total"] for kinds in sizes.values())
