"""What a text shows of every layer: its inputs and the gradients of its keys and values, on the transformers model."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.calibration.attention_modules import attention_modules, decoder_layers, norm_eps
from xquant_vllm.offline.calibration.frugal_model import compute_in, forget_activations, loss_gradient
from xquant_vllm.offline.calibration.kept_sequences import KeptSequences
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.memory import warn_of_memory
from xquant_vllm.offline.progress import counted_bar, say
from xquant_vllm.projection.calibration import LayerSample
from xquant_vllm.projection.factor_file import DTYPES, dtype_name

_SEED = 0


# The last ones: a comparison fits one model again and again, and the model's pass takes longer than the fit.
_last: dict[tuple[Path, torch.Size, bytes, torch.device], list[LayerSample]] = {}


def collect_samples(checkpoint: Checkpoint, batch: torch.Tensor, device: torch.device) -> list[LayerSample]:
    """Run the model on a text, forwards and backwards, or say again what was found the last time.

    The loss is the log-probability of tokens drawn from the model's own predictions, so that the gradients' second
    moment is the Fisher information.

    Args:
        checkpoint: the checkpoint.
        batch: token ids ``[sequences, length]``.
        device: where to run.

    Returns:
        A sample of every layer, on the device, in the dtype that the model ran in.

    Raises:
        RefusedError: transformers cannot run the model, or its attention is not recognized.
    """
    asked = (checkpoint.folder.resolve(), batch.shape, batch.numpy().tobytes(), device)
    if asked not in _last:
        shown: list[list[LayerSample]] = []
        _run(checkpoint, batch, device, lambda _: False, lambda _, samples: shown.append(samples))
        _last.clear()
        _last[asked] = [_joined(parts) for parts in zip(*shown, strict=True)]
    return _last[asked]


def collect_kept_samples(
    checkpoint: Checkpoint, batch: torch.Tensor, device: torch.device, folder: Path
) -> Iterator[LayerSample]:
    """The same by way of files, a sequence in each: those that are there are not computed again.

    Args:
        checkpoint: the checkpoint.
        batch: token ids ``[sequences, length]``.
        device: where to run.
        folder: of the files. It must not be used for another model, text or device.

    Returns:
        A sample of every layer, read as it is asked for. The model has run when this returns, and is gone.

    Raises:
        RefusedError: likewise.
        OSError: the disk is full, or the like.
    """
    kept = KeptSequences(folder)
    missing = [sequence for sequence in range(len(batch)) if not kept.has(sequence)]
    if len(missing) < len(batch):
        say(f"{counted(len(batch) - len(missing), 'sequence')} of {len(batch)} taken from {folder}")
    if missing:
        _run(checkpoint, batch, device, lambda sequence: sequence not in missing, kept.keep)
    return kept.samples(len(batch), checkpoint.layers, device)


def _joined(parts: Sequence[LayerSample]) -> LayerSample:
    """Several sequences, one after the other."""
    factors = [part.key_factor for part in parts if part.key_factor is not None]
    return LayerSample(
        torch.cat([part.hidden for part in parts]),
        torch.cat([part.key_gradient for part in parts]),
        torch.cat([part.value_gradient for part in parts]),
        torch.cat(factors) if factors else None,
    )


def _run(
    checkpoint: Checkpoint,
    batch: torch.Tensor,
    device: torch.device,
    known: Callable[[int], bool],
    take: Callable[[int, list[LayerSample]], None],
) -> None:
    """Hand over what every sequence that is not known shows of all layers."""
    instead = "Set --device cuda, or do without calibration"
    warn_of_memory(checkpoint, weights_dtype(checkpoint, device), device, "calibrating", instead)
    say(f"loading {checkpoint.name} in {dtype_name(_compute_dtype(device))} to calibrate on {_tokens(batch)}")
    model = _load(checkpoint, device)
    modules = attention_modules(model, checkpoint)
    forget_activations(decoder_layers(model, modules))
    observers = [_Observer(module, checkpoint.keys_normed_together(layer)) for layer, module in enumerate(modules)]
    with ExitStack() as hooks:
        hooks.enter_context(model.get_input_embeddings().register_forward_hook(_require_gradient))
        for observer in observers:
            observer.hook(hooks)
        for index, sequence in enumerate(counted_bar(batch.to(device), len(batch), "calibrate", "sequence")):
            if not known(index):
                take(index, _samples(model, sequence, observers, checkpoint, _SEED + index))
    # Its layers are in circles of references.
    del model, modules, observers
    gc.collect()


def _tokens(batch: torch.Tensor) -> str:
    return counted(batch.numel(), "token")


def _compute_dtype(device: torch.device) -> torch.dtype:
    """Statistics need no more than bfloat16, but many CPUs are much slower at it."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def weights_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """On a CPU as they are stored: half as large as what they are converted to, piece by piece."""
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    return DTYPES.get(stored, torch.float32) if device.type == "cpu" else _compute_dtype(device)


def _load(checkpoint: Checkpoint, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # What it says of weights and generation is not about this, and one bar is enough.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    # By itself transformers takes PyTorch's attention, which knows of no caps on scores, wherever a model allows it.
    attention = "eager" if text_config.get("attn_logit_softcapping") else None
    dtype = weights_dtype(checkpoint, device)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # whatever a model's own code raises
        raise checkpoint.cannot_run(
            error, "calibrated; leave --calibration out for bases from the weights alone"
        ) from None
    model = model.to(device).eval().requires_grad_(False)
    compute_in(model, _compute_dtype(device))
    return model


def _samples(
    model: Any, sequence: torch.Tensor, observers: list["_Observer"], checkpoint: Checkpoint, seed: int
) -> list[LayerSample]:
    """What one sequence shows of all layers."""
    generator = torch.Generator(device=sequence.device).manual_seed(seed)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        log_probabilities = logits.log_softmax(-1)
        drawn = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
        return log_probabilities.gather(-1, drawn).sum()

    for observer in observers:
        observer.begin()
    with torch.enable_grad():
        result, gradient = loss_gradient(model, sequence, loss)
        outputs = [output for observer in observers for output in observer.outputs()]
        gradients = iter(torch.autograd.grad(result, outputs, gradient, allow_unused=True))
    return [observer.sample([next(gradients) for _ in observer.outputs()], checkpoint) for observer in observers]


def _require_gradient(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    """Nothing before the embedding has one, and weights are frozen."""
    return output.requires_grad_(True)


class _Observer:
    """Sees what enters and leaves the key and value projections of one attention module."""

    def __init__(self, module: Any, keys_normed_together: bool) -> None:
        fused = getattr(module, "qkv_proj", None)
        self._projections: list[nn.Module] = [module.k_proj, module.v_proj] if fused is None else [fused]
        self._norm: Any = module.k_norm if keys_normed_together else None
        self._name = type(module).__name__
        self._seeing = False
        self._outputs: list[torch.Tensor] = []
        self._normed: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []
        self._factors: list[torch.Tensor] = []

    def begin(self) -> None:
        """A new sequence."""
        self._seeing, self._outputs, self._normed, self._hidden, self._factors = True, [], [], [], []

    def hook(self, hooks: ExitStack) -> None:
        """Start to see; ``hooks`` ends it."""
        for projection in self._projections:
            hooks.enter_context(projection.register_forward_hook(self._see))  # type: ignore[arg-type]
        if self._norm is not None:
            hooks.enter_context(self._norm.register_forward_hook(self._see_norm))

    def outputs(self) -> list[torch.Tensor]:
        """What the projections have yielded, and behind that a norm over all key heads together.

        What they yield from now on, when it is computed once more for gradients, is not looked at.

        Raises:
            RefusedError: they were not called once each, or nothing could tell a gradient of theirs.
        """
        self._seeing = False
        outputs = [*self._outputs, *self._normed]
        known = [output for output in outputs if output.requires_grad]
        if len(known) != len(outputs) or len(self._outputs) != len(self._projections):
            raise self._refusal()
        if len(self._normed) != (self._norm is not None):
            raise self._refusal()
        return outputs

    def sample(self, gradients: list[torch.Tensor | None], checkpoint: Checkpoint) -> LayerSample:
        """What was seen of the sequence, with the gradients of :meth:`outputs`."""
        known = [gradient.flatten(0, -2) for gradient in gradients if gradient is not None]
        if len(known) != len(gradients):
            raise self._refusal()
        flat = torch.cat(known[: len(self._projections)], -1)
        rows = checkpoint.kv_heads * checkpoint.head_size
        keys, values = flat[:, -2 * rows : -rows], flat[:, -rows:]
        if self._norm is not None:
            keys = known[-1] * self._norm.weight
        (hidden,), factor = self._hidden, self._factors[0] if self._factors else None
        return LayerSample(hidden, keys, values, factor)

    def _see(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not self._seeing:
            return
        if module is self._projections[0]:
            self._hidden.append(inputs[0].detach().flatten(0, -2))
        self._outputs.append(output)

    def _see_norm(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not self._seeing:
            return
        keys = inputs[0].detach().flatten(0, -2).float()
        self._factors.append(torch.rsqrt(keys.square().mean(-1) + norm_eps(self._norm)))
        self._normed.append(output)

    def _refusal(self) -> RefusedError:
        return RefusedError(
            f"xquant: {self._name} cannot be calibrated: what its key and value projections yield does not reach the "
            "model's predictions; leave --calibration out for bases from the weights alone"
        )
