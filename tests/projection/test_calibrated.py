"""Calibrated bases per head: lossless with all channels, within the paper's bytes, better where the text says so."""

from itertools import pairwise

import pytest
import torch

from tests.projection.layer_texts import LayerText, fisher, layer_texts, relative
from xquant_vllm.codec.allocated import AllocatedFormat, dequantize_allocated, quantize_allocated
from xquant_vllm.codec.allocation import run_bytes
from xquant_vllm.codec.layout import StreamFormat
from xquant_vllm.codec.quantizer import dequantize, quantize
from xquant_vllm.evaluation.methods.baselines.paper_xquant import xquant_bytes
from xquant_vllm.projection import refit
from xquant_vllm.projection.basis import factorize
from xquant_vllm.projection.calibrated import CalibratedHeads, fit_heads, layer_budget

HEADS, HEAD_SIZE, HIDDEN = 2, 32, 96


def fit(text: LayerText, budget: int, dtype=torch.float32) -> CalibratedHeads:
    return fit_heads(text.seen, text.key, text.value, HEADS, budget, dtype)


def heads(flat: torch.Tensor) -> torch.Tensor:
    """``[num_tokens, heads * head_size]`` to ``[heads, num_tokens, head_size]``."""
    return flat.unflatten(1, (HEADS, -1)).transpose(0, 1)


def weighted_error(text: LayerText, read_keys: torch.Tensor, read_values: torch.Tensor) -> float:
    """What errors in ``[heads, num_tokens, head_size]`` of unseen tokens cost, by the gradients of unseen tokens."""
    total = 0.0
    for weight, gradient, read in (
        (text.key, text.unseen.key_gradient, read_keys),
        (text.value, text.unseen.value_gradient, read_values),
    ):
        errors = read.double() - heads(text.unseen.hidden @ weight.T).double()
        for error, of_head in zip(errors, heads(gradient), strict=True):
            total += ((error @ fisher(of_head)) * error).sum(1).mean().item()
    return total


def calibrated_error(text: LayerText, budget: int) -> float:
    fitted = fit(text, budget)
    read = []
    for basis, of_heads in ((fitted.key, fitted.key_runs), (fitted.value, fitted.value_runs)):
        latents = text.unseen.hidden @ basis.down
        decoded = [
            dequantize_allocated(*quantize_allocated(latent, runs), runs, HEAD_SIZE)
            for latent, runs in zip(latents, of_heads, strict=True)
        ]
        read.append(torch.stack(decoded) @ basis.up)
    return weighted_error(text, *read)


def data_free_error(text: LayerText, bits: int) -> tuple[float, int]:
    """With the bytes that it takes."""
    read, stored_bytes = [], 0
    for weight, outliers in ((text.key, 1), (text.value, 0)):
        basis = factorize(weight, HEADS, "head", outlier_channels=outliers, rotate=True, seed=0, dtype=torch.float32)
        latents = text.unseen.hidden @ basis.down
        read.append(dequantize(*quantize(latents, bits, HEAD_SIZE, outliers)) @ basis.up)
        stored_bytes += StreamFormat(HEADS, HEAD_SIZE, bits, HEAD_SIZE, outliers).bytes_per_token
    return weighted_error(text, *read), stored_bytes


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_nothing_is_lost_with_all_channels(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(refit, "_RIDGE", 1e12)  # what sinks read back as is another matter
    (text,) = layer_texts(1, HIDDEN, HEADS * HEAD_SIZE)
    fitted = fit(text, 40, dtype)
    for basis, weight in ((fitted.key, text.key), (fitted.value, text.value)):
        assert basis.down.shape == (HEADS, HIDDEN, HEAD_SIZE)
        assert (basis.down.dtype, basis.up.dtype) == (dtype, torch.float32)
        rebuilt = (basis.down.double() @ basis.up.double()).mT.flatten(0, 1)
        assert relative(rebuilt, weight.double()) < tolerance


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_and_scales_fit_the_budget_and_use_it(bits):
    (text,) = layer_texts(1, HIDDEN, HEADS * HEAD_SIZE)
    budget = layer_budget(HEADS, HEAD_SIZE, HIDDEN, bits, joint_kv=False)
    fitted = fit(text, budget)
    streams = [AllocatedFormat(HEAD_SIZE, runs) for runs in (fitted.key_runs, fitted.value_runs)]
    taken = sum(stream.bytes_per_token for stream in streams)
    assert taken <= budget
    # Bits come in units of four channels, and a head's budget in whole bytes.
    assert taken > budget - 4 * HEADS
    for key, value in zip(fitted.key_runs, fitted.value_runs, strict=True):
        assert run_bytes(key) + run_bytes(value) + 2 <= budget // HEADS


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_weighted_error_is_lower_than_that_of_as_many_bytes_without_a_text(bits):
    (text,) = layer_texts(1, HIDDEN, HEADS * HEAD_SIZE)
    data_free, as_many = data_free_error(text, bits)
    assert calibrated_error(text, as_many) < 0.5 * data_free


def test_more_bytes_lose_less():
    (text,) = layer_texts(1, HIDDEN, HEADS * HEAD_SIZE)
    errors = [calibrated_error(text, budget) for budget in (24, 40, 64, 100)]
    assert all(later < 0.7 * earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("keys_matter", [True, False])
def test_bits_go_where_an_error_costs_more(keys_matter):
    scales = {"key_gradient": 1.0, "value_gradient": 0.1} if keys_matter else {"key_gradient": 0.1}
    (text,) = layer_texts(1, HIDDEN, HEADS * HEAD_SIZE, **scales)
    fitted = fit(text, 40)
    for key, value in zip(fitted.key_runs, fitted.value_runs, strict=True):
        more, fewer = (key, value) if keys_matter else (value, key)
        assert run_bytes(more) > 1.5 * run_bytes(fewer)


def test_a_unit_of_the_gradients_does_not_matter():
    plain, scaled = (
        layer_texts(1, HIDDEN, HEADS * HEAD_SIZE, key_gradient=scale, value_gradient=scale)[0] for scale in (1.0, 64.0)
    )
    assert fit(plain, 40).key_runs == fit(scaled, 40).key_runs


def test_channels_are_ordered_by_what_they_are_worth():
    """Runs describe leading channels: those cost most if they are left out, by the gradients of unseen tokens."""
    (text,) = layer_texts(1, HIDDEN, HEADS * HEAD_SIZE)
    fitted = fit(text, 40)
    latents = text.unseen.hidden @ fitted.key.down
    for head in range(HEADS):
        cost = fisher(heads(text.unseen.key_gradient)[head])
        ups = fitted.key.up[head].double()
        lost = latents[head].double().square().mean(0) * ((ups @ cost) * ups).sum(1)
        start, of_runs = 0, []
        for _, channels in fitted.key_runs[head]:
            of_runs.append(lost[start : start + channels].mean().item())
            start += channels
        assert len(of_runs) > 1
        assert of_runs == sorted(of_runs, reverse=True)
        assert lost[start:].mean().item() < of_runs[-1]


def test_latents_have_unit_size_whatever_the_weights_are():
    (text,) = layer_texts(1, HIDDEN, HEADS * HEAD_SIZE)
    large = LayerText(100 * text.key, text.value / 100, text.seen, text.unseen)
    for basis in (fit(large, 40).key, fit(large, 40).value):
        size = (text.seen.hidden @ basis.down).square().mean(1).sqrt()
        assert torch.allclose(size, torch.ones_like(size), rtol=1e-4)


@pytest.mark.parametrize("tokens", [64, 8])
def test_a_short_text_and_gradients_of_nothing_lose_nothing(tokens, monkeypatch):
    monkeypatch.setattr(refit, "_RIDGE", 1e12)
    (text,) = layer_texts(1, HIDDEN, HEADS * HEAD_SIZE, tokens=tokens, value_gradient=0.0)
    fitted = fit(text, 40)
    for basis, weight in ((fitted.key, text.key), (fitted.value, text.value)):
        assert basis.down.isfinite().all()
        rebuilt = (basis.down.double() @ basis.up.double()).mT.flatten(0, 1)
        assert relative(rebuilt, weight.double()) < 1e-3


@pytest.mark.parametrize(
    ("sizes", "bits", "joint", "expected"),
    [
        # By hand: codes, and 4 bytes of scale and zero: for 128 tokens of a key channel, for 128 channels of a value.
        ((3, 64, 576), 2, False, 48 + 6 + 48 + 8),
        ((3, 64, 576), 3, False, 72 + 6 + 72 + 8),
        ((3, 64, 576), 2, True, 48 + 6 + 48 + 8),  # latents are narrower than the input
        ((8, 128, 4096), 4, False, 512 + 32 + 512 + 32),
        ((1, 256, 640), 2, False, 64 + 8 + 64 + 8),
        # Multi-head attention: the layer input.
        ((9, 64, 576), 2, True, 144 + 5 * 4),
        ((32, 128, 4096), 2, True, 1024 + 32 * 4),
        ((32, 128, 4096), 2, False, 2 * (1024 + 128)),
    ],
)
def test_the_budget_is_the_papers_bytes(sizes, bits, joint, expected):
    kv_heads, head_size, hidden_size = sizes
    assert layer_budget(*sizes, bits, joint_kv=joint) == expected
    if joint or kv_heads * head_size < hidden_size:
        assert xquant_bytes(hidden_size, kv_heads * head_size, bits) == expected
