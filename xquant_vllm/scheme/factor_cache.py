"""Data-free factors that were computed before, one content-addressed file per layer in the user's cache."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from xquant_vllm.errors import FactorFileError, cause_of
from xquant_vllm.projection.factor_file import (
    FORMAT_VERSION,
    TensorWriter,
    read_tensors,
    refuse_other_than_files,
    tensor_bytes,
)

logger = logging.getLogger("vllm.xquant_vllm")

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def cache_folder() -> Path | None:
    """``$XDG_CACHE_HOME/xquant_vllm``, or ``~/.cache/xquant_vllm``; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "xquant_vllm"
    except RuntimeError:  # no HOME, and no entry in the list of users
        return None


class FactorCache:
    """Files named after the SHA-256 of what they were computed from; nothing that happens to them is an error."""

    def __init__(self, folder: Path | None) -> None:
        """Keep files in ``folder``, made on first use; None keeps nothing, which is said once."""
        self.folder = folder
        self._complained = False
        if folder is None:
            self._complain("a home folder", "there is none: HOME is not set")

    def path(self, recipe: str, key_weight: torch.Tensor, value_weight: torch.Tensor) -> Path | None:
        """Where the factors of these weights are kept; None without a folder.

        Args:
            recipe: what is made of them.
            key_weight: ``[num_kv_heads * head_size, hidden_size]``, this rank's rows.
            value_weight: likewise.
        """
        if self.folder is None:
            return None
        digest = hashlib.sha256(f"{FORMAT_VERSION} {recipe} {tuple(key_weight.shape)} {key_weight.dtype}".encode())
        digest.update(tensor_bytes(key_weight))
        digest.update(tensor_bytes(value_weight))
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def load(self, path: Path, shapes: Shapes) -> dict[str, torch.Tensor] | None:
        """Read an entry; a corrupt one is deleted.

        Args:
            path: the entry.
            shapes: dtypes and shapes of its tensors by name.

        Returns:
            The tensors on the CPU, or None.
        """
        try:
            if not os.path.lexists(path):
                return None
            return read_tensors(path, shapes, _read_checksums(path))
        except FactorFileError as error:
            logger.warning("xquant: the cached factors %s are computed anew, because the file %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def store(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write an entry under another name and give it its own: ranks may do this at the same time.

        The first one stays. Two that were computed apart differ in rounding, and who reads opens the file twice: for
        the checksums, and for what they are of.
        """
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        temporary = None
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.folder)
            os.close(handle)
            temporary = Path(name)
            checksums = {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
            writer = TensorWriter(temporary, shapes, {"sha256": json.dumps(checksums)})
            writer.write(tensors)
            writer.close()
            _name_once(temporary, path)
        except OSError as error:
            self._complain(self.folder, error)
        finally:
            if temporary is not None:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)

    def _complain(self, folder: object, why: object) -> None:
        """Say once that nothing is kept."""
        if not self._complained:
            self._complained = True
            logger.warning(
                "xquant: factors cannot be kept in %s (%s), so they are computed at every start; make it "
                'writable, set XDG_CACHE_HOME, or set "factor_cache": false',
                folder,
                why,
            )


def _name_once(temporary: Path, path: Path) -> None:
    """Give a file its name, unless another has it."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        temporary.replace(path)


def _read_checksums(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    refuse_other_than_files(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return dict(json.loads((file.metadata() or {}).get("sha256", "{}")))
    except Exception as error:  # a header may claim anything, and the library answers with errors of several kinds
        raise FactorFileError(f"is truncated or no safetensors file ({cause_of(error)})") from None
