"""What a text shows of every layer: its inputs and the gradients of its keys and values, on the transformers model."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xquant_vllm.errors import RefusedError, counted
from xquant_vllm.offline.calibration.attention_modules import attention_modules, norm_eps
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.memory import warn_of_memory
from xquant_vllm.offline.progress import counted_bar, say
from xquant_vllm.projection.calibration import LayerSample
from xquant_vllm.projection.factor_file import dtype_name

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
        samples = _collect(checkpoint, batch, device)
        _last.clear()
        _last[asked] = samples
    return _last[asked]


def _collect(checkpoint: Checkpoint, batch: torch.Tensor, device: torch.device) -> list[LayerSample]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    # What it says of weights and generation is not about this, and one bar is enough.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Statistics need no more than bfloat16, but many CPUs are much slower at it.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    # By itself transformers takes PyTorch's attention, which knows of no caps on scores, wherever a model allows it.
    attention = "eager" if text_config.get("attn_logit_softcapping") else None
    warn_of_memory(checkpoint, dtype, device, "calibrating", "Set --device cuda, or do without calibration")
    say(f"loading {checkpoint.name} in {dtype_name(dtype)} to calibrate on {counted(batch.numel(), 'token')}")
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # whatever a model's own code raises
        raise checkpoint.cannot_run(
            error, "calibrated; leave --calibration out for bases from the weights alone"
        ) from None
    model = model.to(device).eval().requires_grad_(False)
    generator = torch.Generator(device=device).manual_seed(_SEED)
    observers = [
        _Observer(module, checkpoint.keys_normed_together(layer))
        for layer, module in enumerate(attention_modules(model, checkpoint))
    ]
    with ExitStack() as hooks:
        hooks.enter_context(model.get_input_embeddings().register_forward_hook(_require_gradient))
        for observer in observers:
            observer.hook(hooks)
        for sequence in counted_bar(batch.to(device), len(batch), "calibrate", "sequence"):
            with torch.enable_grad():
                logits = model(input_ids=sequence.unsqueeze(0), use_cache=False).logits[0].float()
                log_probabilities = logits.log_softmax(-1)
                drawn = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
                loss = log_probabilities.gather(-1, drawn).sum()
                outputs = [output for observer in observers for output in observer.outputs()]
                gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
            for observer in observers:
                observer.take([next(gradients) for _ in observer.outputs()], checkpoint)
    return [observer.sample() for observer in observers]


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
        self._outputs: list[torch.Tensor] = []
        self._normed: list[torch.Tensor] = []
        self._factors: list[torch.Tensor] = []
        self._hidden: list[torch.Tensor] = []
        self._gradients: list[tuple[torch.Tensor, torch.Tensor]] = []

    def hook(self, hooks: ExitStack) -> None:
        """Start to see; ``hooks`` ends it."""
        for projection in self._projections:
            hooks.enter_context(projection.register_forward_hook(self._see))  # type: ignore[arg-type]
        if self._norm is not None:
            hooks.enter_context(self._norm.register_forward_hook(self._see_norm))

    def outputs(self) -> list[torch.Tensor]:
        """What the projections have yielded, and behind that a norm over all key heads together.

        Raises:
            RefusedError: they were not called once each, or nothing could tell a gradient of theirs.
        """
        outputs = [*self._outputs, *self._normed]
        known = [output for output in outputs if output.requires_grad]
        if len(known) != len(outputs) or len(self._outputs) != len(self._projections):
            raise self._refusal()
        if len(self._normed) != (self._norm is not None):
            raise self._refusal()
        return outputs

    def take(self, gradients: list[torch.Tensor | None], checkpoint: Checkpoint) -> None:
        """The gradients of :meth:`outputs` for one sequence."""
        known = [gradient.flatten(0, -2) for gradient in gradients if gradient is not None]
        if len(known) != len(gradients):
            raise self._refusal()
        flat = torch.cat(known[: len(self._projections)], -1)
        rows = checkpoint.kv_heads * checkpoint.head_size
        keys, values = flat[:, -2 * rows : -rows], flat[:, -rows:]
        if self._norm is not None:
            keys = known[-1] * self._norm.weight
        self._gradients.append((keys, values))
        self._outputs, self._normed = [], []

    def sample(self) -> LayerSample:
        """All sequences."""
        keys, values = zip(*self._gradients, strict=True)
        factor = torch.cat(self._factors) if self._factors else None
        return LayerSample(torch.cat(self._hidden), torch.cat(keys), torch.cat(values), factor)

    def _see(self, module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if module is self._projections[0]:
            self._hidden.append(inputs[0].detach().flatten(0, -2))
        self._outputs.append(output)

    def _see_norm(self, _: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        keys = inputs[0].detach().flatten(0, -2).float()
        self._factors.append(torch.rsqrt(keys.square().mean(-1) + norm_eps(self._norm)))
        self._normed.append(output)

    def _refusal(self) -> RefusedError:
        return RefusedError(
            f"xquant: {self._name} cannot be calibrated: what its key and value projections yield does not reach the "
            "model's predictions; leave --calibration out for bases from the weights alone"
        )
