"""A model that computes in one dtype with weights in another, and forgets what it computed: the same numbers."""

import pytest
import torch
import transformers

from tests.tiny_models import save_tiny_model
from xquant_vllm.offline.calibration import frugal_model
from xquant_vllm.offline.calibration.attention_modules import attention_modules, decoder_layers
from xquant_vllm.offline.calibration.frugal_model import compute_in, forget_activations, loss_gradient
from xquant_vllm.offline.checkpoint import open_checkpoint

SEQUENCE = torch.arange(48) * 7 % 300 + 3
# Biases; fused projections and norms of keys; embeddings that look at their weight's dtype; caps; a body inside a body.
FAMILIES = ["llama-bias", "qwen3", "phi3-gqa", "gemma3", "gemma2", "opt"]


def loss(logits):
    return logits.log_softmax(-1)[:, 5].sum()


def gradients_of(model, checkpoint, run):
    """Of what the key projections (or fused ones) yield."""
    outputs, hooks = [], []
    for module in attention_modules(model, checkpoint):
        projection = getattr(module, "k_proj", None) or module.qkv_proj

        def see(_, __, output):
            if len(outputs) < checkpoint.layers:
                outputs.append(output)

        hooks.append(projection.register_forward_hook(see))
    embeddings = model.get_input_embeddings()
    hooks.append(embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True)))
    result, gradient = run(model)
    found = torch.autograd.grad(result, outputs, gradient)
    for hook in hooks:
        hook.remove()
    return found


def load(folder, dtype):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)


def plainly(model):
    whole = loss(model(input_ids=SEQUENCE.unsqueeze(0), use_cache=False).logits[0].float())
    return whole, torch.ones_like(whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_model_in_the_wider_dtype(tmp_path, family, monkeypatch):
    monkeypatch.setattr(frugal_model, "_CONVERTED", 1000)  # several pieces of every weight
    monkeypatch.setattr(frugal_model, "_LOGIT_TOKENS", 13)
    checkpoint = open_checkpoint(str(save_tiny_model(tmp_path, family)))
    wide = load(checkpoint.folder, torch.bfloat16)
    # Numbers that are made when the model is, and not read, were rounded, too.
    expected = gradients_of(wide.float(), checkpoint, plainly)
    model = load(checkpoint.folder, torch.bfloat16)
    for name, buffer in model.named_buffers():
        buffer.data = wide.get_buffer(name).to(buffer.dtype) if buffer.dtype == torch.bfloat16 else buffer.data
    compute_in(model, torch.float32)
    forget_activations(decoder_layers(model, attention_modules(model, checkpoint)))
    found = gradients_of(model, checkpoint, lambda model: loss_gradient(model, SEQUENCE, loss))
    for one, other in zip(expected, found, strict=True):
        assert other.dtype == torch.float32
        torch.testing.assert_close(other, one, rtol=2e-3, atol=2e-4 * one.abs().max().item())


def test_large_weights_stay_as_they_are(tmp_path):
    model = load(save_tiny_model(tmp_path, "llama"), torch.bfloat16)
    compute_in(model, torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
    assert model(input_ids=SEQUENCE.unsqueeze(0)).logits.dtype == torch.float32


def test_logits_are_there_for_a_few_tokens_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(frugal_model, "_LOGIT_TOKENS", 10)
    model, seen = load(save_tiny_model(tmp_path, "llama"), torch.float32), []

    def note(logits):
        seen.append(logits.shape[0])
        return loss(logits)

    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_(True))
    loss_gradient(model, SEQUENCE, note)
    assert seen == [10, 10, 10, 10, 8]
    # Afterwards the model is as it was.
    assert model(input_ids=SEQUENCE.unsqueeze(0)).logits.shape[1] == len(SEQUENCE)
