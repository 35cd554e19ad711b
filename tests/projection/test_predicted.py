"""Predicted chains: the recursion that they stand for, lossless without quantization, less lost where layers agree."""

import pytest
import torch

from tests.projection.layer_texts import fisher, layer_texts, limited, relative
from xquant_vllm.codec.allocated import AllocatedFormat, dequantize_allocated, quantize_allocated
from xquant_vllm.codec.allocation import run_bytes
from xquant_vllm.projection import refit
from xquant_vllm.projection.calibration import GRADIENT_RIDGE, KEY_GRADIENT_RIDGE, KEY_WORTH
from xquant_vllm.projection.predicted import (
    PredictedChain,
    joint_kv_width,
    layers_of_groups,
    link_shapes,
    link_tensors,
)
from xquant_vllm.projection.rematerialize import up_project

HIDDEN, KV_HEADS, HEAD_SIZE = 80, 2, 16
ROWS = KV_HEADS * HEAD_SIZE
WIDTH = 2 * ROWS
BUDGET = 24


def fit(texts, anchors, dtype=torch.float32, budget=BUDGET):
    chain = PredictedChain(dtype)
    return [
        chain.add(text.seen, text.key, text.value, KV_HEADS, budget, anchor)
        for text, anchor in zip(texts, anchors, strict=True)
    ]


def serve(links, hiddens, round_trip):
    """What a server reads back: keys and values ``[num_tokens, rows]`` of every layer, with what the layers store."""
    stored, read, kept = [], [], []
    for (link, runs), hidden in zip(links, hiddens, strict=True):
        own = hidden @ link.down
        if link.prediction is None:
            stored = []
        else:
            own = own - torch.cat(stored, 1) @ link.prediction[0]
        stored.append(round_trip(own, runs))
        kept.append(stored[-1])
        latent = torch.cat(stored, 1).unsqueeze(1)
        read.append([up_project(latent, up).flatten(1) for up in (link.up_key, link.up_value)])
    return read, kept


@pytest.fixture
def without_sinks(monkeypatch):
    """What sinks read back as is another matter."""
    monkeypatch.setattr(refit, "_RIDGE", 1e12)


def exactly(latent, _):
    return latent


def quantized(latent, runs):
    return dequantize_allocated(*quantize_allocated(latent, runs), runs, latent.shape[1])


def errors(texts, anchors, round_trip=quantized, **options):
    """Of unseen tokens, keys and values together, in the measure of the Fisher information, relative to the layer."""
    links = fit(texts, anchors, **options)
    read, _ = serve(links, [text.unseen.hidden for text in texts], round_trip)
    result = []
    for text, pair in zip(texts, read, strict=True):
        wrong = whole = 0.0
        for weight, gradient, actual in zip(
            (text.key, text.value), (text.unseen.key_gradient, text.unseen.value_gradient), pair, strict=True
        ):
            expected, cost = (text.unseen.hidden @ weight.T).double(), fisher(gradient)
            error = actual.double() - expected
            wrong += ((error @ cost) * error).sum().item()
            whole += ((expected @ cost) * expected).sum().item()
        result.append((wrong / whole) ** 0.5)
    return result


@pytest.mark.parametrize("hidden_size", [HIDDEN, 40], ids=["latents narrower", "input narrower"])
@pytest.mark.parametrize("interval", [1, 3, 6])
def test_nothing_is_lost_without_quantization(hidden_size, interval, without_sinks):
    texts = layer_texts(6, hidden_size, ROWS)
    links = fit(texts, [layer % interval == 0 for layer in range(6)])
    assert {link.down.shape for link, _ in links} == {(hidden_size, min(hidden_size, WIDTH))}
    read, _ = serve(links, [text.unseen.hidden for text in texts], exactly)
    for text, (keys, values) in zip(texts, read, strict=True):
        assert relative(keys, text.unseen.hidden @ text.key.T) < 1e-4
        assert relative(values, text.unseen.hidden @ text.value.T) < 1e-4


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_the_rounding_of_down_projections_is_made_good(dtype, tolerance, without_sinks):
    texts = layer_texts(3, HIDDEN, ROWS)
    links = fit(texts, [True, False, False], dtype)
    assert {link.down.dtype for link, _ in links} == {dtype}
    links = [(type(link)(link.down.float(), link.up_key, link.up_value, link.prediction), runs) for link, runs in links]
    read, _ = serve(links, [text.unseen.hidden for text in texts], exactly)
    for text, (keys, values) in zip(texts, read, strict=True):
        assert relative(keys, text.unseen.hidden @ text.key.T) < tolerance
        assert relative(values, text.unseen.hidden @ text.value.T) < tolerance


@pytest.fixture
def one_thread():
    """Sums in one order: with two threads a number may lie on the other side of the boundary between two codes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_unrolled_matrices_are_the_recursion(one_thread, without_sinks):
    """``p = [y^ before] P``, ``y^ = p + s B^-1``: P from a least squares problem, y from a root of the information."""
    texts = layer_texts(6, HIDDEN, ROWS)
    links = fit(texts, [layer in (0, 5) for layer in range(6)])
    read, stored = serve(links, [text.seen.hidden for text in texts], quantized)
    decoded = []
    for layer, (text, (link, _)) in enumerate(zip(texts, links, strict=True)):
        columns = torch.cat((text.key, text.value)).double().T
        parts = [KEY_WORTH**0.5 * limited(text.seen.key_gradient), limited(text.seen.value_gradient)]
        gradient = torch.cat(parts, 1)
        cost = gradient.T @ gradient / len(gradient)
        ridges = (KEY_GRADIENT_RIDGE, GRADIENT_RIDGE)
        ridge = [of * part.square().mean().expand(ROWS) for of, part in zip(ridges, parts, strict=True)]
        # Not any root: the predictor's ridge is on single channels of y.
        root = torch.linalg.cholesky(cost + torch.diag(torch.cat(ridge)))
        exact = text.seen.hidden.double() @ columns @ root

        if link.prediction is None:
            decoded, predicted = [], torch.zeros_like(exact)
        else:
            known = torch.cat(decoded[-3:], 1)
            penalty = torch.diag(known.square().sum(0).mul(1e-2).sqrt())
            augmented = torch.cat((known, penalty))
            target = torch.cat((exact, torch.zeros(len(penalty), exact.shape[1], dtype=torch.float64)))
            predicted = known @ torch.linalg.lstsq(augmented, target).solution
        to_channels = torch.linalg.lstsq(columns @ root, link.down.double()).solution
        assert relative(quantized(((exact - predicted) @ to_channels).float(), links[layer][1]), stored[layer]) < 0.02
        decoded.append(predicted + torch.linalg.solve(to_channels.T, stored[layer].double().T).T)
        keys_and_values = torch.linalg.solve(root.T, decoded[-1].T).T
        assert relative(torch.cat(read[layer], 1).double(), keys_and_values) < 1e-3


def test_decoded_layers_predict_most_of_layers_like_them():
    """With nothing stored of a layer itself its keys and values are there but for what has changed."""

    def only_anchors(latent, runs):
        return latent * (runs is first)

    for change in (0.1, 0.3):
        # An input narrower than the latents, so that the first layer knows all of it.
        texts = layer_texts(2, 40, ROWS, change=change)
        links = fit(texts, [True, False], budget=WIDTH)
        first = links[0][1]
        read, _ = serve(links, [text.unseen.hidden for text in texts], only_anchors)
        for actual, weight in zip(read[1], (texts[1].key, texts[1].value), strict=True):
            assert 0.9 * change < relative(actual, texts[1].unseen.hidden @ weight.T) < 1.3 * change


def test_a_predicted_layer_loses_less_of_the_same_bytes():
    texts = layer_texts(5, HIDDEN, ROWS)
    chained = errors(texts, [layer == 0 for layer in range(5)])
    alone = errors(texts, [True] * 5)
    assert chained[0] == alone[0]
    for predicted, single in zip(chained[1:], alone[1:], strict=True):
        assert predicted < 0.75 * single


def test_layers_that_have_nothing_in_common_lose_hardly_more_in_a_chain():
    texts = layer_texts(4, HIDDEN, ROWS, change=1.0, tokens=800)
    chained = errors(texts, [layer == 0 for layer in range(4)])
    alone = errors(texts, [True] * 4)
    for predicted, single in zip(chained, alone, strict=True):
        assert predicted < 1.15 * single


def test_an_anchor_knows_nothing_of_what_was_before():
    texts = layer_texts(4, HIDDEN, ROWS)
    (*_, (link, runs), following) = fit(texts, [True, False, True, False])
    (alone, alone_runs), alone_following = fit(texts[2:], [True, False])
    assert link.prediction is None
    assert runs == alone_runs
    for tensors, others in ((link, alone), (following[0], alone_following[0])):
        for name, tensor in link_tensors(tensors).items():
            assert torch.equal(tensor, link_tensors(others)[name])


def test_a_short_text_does_not_fit_a_chain_to_noise():
    texts = layer_texts(5, HIDDEN, ROWS, tokens=WIDTH)
    chained, alone = errors(texts, [layer == 0 for layer in range(5)]), errors(texts, [True] * 5)
    for predicted, single in zip(chained, alone, strict=True):
        assert predicted < 1.5 * single


@pytest.mark.parametrize("hidden_size", [HIDDEN, 40])
@pytest.mark.parametrize("budget", [12, 24, 36])
def test_codes_and_scale_fit_the_budget_and_use_it(hidden_size, budget):
    texts = layer_texts(3, hidden_size, ROWS)
    width = joint_kv_width(hidden_size, KV_HEADS, HEAD_SIZE)
    for _, runs in fit(texts, [True, False, False], budget=budget):
        assert budget - 3 <= AllocatedFormat(width, (runs,)).bytes_per_token <= budget
        assert run_bytes(runs) < budget


def test_stored_channels_have_unit_size():
    texts = layer_texts(3, HIDDEN, ROWS)
    _, stored = serve(fit(texts, [True, False, False]), [text.seen.hidden for text in texts], exactly)
    for latent in stored[:1]:
        size = latent.square().mean(0).sqrt()
        assert torch.allclose(size, torch.ones_like(size), rtol=1e-3)
    # And those of a residual, given the same decoded predecessors.
    _, stored = serve(fit(texts, [True, False, False]), [text.seen.hidden for text in texts], quantized)
    residual = texts[1].seen.hidden @ fit(texts, [True, False, False])[1][0].down
    residual = residual - stored[0] @ fit(texts, [True, False, False])[1][0].prediction[0]
    size = residual.square().mean(0).sqrt()
    assert torch.allclose(size, torch.ones_like(size), rtol=1e-2)


def test_a_model_whose_gradients_say_nothing_loses_nothing():
    texts = layer_texts(2, HIDDEN, ROWS, key_gradient=0.0, value_gradient=0.0)
    read, _ = serve(fit(texts, [True, False]), [text.unseen.hidden for text in texts], exactly)
    for text, (keys, _) in zip(texts, read, strict=True):
        assert relative(keys, text.unseen.hidden @ text.key.T) < 1e-3


def test_a_joint_latent_is_never_wider_than_the_input():
    assert joint_kv_width(576, 9, 64) == 576
    assert joint_kv_width(576, 3, 64) == 384


@pytest.mark.parametrize("hidden_size", [HIDDEN, 40])
def test_shapes_of_a_link_are_those_announced(hidden_size):
    anchors = [True, False, False, True]
    links = fit(layer_texts(4, hidden_size, ROWS), anchors, torch.bfloat16)
    for (link, _), count in zip(links, layers_of_groups(anchors), strict=True):
        expected = link_shapes(hidden_size, KV_HEADS, HEAD_SIZE, count, torch.bfloat16)
        tensors = link_tensors(link)
        assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == expected
    assert layers_of_groups(anchors) == [1, 2, 3, 1]
    # The first layer has nothing to build on, whatever it is called.
    assert layers_of_groups([False, False]) == [1, 2]
