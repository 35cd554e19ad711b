"""What a text shows of a model: gradients that finite differences confirm, and inputs of an untouched model."""

from contextlib import contextmanager

import pytest
import torch
import transformers

from tests.factorizing import FakeTokenizer
from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import RefusedError
from xquant_vllm.offline.calibration import samples
from xquant_vllm.offline.calibration.calibration_tokens import tokenize
from xquant_vllm.offline.calibration.samples import collect_samples
from xquant_vllm.offline.checkpoint import open_checkpoint

CPU = torch.device("cpu")
BATCH = torch.arange(2 * 48).reshape(2, 48) * 7 % 300 + 3
# Separate and fused projections; biases; key norms; caps, windows; without RoPE; RoPE of neighbors.
FAMILIES = ["llama-bias", "qwen3", "phi3-gqa", "gemma3", "opt", "glm"]
HEADS = 4


@pytest.fixture(autouse=True)
def forget():
    """What was collected before."""
    samples._last.clear()


@pytest.fixture
def drawn(monkeypatch):
    """Tokens drawn and the probabilities that they were drawn from, sequence by sequence."""
    taken, multinomial = [], torch.multinomial

    def draw(probabilities, *arguments, **options):
        tokens = multinomial(probabilities, *arguments, **options)
        taken.append((probabilities.clone(), tokens))
        return tokens

    monkeypatch.setattr(torch, "multinomial", draw)
    return taken


def untouched(folder, dtype=torch.float64):
    """The model by other means than the package's, in a precision that allows of finite differences."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return model.to(dtype).eval().requires_grad_(False)


def attention_of(model, layer):
    (module,) = [module for name, module in model.named_modules() if name.endswith(f"layers.{layer}.self_attn")]
    return module


@contextmanager
def shifted(attention, key_shift, value_shift):
    """What the projections yield, changed by ``[sequences, tokens, rows]`` each."""
    if hasattr(attention, "qkv_proj"):
        queries = attention.qkv_proj.out_features - key_shift.shape[-1] - value_shift.shape[-1]
        shifts = {attention.qkv_proj: torch.nn.functional.pad(torch.cat((key_shift, value_shift), -1), (queries, 0))}
    else:
        shifts = {attention.k_proj: key_shift, attention.v_proj: value_shift}
    hooks = [
        module.register_forward_hook(lambda _, __, output, shift=shift: output + shift)
        for module, shift in shifts.items()
    ]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_finite_differences(tmp_path, family, drawn):
    # ReLU has kinks.
    folder = save_tiny_model(tmp_path, family, **({"activation_function": "gelu"} if family == "opt" else {}))
    checkpoint = open_checkpoint(str(folder))
    collected = collect_samples(checkpoint, BATCH, CPU)
    assert len(collected) == checkpoint.layers
    tokens = torch.stack([tokens for _, tokens in drawn])
    model = untouched(folder)

    def log_probability(layer, key_shift, value_shift):
        with shifted(attention_of(model, layer), key_shift, value_shift):
            logits = model(BATCH).logits
        return logits.log_softmax(-1).gather(-1, tokens).sum()

    generator = torch.Generator().manual_seed(0)
    rows, step = checkpoint.kv_heads * checkpoint.head_size, 5e-3
    for layer in (0, checkpoint.layers - 1):
        sample = collected[layer]
        assert sample.key_gradient.shape == sample.value_gradient.shape == (BATCH.numel(), rows)
        for which, gradient in enumerate((sample.key_gradient, sample.value_gradient)):
            # Of everything, and of single tokens of single heads, as Fisher blocks take them apart.
            everything = torch.randn(*BATCH.shape, rows, generator=generator, dtype=torch.float64)
            single = torch.zeros_like(everything)
            single[1, 5, : checkpoint.head_size] = everything[1, 5, : checkpoint.head_size]
            for direction in (everything, single):
                shift = [torch.zeros_like(direction)] * 2
                shift[which] = step * direction
                up, down = (log_probability(layer, *(sign * part for part in shift)) for sign in (1, -1))
                expected = (gradient.double() * direction.flatten(0, 1)).sum()
                size = gradient.double().norm() * direction.norm() / direction.count_nonzero() ** 0.5
                assert abs((up - down) / (2 * step) - expected) < 4e-3 * size


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_are_what_enters_the_projections_of_an_untouched_model(tmp_path, family):
    folder = save_tiny_model(tmp_path, family)
    collected = collect_samples(open_checkpoint(str(folder)), BATCH, CPU)
    model, seen = untouched(folder), []
    for layer in range(len(collected)):
        attention = attention_of(model, layer)
        projection = attention.qkv_proj if hasattr(attention, "qkv_proj") else attention.v_proj
        projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    model(BATCH)
    for sample, hidden in zip(collected, seen, strict=True):
        assert sample.hidden.shape == hidden.shape
        assert (sample.hidden - hidden).norm() < 1e-4 * hidden.norm()
        assert not sample.hidden.requires_grad


def test_tokens_are_drawn_from_what_the_model_predicts(tmp_path, drawn):
    folder = save_tiny_model(tmp_path, "llama")
    collect_samples(open_checkpoint(str(folder)), BATCH, CPU)
    expected = untouched(folder)(BATCH).logits.softmax(-1)
    assert torch.allclose(torch.stack([probabilities for probabilities, _ in drawn]).double(), expected, atol=1e-5)
    # Not the text's own, and not the likeliest.
    tokens = torch.stack([tokens for _, tokens in drawn]).squeeze(-1)
    assert (tokens[:, :-1] == BATCH[:, 1:]).double().mean() < 0.2
    assert (tokens == expected.argmax(-1)).double().mean() < 0.5


def test_the_same_gradients_every_time_and_for_every_first_sequence(tmp_path):
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, "llama")))
    torch.manual_seed(1)
    first = collect_samples(checkpoint, BATCH, CPU)
    assert collect_samples(checkpoint, BATCH, CPU) is first
    samples._last.clear()
    torch.manual_seed(2)
    second = collect_samples(checkpoint, BATCH, CPU)
    assert second is not first
    alone = collect_samples(checkpoint, BATCH[:1], CPU)
    for one, other, single in zip(first, second, alone, strict=True):
        assert torch.equal(one.key_gradient, other.key_gradient)
        assert torch.equal(one.value_gradient, other.value_gradient)
        # Sequences do not see each other.
        assert torch.allclose(one.value_gradient[: BATCH.shape[1]], single.value_gradient, rtol=1e-3, atol=1e-6)


def test_samples_of_another_text_or_model_are_not_taken_for_those_of_this(tmp_path):
    one, other = (open_checkpoint(str(save_tiny_model(tmp_path / name, name))) for name in ("llama", "mha"))
    first = collect_samples(one, BATCH, CPU)[0]
    # The same tokens, but not the same positions.
    for checkpoint, batch in ((one, BATCH.reshape(1, -1)), (one, BATCH.flip(1)), (other, BATCH)):
        sample = collect_samples(checkpoint, batch, CPU)[0]
        assert sample.key_gradient.shape != first.key_gradient.shape or not torch.allclose(
            sample.key_gradient, first.key_gradient, rtol=0.1
        )
    assert torch.equal(collect_samples(one, BATCH, CPU)[0].key_gradient, first.key_gradient)


def test_the_loss_of_a_token_says_nothing_of_later_keys(tmp_path):
    """The last token's own prediction is the only one that its key and value reach."""
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, "llama")))
    long, short = (collect_samples(checkpoint, batch, CPU)[0] for batch in (BATCH[:1], BATCH[:1, :1]))
    # A query that meets one key only does not care what it is.
    assert short.key_gradient.abs().max() < 1e-6
    assert short.value_gradient.abs().max() > 1e-3
    assert long.key_gradient[-1].abs().max() > 1e-6


def forbidden(attention):
    """Attention that calls its projections twice."""

    def forward(self, hidden_states, *arguments, **options):
        self.k_proj(hidden_states)
        return attention(self, hidden_states, *arguments, **options)

    return forward


def forgotten(attention):
    """Attention whose keys and values do not reach the predictions."""

    def forward(self, hidden_states, *arguments, **options):
        output, *rest = attention(self, hidden_states, *arguments, **options)
        return torch.zeros_like(output), *rest

    return forward


def cut(attention):
    """Attention that keeps gradients out."""

    def forward(self, *arguments, **options):
        with torch.no_grad():
            return attention(self, *arguments, **options)

    return forward


@pytest.mark.parametrize("change", [forbidden, forgotten, cut])
def test_attention_that_is_not_understood_is_refused_by_name(tmp_path, monkeypatch, change):
    from transformers.models.llama.modeling_llama import LlamaAttention

    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, "llama")))
    monkeypatch.setattr(LlamaAttention, "forward", change(LlamaAttention.forward))
    with pytest.raises(RefusedError, match=r"^xquant: LlamaAttention cannot be calibrated: .*leave --calibration out"):
        collect_samples(checkpoint, BATCH, CPU)


def test_a_model_that_transformers_cannot_run_is_refused(tmp_path):
    folder = save_tiny_model(tmp_path, "llama")
    checkpoint = open_checkpoint(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"^xquant: transformers cannot run the LlamaForCausalLM .*calibrat"):
        collect_samples(checkpoint, BATCH, CPU)


@pytest.mark.parametrize("family", ["gpt-oss", "granite-swa", "gemma2"])
def test_attention_with_sinks_or_caps_is_run_as_it_is(tmp_path, family, drawn):
    """Not with a kernel that knows of neither."""
    folder = save_tiny_model(tmp_path, family)
    collect_samples(open_checkpoint(str(folder)), BATCH, CPU)
    expected = untouched(folder, torch.float32)(BATCH).logits.softmax(-1)
    assert torch.allclose(torch.stack([probabilities for probabilities, _ in drawn]), expected, atol=1e-4)


def test_sequences_are_spread_over_the_text_and_open_as_the_tokenizer_opens(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path / "model", "llama")))
    text = tmp_path / "text"
    words = [chr(97 + i % 26) * (1 + i // 26 % 5) for i in range(5000)]
    text.write_text(" ".join(words))
    batch = tokenize(checkpoint, str(text), 1024, torch.device("cpu"))
    assert batch.shape == (2, 512)
    assert (batch[:, 0] == 1).all()
    ids = FakeTokenizer().encode(" ".join(words), add_special_tokens=False)
    assert batch[0, 1:].tolist() == ids[:511]
    assert batch[1, 1:].tolist() == ids[4 * 511 : 5 * 511]  # of nine
    assert tokenize(checkpoint, "python-docs", 300, torch.device("cpu")).shape == (1, 300)
    text.write_text("too short")
    with pytest.raises(RefusedError, match="has 2 tokens, too few"):
        tokenize(checkpoint, str(text), 2048, torch.device("cpu"))


def test_sequences_are_no_longer_than_the_model_can_read(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, "llama", max_position_embeddings=100)))
    assert tokenize(checkpoint, "python-docs", 350, torch.device("cpu")).shape == (3, 100)
