"""Models and heads that draft for them, made of tiny checkpoints: the heads compute what the models compute.

A head for EAGLE sees the embedding of the next token and a hidden state of the model. These heads take no notice of the
hidden state and have the model's own layers: they see what the model sees, except for the first token of the sequence,
which no head is shown. So a good part of what they draft is accepted, and hardly anything if their cache is wrong.
"""

import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def with_embeddings(folder: Path, target: Path, scale: float) -> Path:
    """A copy of a checkpoint whose embeddings have another size.

    Args:
        folder: the checkpoint.
        target: where to write.
        scale: root mean square of an embedding's channels. With 1 a layer's norm leaves them alone, which the first
            layer of a head for EAGLE does not have; if it is small the residual of the first layer is, which heads for
            EAGLE-3 do not have.
    """
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    embeddings = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = (
        torch.nn.functional.normalize(embeddings, dim=1) * embeddings.shape[1] ** 0.5 * scale
    )
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def save_eagle_head(folder: Path, checkpoint: Path) -> Path:
    """Write a head for EAGLE.

    Args:
        folder: where to write.
        checkpoint: a Llama model, from :func:`with_embeddings` with 1.
    """
    size = transformers.AutoConfig.from_pretrained(checkpoint).hidden_size
    layers = {name: weight for name, weight in _layers(checkpoint) if name != "layers.0.input_layernorm.weight"}
    fc = torch.cat((torch.eye(size), torch.zeros(size, size)), 1)
    return _save(folder, checkpoint, "LlamaForCausalLM", {**layers, "fc.weight": fc})


def save_eagle3_head(folder: Path, checkpoint: Path) -> Path:
    """Write a head for EAGLE-3, whose first layer takes twice as many channels.

    Args:
        folder: where to write.
        checkpoint: a Llama model of three layers, from :func:`with_embeddings` with a small number.
    """
    size = transformers.AutoConfig.from_pretrained(checkpoint).hidden_size
    tensors = dict(_layers(checkpoint))
    for part in "qkv":
        name = f"layers.0.self_attn.{part}_proj.weight"
        tensors[name] = torch.cat((tensors[name], torch.zeros_like(tensors[name])), 1)
    weights = load_file(checkpoint / "model.safetensors")
    tensors |= {f"layers.{index}.hidden_norm.weight": torch.ones(size) for index in range(3)}
    tensors |= {"norm.weight": weights["model.norm.weight"], "lm_head.weight": weights["lm_head.weight"]}
    return _save(folder, checkpoint, "LlamaForCausalLMEagle3", {**tensors, "fc.weight": torch.zeros(size, 3 * size)})


def _layers(checkpoint: Path) -> list[tuple[str, torch.Tensor]]:
    weights = load_file(checkpoint / "model.safetensors")
    return [(name.removeprefix("model."), weight) for name, weight in weights.items() if ".layers." in name]


def _save(folder: Path, checkpoint: Path, architecture: str, tensors: dict[str, torch.Tensor]) -> Path:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    config.architectures = [architecture]
    config.draft_vocab_size = config.vocab_size
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
