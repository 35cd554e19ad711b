"""tools/repeat_kv_heads.py: a grouped-query checkpoint becomes a multi-head one that computes the same."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from model_prep import manifest, repeat_heads
from model_prep.recipe import PrepareError
from model_prep.repeat_heads import Heads, repeat_kv_heads
from safetensors.torch import load_file, save_file

from tests.tiny_models import quantize_tiny_model, save_tiny_model

ROOT = Path(__file__).resolve().parent.parent.parent


@torch.inference_mode()
def _logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(torch.tensor([tokens])).logits[0]


def _edit_config(folder: Path, **changes) -> None:
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(json.dumps({name: value for name, value in content.items() if value != "drop"}))


def _edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def source(tmp_path) -> Path:
    return save_tiny_model(tmp_path / "source", "llama")


def test_every_query_head_gets_its_own_copy():
    rows = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    repeated = Heads(query=6, kv=2, size=2).repeat(rows)
    assert repeated.flatten().tolist() == pytest.approx([0.0, 0.1] * 3 + [1.0, 1.1] * 3)


@pytest.mark.parametrize("family", ["llama", "llama-bias", "mistral-window", "qwen2", "qwen3", "mqa"])
def test_computes_the_same(tmp_path, family):
    source = save_tiny_model(tmp_path / "source", family)
    target = tmp_path / "target"
    repeat_kv_heads(source, target)
    tokens = torch.arange(7, 107).tolist()
    expected = _logits(source, tokens)
    torch.testing.assert_close(_logits(target, tokens), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((target / "config.json").read_text())
    assert config == {**json.loads((source / "config.json").read_text()), "num_key_value_heads": 4}


def test_shards_are_written_one_by_one_with_a_right_index(tmp_path, source):
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "many", max_shard_size="200KB")
    source, target = tmp_path / "many", tmp_path / "target"
    repeat_kv_heads(source, target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    shards = {name: load_file(target / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 2
    assert all(name in shards[shard] for name, shard in index["weight_map"].items())
    tensors = [tensor for shard in shards.values() for tensor in shard.values()]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors)
    torch.testing.assert_close(_logits(target, [5, 6, 7, 8]), _logits(source, [5, 6, 7, 8]), rtol=1e-5, atol=1e-5)


def test_dtype_is_kept_and_files_can_be_read_by_everyone(tmp_path, source):
    _edit_tensors(source, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    repeat_kv_heads(source, tmp_path / "target")
    assert {tensor.dtype for tensor in load_file(tmp_path / "target" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert all(path.stat().st_mode & 0o044 for path in [tmp_path / "target", *(tmp_path / "target").iterdir()])


def test_tokenizer_is_copied_and_what_would_be_wrong_is_not(tmp_path, source, capsys):
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"the old heads")
    (source / manifest.NAME).write_text("a list of the old files")
    (source / "original").mkdir()
    repeat_kv_heads(source, tmp_path / "target")
    names = {path.name for path in (tmp_path / "target").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    told = capsys.readouterr().err
    assert "leaving out pytorch_model.bin" in told
    assert "leaving out original" in told


def _rename(old: str, new: str):
    def edit(tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit


def _drop(end: str):
    def edit(tensors) -> None:
        del tensors[next(name for name in tensors if name.endswith(end))]

    return edit


def _add(name: str, *shape: int):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"half"), "model.safetensors cannot be read"),
        (lambda f: _edit_config(f, num_key_value_heads=4), "multi-head model already"),
        (lambda f: _edit_config(f, num_key_value_heads="drop"), "num_key_value_heads = None"),
        (lambda f: _edit_config(f, num_key_value_heads=3), "no multiple of 3 KV heads"),
        (lambda f: _edit_config(f, num_key_value_heads=1), "64 rows where config.json tells of 1 KV heads of 32"),
        (lambda f: _edit_tensors(f, _rename("k_proj", "qkv_proj")), "several projections in one"),
        (lambda f: _edit_tensors(f, _drop("layers.1.self_attn.v_proj.weight")), "layers.1.self_attn has only one of"),
        (lambda f: _edit_tensors(f, _rename("_proj", "_projection")), "has no tensor k_proj.weight"),
        (lambda f: _edit_tensors(f, _add("model.layers.0.self_attn.k_norm.weight", 64)), r"has the shape \[64\]"),
        (
            lambda f: _edit_tensors(f, _add("model.layers.0.self_attn.k_proj.lora_A.weight", 4, 128)),
            "plain projections",
        ),
        (quantize_tiny_model, "quantized"),
    ],
)
def test_refuses_what_it_cannot_do(tmp_path, source, damage, told):
    damage(source)
    with pytest.raises(PrepareError, match=told):
        repeat_kv_heads(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"], "nothing is left behind"


def test_existing_target_is_left_alone(tmp_path, source):
    (tmp_path / "target").mkdir()
    with pytest.raises(PrepareError, match="target exists"):
        repeat_kv_heads(source, tmp_path / "target")
    assert not list((tmp_path / "target").iterdir())


def test_interrupted_run_leaves_nothing(tmp_path, source, monkeypatch):
    def fail(*_arguments, **_options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repeat_heads, "_copy_others", fail)  # the weights are written by then
    with pytest.raises(KeyboardInterrupt):
        repeat_kv_heads(source, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_command_line(tmp_path, source):
    command = [sys.executable, str(ROOT / "tools" / "repeat_kv_heads.py"), str(source), str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "target")
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.splitlines()[-1] == f"repeat_kv_heads: error: {tmp_path / 'target'} exists; name a new folder"


def test_real_model_computes_the_same(smollm2, smollm2_mha, documentation):
    config = json.loads((smollm2_mha / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 9)
    expected = _logits(smollm2, documentation[:64])
    torch.testing.assert_close(_logits(smollm2_mha, documentation[:64]), expected, rtol=1e-4, atol=1e-4)
