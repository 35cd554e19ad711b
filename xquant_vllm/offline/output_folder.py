"""The folder that ``xquant factorize`` writes: beside its place, then renamed."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.writable import check_new_folder, missing_parents
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE

_INDEX = "model.safetensors.index.json"
# Weights in other formats, which vLLM might prefer or load twice.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def check_output(out: Path, force: bool) -> None:
    """Refuse a folder that must not be replaced, or cannot be made; nothing is left behind.

    Args:
        out: its name.
        force: replace it.

    Raises:
        RefusedError: it names ``--out``, why, and what to do instead.
    """
    out = out.absolute()
    if out.is_symlink() and not out.exists():
        raise RefusedError(f"xquant: --out {out} is a link to what is not there; choose another name")
    if out.exists() and not out.is_dir():
        raise RefusedError(f"xquant: --out {out} is a file, and a folder is to be written; choose another name")
    if out.exists() and not force:
        raise RefusedError(f"xquant: --out {out} is already there; choose another name, or replace it with --force")
    if out.exists() and not (out / HEADER_FILE).exists() and any(out.iterdir()):
        raise RefusedError(
            f"xquant: --out {out} was not written by this command (it has no {HEADER_FILE}), so --force does not "
            "replace it; choose another name"
        )
    check_new_folder("--out", out)


@contextlib.contextmanager
def replaced_folder(out: Path, source: Path, force: bool) -> Iterator[Path]:
    """A new folder to fill; it takes its name when the block ends well, and is removed when it does not.

    Args:
        out: its name.
        source: the checkpoint's folder, which may be ``out`` itself.
        force: replace ``out``.

    Raises:
        RefusedError: ``out`` is there and must not be replaced, or cannot be made.
    """
    out = out.absolute()
    check_output(out, force)
    if source.resolve() in out.resolve().parents:
        raise RefusedError(f"xquant: --out {out} lies inside the checkpoint {source}; choose a folder outside of it")
    temporary, old = (out.parent / f".{out.name}.{kind}-{secrets.token_hex(4)}" for kind in ("new", "old"))
    with missing_parents(out):
        try:
            temporary.mkdir()
            yield temporary
            if out.exists():
                out.rename(old)
            try:
                temporary.rename(out)
            except BaseException:
                if old.exists():
                    old.rename(out)
                raise
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


def link_checkpoint(source: Path, folder: Path, weights: dict[str, Path]) -> None:
    """Hard-link a checkpoint's files, or copy those that cannot be linked.

    Args:
        source: the checkpoint; links in it (the Hugging Face cache is made of them) are resolved.
        folder: where to link to.
        weights: the file of every tensor. Without an index of these vLLM would take the factors for weights.
    """
    weight_files = {path.relative_to(source) for path in weights.values()}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if not path.is_file() or any(part.startswith(".") for part in name.parts) or _is_foreign(name, weight_files):
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path.resolve(), target)
        except OSError:
            shutil.copyfile(path, target)
    if not (folder / _INDEX).exists():
        weight_map = {name: path.relative_to(source).as_posix() for name, path in weights.items()}
        size = sum((source / file).stat().st_size for file in weight_files)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _is_foreign(name: Path, weight_files: set[Path]) -> bool:
    if name.suffix == ".safetensors":
        return name not in weight_files
    return name.name in (FACTORS_FILE, HEADER_FILE) or name.suffix in _OTHER_WEIGHTS
