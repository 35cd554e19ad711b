"""The probe's numbers against the same by hand, over what pages can hold."""

from dataclasses import replace

import pytest
import torch

from tests.attention.attention_cases import Spec, make_case, random_spec
from xquant_vllm.attention.latents import read_slots
from xquant_vllm.attention.probe import MOST_KEYS, MOST_TOKENS, deviation
from xquant_vllm.projection.rematerialize import rematerialize_keys, rematerialize_values

PROMPT = ((40, 40),)


def found(spec, **changes):
    case = make_case(spec)
    return deviation(case.query, case.pages, replace(case.plan, **changes), case.batch, case.inputs)


def test_errors_and_weights_are_those_by_hand():
    """Latents per head: what was stored is all that a key is made from."""
    case = make_case(Spec(seqs=PROMPT, key_bits=3, value_bits=2))
    plan, positions = case.plan, torch.arange(40)
    slots = case.batch.block_table[0].long()[positions // 16] * 16 + positions % 16
    keys, values = (
        make(read_slots(case.pages, plan.layouts, terms, slots))
        for make, terms in (
            (lambda x: rematerialize_keys(x, positions, plan.projection), plan.key_terms),
            (lambda x: rematerialize_values(x, plan.projection), plan.value_terms),
        )
    )
    key_inputs, value_inputs = (x[:40].reshape(40, 2, 64).float() for x in case.inputs)
    exact_keys = rematerialize_keys(key_inputs, positions, plan.projection)
    exact_values = rematerialize_values(value_inputs, plan.projection)
    result = deviation(case.query, case.pages, plan, case.batch, case.inputs)
    # 32 of 40 tokens, evenly spread, the last among them.
    chosen = [39 - (31 - i) * 40 // 32 for i in range(32)]
    assert len(set(chosen)) == MOST_TOKENS
    for actual, by_hand, exact in ((result.keys, keys, exact_keys), (result.values, values, exact_values)):
        error = (by_hand[chosen] - exact[chosen]).norm() / exact[chosen].norm()
        assert actual == pytest.approx(error.item(), rel=1e-5)
    divergences = []
    for query in [39 - (7 - i) * 5 for i in range(8)]:
        for head in range(6):
            p, q = (
                torch.softmax(of[: query + 1, head // 3].double() @ case.query[query, head].double() * plan.scale, 0)
                for of in (exact_keys, keys)
            )
            divergences.append((p * (p / q).log()).sum())
    assert result.attention == pytest.approx(torch.stack(divergences).mean().item(), rel=1e-4)


def test_more_bits_deviate_less():
    errors = [found(Spec(seqs=PROMPT, key_bits=bits, value_bits=bits)) for bits in (2, 3, 4, 8, 16)]
    for name in ("keys", "values", "attention"):
        numbers = [getattr(error, name) for error in errors]
        assert numbers == sorted(numbers, reverse=True)
        assert 0 <= numbers[-1] < 1e-3 < numbers[0]


@pytest.mark.parametrize("kind", ["latent", "x", "deltas"])
def test_unquantized_pages_deviate_by_their_rounding(kind):
    result = found(Spec(seqs=((30, 30), (50, 20)), kind=kind, key_bits=16, value_bits=16, earlier=(16, 16)))
    assert result.keys < 2e-3
    assert result.values < 2e-3
    assert result.attention < 1e-5


def test_a_chain_reads_what_earlier_layers_stored():
    """Its random up-projections do not belong together, but the calls must fit them."""
    assert found(Spec(seqs=((30, 30),), kind="chain", earlier=(16, 16))).keys > 0


@pytest.mark.parametrize("seed", range(40))
def test_any_layer_and_batch(seed):
    """Of the pages only the step's own tokens are read in sequences that go on; all others there are NaN or absurd."""
    result = found(random_spec(seed))
    if result is not None:
        assert result.keys == result.keys
        assert result.values == result.values
        assert result.attention is None or result.attention >= -1e-6


def test_weights_are_compared_where_a_prompt_begins():
    assert found(Spec(seqs=((40, 39),))).attention is None
    assert found(Spec(seqs=((1, 1), (9, 1)))).attention is None
    assert found(Spec(seqs=((9, 1), (2, 2)))).attention is not None
    assert found(Spec(seqs=((9, 0),))) is None


def test_a_long_prompt_costs_no_more():
    long, short = (found(Spec(seqs=((length, length),), seed=3)) for length in (3 * MOST_KEYS, MOST_KEYS))
    assert long.attention is not None
    assert short.attention is not None


def test_values_whose_projection_is_elsewhere():
    case = make_case(Spec(seqs=PROMPT))
    folded = replace(case.plan, projection=replace(case.plan.projection, up_value=None))
    arguments = (case.batch, case.inputs)
    whole = deviation(case.query, case.pages, case.plan, *arguments)
    given = deviation(case.query, case.pages, folded, *arguments, case.plan.projection.up_value)
    latents = deviation(case.query, case.pages, folded, *arguments)
    assert given == whole
    assert latents.values != whole.values
