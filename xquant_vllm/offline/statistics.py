"""Statistics of a text, layer by layer, in one forward pass of the transformers model."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from xquant_vllm.offline.attention_modules import attention_modules
from xquant_vllm.offline.checkpoint import Checkpoint
from xquant_vllm.offline.refused import RefusedError
from xquant_vllm.offline.texts import calibration_text, opening_tokens
from xquant_vllm.projection.calibration import (
    MomentAccumulator,
    ProjectionStatistics,
    key_importance,
    value_importance,
)

_SEQUENCE = 1024
_CHUNK = 512
_ATTENTION = "xquant_statistics"

OnLayer = Callable[[int, tuple[ProjectionStatistics, ProjectionStatistics], torch.Tensor], None]


def tokenize(checkpoint: Checkpoint, calibration: str, tokens: int, fewest: int) -> torch.Tensor:
    """Sequences spread evenly over the text.

    Args:
        checkpoint: whose tokenizer to use.
        calibration: a file, or ``python-docs``.
        tokens: how many to take at most.
        fewest: how many there must be.

    Returns:
        ``[sequences, length]``, int64. Each begins as the tokenizer begins a text.

    Raises:
        RefusedError: the text cannot be read or is too short.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    ids = tokenizer.encode(calibration_text(calibration), add_special_tokens=False, verbose=False)
    opening = opening_tokens(tokenizer)
    if len(ids) < fewest:
        raise RefusedError(
            f"xquant: --calibration {calibration} has {len(ids)} tokens, too few to say anything about a model; give "
            "a text of a few thousand words"
        )
    text_config = checkpoint.config.get("text_config") or checkpoint.config
    length = min(_SEQUENCE, tokens, len(ids) + len(opening), text_config.get("max_position_embeddings") or _SEQUENCE)
    step = length - len(opening)
    available = len(ids) // step
    count = max(1, min(tokens // length, available))
    starts = [step * (available * i // count) for i in range(count)]
    return torch.tensor([opening + ids[start : start + step] for start in starts])


def collect_statistics(checkpoint: Checkpoint, batch: torch.Tensor, device: torch.device, on_layer: OnLayer) -> None:
    """Run the model on a text and hand over each layer's statistics as soon as it has passed.

    Args:
        checkpoint: the checkpoint.
        batch: token ids ``[sequences, length]``.
        device: where to run.
        on_layer: called with the layer, the statistics of its keys and values, and its inputs ``[num_tokens,
            hidden_size]``, in order; nothing is kept after it.

    Raises:
        RefusedError: the model's attention is not recognized.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, AutoModel
    from transformers.masking_utils import sdpa_mask
    from transformers.utils import logging

    # The head is left out on purpose, and one bar is enough.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    # float16 overflows on CPUs in some models, and statistics need no more than bfloat16.
    dtype = torch.bfloat16 if stored == "bfloat16" else torch.float32
    model = AutoModel.from_pretrained(checkpoint.folder, dtype=dtype, attn_implementation=_ATTENTION)
    model = model.to(device).eval()
    observers = [
        _Observer(checkpoint, layer, module, on_layer)
        for layer, module in enumerate(attention_modules(model, checkpoint))
    ]
    with torch.no_grad():
        model(input_ids=batch.to(device), use_cache=False)
    for observer in observers:
        observer.check()


def _attend(module: Any, query: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    """The attention of transformers, seen by the module's observer."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module.xquant_observer.see_queries(query)
    return sdpa_attention_forward(module, query, *arguments, **options)


class _Observer:
    """Sees what enters one attention module and its queries; hands over statistics when it is done."""

    def __init__(self, checkpoint: Checkpoint, layer: int, module: Any, on_layer: OnLayer) -> None:
        self._checkpoint, self._layer, self._module, self._on_layer = checkpoint, layer, module, on_layer
        self._hidden: torch.Tensor | None = None
        self._query_square: torch.Tensor | None = None
        self._partners = torch.arange(checkpoint.head_size)
        self._done = False
        module.xquant_observer = self
        module.register_forward_pre_hook(self._before, with_kwargs=True)
        module.register_forward_hook(self._after)

    def check(self) -> None:
        """Refuse a model that never called this module's attention in a way that could be seen."""
        if not self._done:
            raise self._refusal("its queries could not be seen")

    def see_queries(self, query: torch.Tensor) -> None:
        """Take queries ``[sequences, heads, tokens, head_size]``, after norm and RoPE."""
        square = query.float().square().mean((0, 2))
        self._query_square = square.reshape(self._checkpoint.kv_heads, -1, square.shape[-1]).mean(1)

    def _before(self, _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        self._hidden = options["hidden_states"] if "hidden_states" in options else arguments[0]
        positions = options.get("position_embeddings")
        if positions is not None:
            self._partners = self._probe_partners(positions)

    def _after(self, *_: Any) -> None:
        if self._query_square is None or self._hidden is None:
            raise self._refusal("its queries could not be seen")
        hidden, square = self._hidden.flatten(0, -2), self._query_square
        self._hidden = self._query_square = None
        importances = (
            key_importance(square, self._partners.to(square.device), self._norm_weight()),
            value_importance(self._output_weight(), self._checkpoint.kv_heads, self._checkpoint.head_size),
        )
        statistics = []
        for weight, importance in zip(self._checkpoint.key_value(self._layer), importances, strict=True):
            accumulator = MomentAccumulator(weight.to(hidden.device))
            for chunk in hidden.split(_CHUNK):
                accumulator.add(chunk)
            statistics.append(ProjectionStatistics(accumulator.moment(), importance))
        self._done = True
        self._on_layer(self._layer, (statistics[0], statistics[1]), hidden)

    def _probe_partners(self, positions: Any) -> torch.Tensor:
        """Which channels RoPE mixes, asked of the model's own function: how they are paired differs by family."""
        rotate = getattr(sys.modules[type(self._module).__module__], "apply_rotary_pos_emb", None)
        try:
            cos, sin = positions
            size = self._checkpoint.head_size
            channels = torch.eye(size, dtype=cos.dtype, device=cos.device).reshape(1, size, 1, size)
            cos, sin = torch.full_like(cos[:1, :1], 0.6), torch.full_like(sin[:1, :1], 0.8)
            turned = rotate(channels, channels, cos, sin)[0].reshape(size, size)  # type: ignore[misc]
        except Exception as error:
            raise self._refusal(f"its RoPE could not be probed ({type(error).__name__}: {error})") from error
        turned.fill_diagonal_(0)
        partners = torch.arange(size, device=turned.device)
        return torch.where((turned != 0).any(1), (turned != 0).int().argmax(1), partners)

    def _norm_weight(self) -> torch.Tensor | None:
        norm, size = getattr(self._module, "k_norm", None), self._checkpoint.head_size
        if norm is None:
            return None
        weight = getattr(norm, "weight", None)
        if weight is None or weight.shape != (size,):
            raise self._refusal("its key norm is not one of every head")
        # What the norm makes of ones is its effective weight, whether it is stored as w or as w - 1.
        return norm(torch.ones(1, size, dtype=weight.dtype, device=weight.device))[0].float()

    def _output_weight(self) -> torch.Tensor:
        for name in ("o_proj", "out_proj"):
            output = getattr(self._module, name, None)
            if output is not None:
                return output.weight
        raise self._refusal("it has no output projection o_proj")

    def _refusal(self, why: str) -> RefusedError:
        return RefusedError(
            f"xquant: {type(self._module).__name__} of layer {self._layer} cannot be calibrated: {why}; leave "
            "--calibration out for bases from the weights alone"
        )
