"""What ``xquant eval`` evaluates, whatever the task: a model, a method, and what yields their logits."""

import argparse
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from xquant_vllm.cli.vllm_folder import vllm_folder
from xquant_vllm.errors import RefusedError
from xquant_vllm.evaluation.engines.offline_engine import OfflineEngine
from xquant_vllm.evaluation.engines.vllm_engine import serve, vllm_version
from xquant_vllm.evaluation.methods.method_names import SERVED_METHODS
from xquant_vllm.evaluation.methods.method_options import MethodOptions
from xquant_vllm.evaluation.methods.methods import bytes_16bit, prepare_method
from xquant_vllm.evaluation.methods.prepared_method import PreparedMethod
from xquant_vllm.evaluation.model.logits import Engine, Logits
from xquant_vllm.evaluation.tasks.kept_scores import KeptScores, Score, model_fingerprint
from xquant_vllm.evaluation.tasks.result import versions
from xquant_vllm.offline.checkpoint import Checkpoint, open_checkpoint
from xquant_vllm.offline.memory import warn_of_memory
from xquant_vllm.offline.tokenizer import load_tokenizer
from xquant_vllm.projection.factor_file import DTYPES
from xquant_vllm.scheme.factor_conflicts import factors_in


class Subject:
    """A model and a method.

    Attributes:
        checkpoint: the model.
        through_vllm: whether vLLM yields the logits.
        method: the method, once it is settled; its bytes are those of vLLM's pages, once there are any.
    """

    method: PreparedMethod

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the model.

        Args:
            options: what :mod:`xquant_vllm.cli.eval_arguments` parsed.

        Raises:
            RefusedError: the model or an option cannot be used.
        """
        if options.device == "cuda" and not torch.cuda.is_available():
            raise RefusedError("xquant: --device cuda: PyTorch sees no GPU; leave the option out to compute on the CPU")
        self._options, self._device = options, torch.device(options.device)
        self.through_vllm: bool = options.through == "vllm"
        self.checkpoint: Checkpoint = open_checkpoint(options.model)
        if self.through_vllm:
            _check_servable(options, self.checkpoint)
        self._folder = self.checkpoint.folder
        self._server_settings: dict[str, Any] | None = None
        self._open = ExitStack()

    def __enter__(self) -> "Subject":
        """For use in ``with``: what was made for the evaluation is removed at its end."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove it."""
        self._open.close()

    def check_length(self, option: str, num_tokens: int) -> None:
        """Refuse windows that are longer than the model has positions.

        Args:
            option: what sets their length.
            num_tokens: their length.

        Raises:
            RefusedError: it names the option.
        """
        config = self.checkpoint.config.get("text_config") or self.checkpoint.config
        positions = config.get("max_position_embeddings")
        if positions is None:
            return
        # vLLM insists on room for one token more.
        longest = positions - 1 if self.through_vllm else positions
        if num_tokens > longest:
            raise RefusedError(
                f"xquant: {option} {num_tokens} is longer than the {longest} positions of this model"
                f"{' that vLLM can fill' if self.through_vllm else ''}; set {longest} or less"
            )

    def prepare(self, num_tokens: int) -> None:
        """Settle the method, and calibrate it if it is to be.

        Args:
            num_tokens: tokens of the longest window.

        Raises:
            RefusedError: an option cannot work.
            SettingsError: a setting of the server cannot work.
            UnsupportedError: the server would refuse the method for this model.
        """
        name, dtype, options = self._options.method, self._options.dtype, self._method_options()
        checkpoint = self.checkpoint
        if self.through_vllm and name != "16bit":
            self._server_settings = options.server_settings(name)
            self._folder = self._open.enter_context(vllm_folder(checkpoint, name, options, dtype))
            if self._folder != checkpoint.folder:
                # There it is calibrated already.
                checkpoint = open_checkpoint(str(self._folder))
                options = dataclasses.replace(options, calibration=None, calibration_tokens=None)
        self.method = prepare_method(name, options, checkpoint, DTYPES[dtype], num_tokens, self._device)

    @property
    def about(self) -> dict[str, Any]:
        """The model and how it runs, for the result."""
        through = {"through": self._options.through}
        if self.through_vllm:
            through["vllm"] = vllm_version()
        return {
            "model": self._options.model if not Path(self._options.model).is_dir() else self.checkpoint.name,
            "dtype": self._options.dtype,
            "device": self._options.device,
            **through,
        }

    @property
    def bytes_16bit(self) -> int:
        """Bytes of a token's 16-bit keys and values in all layers."""
        return bytes_16bit(self.checkpoint)

    def tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            RefusedError: it has none.
        """
        return load_tokenizer(self.checkpoint)

    def kept_scores(self, task: str, kind: type[Score]) -> KeptScores[Score] | None:
        """Of ``--resume``.

        Args:
            task: what is scored.
            kind: class of the scores.
        """
        if self._options.resume is None:
            return None
        model = {**self.about, "model": model_fingerprint(self.checkpoint), "task": task, "versions": versions()}
        described = {"name": self.method.name, "bits": self.method.bits, "settings": self.method.settings}
        return KeptScores(self._options.resume, model, described, kind)

    @contextmanager
    def engine(self, windows: Sequence[torch.Tensor], unit: str = "window") -> Iterator[Engine]:
        """What yields logits; its model is loaded, so that the first window takes no longer than the others.

        Args:
            windows: ``[num_tokens]`` each; no others can be asked for. An engine that is asked for none is not started.
            unit: what a window is called.

        Raises:
            SettingsError: vLLM's side refuses the model or a setting.
            EngineError: vLLM failed.
        """
        options, dtype = self._options, DTYPES[self._options.dtype]
        if not self.through_vllm or not windows:
            offline = OfflineEngine(self.checkpoint, self.method, dtype, self._device)
            if windows:
                offline.load()
            yield offline
            return
        if not torch.cuda.is_available():
            warn_of_memory(self.checkpoint, dtype, self._device, "serving", "Set --dtype bfloat16")
        with serve(self._folder, self._server_settings, options.dtype, windows, unit) as engine:
            self.method = dataclasses.replace(self.method, bytes_per_token=engine.bytes_per_token)
            yield engine

    def candidate(self, engine: Engine) -> Logits | None:
        """The engine's logits with the method's cache; None if that is the 16-bit one."""
        return None if self.method.name == "16bit" else engine.candidate

    def _method_options(self) -> MethodOptions:
        options = self._options
        return MethodOptions(
            bits=None if options.bits is None else tuple(options.bits),
            group_size=options.group_size,
            residual=options.residual,
            basis=options.basis,
            settings=options.settings,
            calibration=options.calibration,
            calibration_tokens=options.calibration_tokens,
        )


def _check_servable(options: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Refuse what vLLM cannot do."""
    servable = ("16bit", *SERVED_METHODS)
    if options.method not in servable:
        raise RefusedError(
            f"xquant: --through vllm serves no --method {options.method}, which is a baseline of the offline "
            f"evaluation; leave --through out, or set one of {', '.join(servable)}"
        )
    if vllm_version() is None:
        raise RefusedError("xquant: --through vllm: vLLM is not installed; install it, or leave the option out")
    if options.device != "cpu":
        raise RefusedError(
            f"xquant: --device {options.device} has no use with --through vllm, which decides; leave it out"
        )
    header = factors_in(checkpoint.folder)
    if header is not None and options.method != "16bit" and header.dtype != options.dtype:
        raise RefusedError(
            f"xquant: --dtype {options.dtype} cannot work with --through vllm: {checkpoint.folder} has factors for "
            f"{header.dtype}; set --dtype {header.dtype}"
        )
