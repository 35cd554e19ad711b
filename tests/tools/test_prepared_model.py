"""The checkpoint folder that tools/prepare_model.py makes: whole, quickly checked, and right for chat."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from model_prep import manifest
from model_prep.registry import MODELS

RECIPE = MODELS["smollm2"]
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def copy(smollm2, tmp_path) -> Path:
    """A copy to damage; the weights are linked."""
    target = tmp_path / "copy"
    target.mkdir()
    for path in smollm2.iterdir():
        if path.name == "model.safetensors":
            (target / path.name).symlink_to(path)
        else:
            shutil.copyfile(path, target / path.name)
    return target


def test_second_run_is_quick_and_does_not_import_torch(smollm2):
    code = (
        "import sys; sys.path.insert(0, 'tools'); sys.argv[1:] = ['--model', 'smollm2']; import prepare_model;"
        "assert prepare_model.main() == 0; assert 'torch' not in sys.modules"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(smollm2)
    assert time.monotonic() - start < 30


def test_unknown_model_is_named_with_the_known_ones():
    command = [sys.executable, str(ROOT / "tools" / "prepare_model.py"), "--model", "smollm3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "'smollm3'" in done.stderr
    assert "smollm2" in done.stderr


def test_several_models_are_checked_before_any_is_made(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "prepare_model.py"), "--models-dir", str(tmp_path)]
    done = subprocess.run(
        [*command, "--model", "smollm2", "--model", "smollm3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "'smollm3'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_untouched_copy_is_whole(copy):
    assert manifest.problem(copy, RECIPE) is None


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: _truncate(folder / "tokenizer.json"), "tokenizer.json has"),
        (lambda folder: _flip_a_bit(folder / "tokenizer.json"), "tokenizer.json is not what was written"),
        (lambda folder: _truncate(folder / manifest.NAME), "cannot be read"),
        (lambda folder: (folder / manifest.NAME).unlink(), "has no xquant-manifest.json"),
    ],
)
def test_damage_is_found_and_named(copy, damage, told):
    damage(copy)
    assert told in (manifest.problem(copy, RECIPE) or "")


def test_older_recipe_is_found(copy):
    content = json.loads((copy / manifest.NAME).read_text())
    content["recipe"]["revision"] -= 1
    (copy / manifest.NAME).write_text(json.dumps(content))
    assert "older recipe" in (manifest.problem(copy, RECIPE) or "")


def test_chat_template_and_stop_token(smollm2, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == end
    assert json.loads((smollm2 / "config.json").read_text())["eos_token_id"] == end
    assert tokenizer.encode("Hi") == tokenizer.encode("Hi", add_special_tokens=False), "no token is put before a text"


def test_every_digit_is_a_token(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  123")) == ["a", "ĠĠ", "1", "2", "3"]


def test_model_answers_and_stops(smollm2, tokenizer):
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    messages = [{"role": "user", "content": "How many days are in a week?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    answer = tokenizer.decode(tokens)
    assert "7" in answer
    assert answer.endswith("<|im_end|>")
