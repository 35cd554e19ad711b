"""Data-free factors that were computed before, one content-addressed file per layer in the user's cache."""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from xquant_vllm.errors import FactorFileError, cause_of
from xquant_vllm.projection.factor_file import (
    FORMAT_VERSION,
    TensorWriter,
    read_tensors,
    refuse_other_than_files,
    tensor_bytes,
)
from xquant_vllm.scheme.factor_cache_folder import ABOUT, PART_SUFFIX, SUFFIX

logger = logging.getLogger("vllm.xquant_vllm")

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


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
        return self.folder / f"{digest.hexdigest()}{SUFFIX}"

    def load(self, path: Path, shapes: Shapes) -> dict[str, torch.Tensor] | None:
        """Read an entry, which is from now on the one that was used last; a corrupt one is deleted.

        Args:
            path: the entry.
            shapes: dtypes and shapes of its tensors by name.

        Returns:
            The tensors on the CPU, or None.
        """
        try:
            if not os.path.lexists(path):
                return None
            tensors = read_tensors(path, shapes, _read_checksums(path))
            with contextlib.suppress(OSError):  # a cache of another user, or on a disk that cannot be written
                os.utime(path)
            return tensors
        except FactorFileError as error:
            if not os.path.lexists(path):  # somebody has emptied the cache meanwhile
                return None
            logger.warning("xquant: the cached factors %s are computed anew, because the file %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def store(self, path: Path, tensors: Mapping[str, torch.Tensor], about: Mapping[str, Any] | None = None) -> None:
        """Write an entry under another name and give it its own: ranks may do this at the same time.

        The first one stays. Two that were computed apart differ in rounding, and who reads opens the file twice: for
        the checksums, and for what they are of.

        Args:
            path: where :meth:`path` says that it is kept.
            tensors: by their names.
            about: what they are of, as JSON, for people who look at the cache; the model that comes first is named.
        """
        shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        temporary = None
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".", suffix=PART_SUFFIX, dir=self.folder)
            os.close(handle)
            temporary = Path(name)
            checksums = {name: hashlib.sha256(tensor_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}
            metadata = {"sha256": json.dumps(checksums)}
            if about is not None:
                metadata[ABOUT] = json.dumps({**about, "created": int(time.time())})
            writer = TensorWriter(temporary, shapes, metadata)
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
