"""Attention modules that arrange their queries, keys and values in the ways that models do, and in others."""

from types import SimpleNamespace

import torch
from torch import nn

from xquant_vllm.plugin.load.modules import DenseLinear

HEADS, KV_HEADS, HEAD_SIZE, HIDDEN = 4, 2, 16, 48
Q_SIZE, KV_SIZE = HEADS * HEAD_SIZE, KV_HEADS * HEAD_SIZE
ROWS = Q_SIZE + 2 * KV_SIZE


def linear(rows: int, like: SimpleNamespace | None = None, width: int = HIDDEN) -> DenseLinear:
    return DenseLinear(torch.randn(rows, width), torch.randn(rows), like)


TENSOR = SimpleNamespace(return_bias=False, skip_bias_add=False)
BIAS_APART = SimpleNamespace(return_bias=True, skip_bias_add=True)


class FakeAttention(nn.Module):
    """What is read from vLLM's attention layer."""

    def __init__(self, num_heads: int = HEADS) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_size, self.head_size_v = num_heads, KV_HEADS, HEAD_SIZE, HEAD_SIZE
        model_config = SimpleNamespace(max_model_len=1024)
        self.impl = SimpleNamespace(vllm_config=SimpleNamespace(model_config=model_config))

    def forward(self, query, key, value):
        return query


class Fused(nn.Module):
    """One linear layer, whose rows are queries, keys and values one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kernel = FakeAttention()
        self.mixer = linear(ROWS)

    def split(self, hidden_states):
        return self.mixer(hidden_states)[0].split([Q_SIZE, KV_SIZE, KV_SIZE], -1)

    def forward(self, positions, hidden_states):
        return self.kernel(*self.split(hidden_states))


class Permuted(Fused):
    """Rows in any order."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(seed))

    def split(self, hidden_states):
        return self.mixer(hidden_states)[0][:, self.order].split([Q_SIZE, KV_SIZE, KV_SIZE], -1)


class Grouped(Fused):
    """The query heads of a group, its key head, its value head (InternLM2)."""

    def split(self, hidden_states):
        groups = self.mixer(hidden_states)[0].view(-1, KV_HEADS, HEADS // KV_HEADS + 2, HEAD_SIZE)
        query, key, value = groups.split([HEADS // KV_HEADS, 1, 1], -2)
        return query.reshape(-1, Q_SIZE), key.reshape(-1, KV_SIZE), value.reshape(-1, KV_SIZE)


class PerHead(Fused):
    """Query, key and value of a head, then those of the next (GPT-NeoX), transposed on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = FakeAttention(KV_HEADS)
        self.mixer = linear(3 * KV_SIZE)

    def split(self, hidden_states):
        heads = self.mixer(hidden_states)[0].view(-1, KV_HEADS, 3 * HEAD_SIZE).transpose(0, 1)
        return [x.transpose(0, 1).reshape(-1, KV_SIZE) for x in heads.chunk(3, -1)]


class ByChannel(Fused):
    """Channels of keys and of values take turns."""

    def split(self, hidden_states):
        query, pairs = self.mixer(hidden_states)[0].split([Q_SIZE, 2 * KV_SIZE], -1)
        return query, pairs[:, ::2], pairs[:, 1::2]


class Separate(Fused):
    """A linear layer each, in a module of their own, that return tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = nn.Identity()
        sizes = {"q": Q_SIZE, "k": KV_SIZE, "v": KV_SIZE}
        self.own = nn.ModuleDict({letter: linear(size, TENSOR) for letter, size in sizes.items()})

    def split(self, hidden_states):
        return [self.own[letter](hidden_states) for letter in "qkv"]


class BiasLater(Fused):
    """Adds the bias itself, in place (Falcon)."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = linear(ROWS, BIAS_APART)

    def split(self, hidden_states):
        qkv, bias = self.mixer(hidden_states)
        qkv += bias
        return qkv.split([Q_SIZE, KV_SIZE, KV_SIZE], -1)


LAYOUTS = [Fused, Permuted, Grouped, PerHead, ByChannel, Separate, BiasLater]
