"""A transformers model, run so that its head, which is as wide as the vocabulary, sees a few positions at a time."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


class SplitRun:
    """A causal language model run on a sequence up to its last hidden states.

    Attributes:
        hidden: the last hidden states ``[1, length, hidden_size]``; None where the model is not made of a body and a
            head that reads what the body yields. Then ``whole`` has all logits.
        whole: logits ``[length, vocabulary]``, or None.
    """

    def __init__(self, model: Any, sequence: torch.Tensor) -> None:
        """Run it.

        Args:
            model: a causal language model of transformers.
            sequence: token ids ``[length]``, on the model's device.
        """
        self._model, self._sequence = model, sequence
        body = model.base_model
        forward, seen = body.forward, []

        def run(*arguments: Any, **options: Any) -> Any:
            seen.append(forward(*arguments, **options))
            return _with_hidden(seen[0], seen[0].last_hidden_state[:, :1])

        with _replaced(body, run) if body is not model else nullcontext():
            output = model(input_ids=sequence.unsqueeze(0), use_cache=False)
        # A head that does not call the body, or not as it is: OPT's calls a part of it.
        self._found = seen[0] if seen else None
        self.hidden: torch.Tensor | None = seen[0].last_hidden_state if seen else None
        self.whole: torch.Tensor | None = None if seen else output.logits[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head makes of some last hidden states, as the model's own code does it: scales, caps and all.

        Args:
            hidden: ``[1, positions, hidden_size]``.

        Returns:
            ``[positions, vocabulary]``.
        """
        found = self._found
        with _replaced(self._model.base_model, lambda *_, **__: _with_hidden(found, hidden)):
            output = self._model(input_ids=self._sequence[: hidden.shape[1]].unsqueeze(0), use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits


@contextmanager
def _replaced(module: Any, forward: Any) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _with_hidden(output: Any, hidden: torch.Tensor) -> Any:
    return type(output)(**{**output, "last_hidden_state": hidden})
