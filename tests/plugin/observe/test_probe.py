"""When the quality probe compares, and what the summary says of it."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.attention.attention_cases import Spec, make_case
from xquant_vllm.plugin.load.report import load_notes
from xquant_vllm.plugin.observe import probe as probe_module
from xquant_vllm.plugin.observe.probe import QualityProbe, describe_probe, probe_of


class Seen:
    """In place of a board."""

    def __init__(self) -> None:
        self.numbers: list[tuple[str, int]] = []

    def add(self, metric, value, layer) -> None:
        assert value >= 0
        self.numbers.append((metric.name, layer))


@pytest.mark.parametrize(("share", "layers"), [(0.001, 30), (0.05, 30), (0.5, 4), (1, 3), (0.25, 18)])
def test_every_layer_has_its_turn_and_the_share_is_no_larger(share, layers):
    probe = QualityProbe(share, layers, Seen())
    calls = probe.every * layers
    chosen = [call % layers for call in range(calls) if probe.is_due()]
    assert sorted(chosen) == list(range(layers))
    assert len(chosen) / calls <= share
    assert math.gcd(probe.every, layers) == 1


def test_what_is_found_is_written_by_layer():
    board = Seen()
    case = make_case(Spec(seqs=((30, 30),)))
    impl = SimpleNamespace(
        scheme=SimpleNamespace(folded_value=None, format=SimpleNamespace(shape=SimpleNamespace(index=5)))
    )
    probe = QualityProbe(1, 1, board)
    probe.measure(impl, case.query, case.pages, case.plan, case.batch, case.inputs)
    names = ["xquant_probe_key_error", "xquant_probe_value_error", "xquant_probe_attention_divergence"]
    assert board.numbers == [(name, 5) for name in names]
    one = case.only(0, last=1)
    probe.measure(impl, one.query, one.pages, one.plan, one.batch, one.inputs)
    assert board.numbers[3:] == [(name, 5) for name in names[:2]]


class Config:
    """vLLM's; can be weakly referenced."""

    def __init__(self, share, device="cpu") -> None:
        self.additional_config = {"xquant": {"quality_probe": share}}
        self.model_config = SimpleNamespace(get_num_layers=lambda parallel: 30, model="none")
        self.parallel_config = None
        self.lora_config = None
        self.device_config = SimpleNamespace(device_type=device)
        self.compilation_config = Compilation()


class Compilation:
    """vLLM's; can be weakly referenced."""


@pytest.mark.parametrize(
    ("share", "device", "board", "said"),
    [
        (0, "cpu", True, "off"),
        (0.001, "cpu", True, "compares one of 1,001 calls of 30 layers"),
        (0.001, "cuda", True, "off, although it is set: it runs on CPUs only, as captured graphs leave it out"),
        (0.001, "cpu", False, "off, although it is set: without metrics nobody could read it"),
    ],
)
def test_the_summary_says_whether_it_runs(monkeypatch, share, device, board, said):
    monkeypatch.setattr(probe_module, "board_of", lambda config: Seen() if board else None)
    config = Config(share, device)
    load_notes(config.compilation_config).caches.append(SimpleNamespace(formats=[None] * 30))
    assert describe_probe(config) == said
    assert (probe_of(config) is None) == said.startswith("off")


def test_nothing_of_the_step_is_changed():
    case = make_case(Spec(seqs=((30, 30), (40, 1))))
    before = [x.clone() for x in (case.query, *case.pages, *case.inputs)]
    impl = SimpleNamespace(
        scheme=SimpleNamespace(folded_value=None, format=SimpleNamespace(shape=SimpleNamespace(index=0)))
    )
    QualityProbe(1, 1, Seen()).measure(impl, case.query, case.pages, case.plan, case.batch, case.inputs)
    for x, y in zip((case.query, *case.pages, *case.inputs), before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())
