"""``xquant factorize``: what it writes, from which checkpoints, and what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factorizing import FakeTokenizer, factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.offline import factorize as command
from xquant_vllm.offline.calibration import samples
from xquant_vllm.projection import refit
from xquant_vllm.projection.calibrated import layer_budget
from xquant_vllm.projection.calibration import GRADIENT_RIDGE, INPUT_RIDGE
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE, layer_tensors
from xquant_vllm.projection.layer import BasisSpec, factorize_layer
from xquant_vllm.scheme.factor_header import read_header

LAYERS, HEADS = 3, 4
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny checkpoints by family; copy before changing."""
    made = {}

    def models(family: str) -> Path:
        if family not in made:
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return models


@pytest.fixture
def fake_tokenizer(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())


def projections(folder: Path, layer: int, kv_heads: int):
    """Key and value weight, read by other means than the command's."""
    weights = {}
    for path in folder.glob("model*.safetensors"):
        weights |= load_file(path)
    (stem,) = {name.partition("layers.")[0] for name in weights if ".self_attn." in name}
    stem = f"{stem}layers.{layer}.self_attn"
    if f"{stem}.qkv_proj.weight" in weights:
        fused = weights[f"{stem}.qkv_proj.weight"]
        head_size = fused.shape[0] // (HEADS + 2 * kv_heads)
        return fused.split([HEADS * head_size, kv_heads * head_size, kv_heads * head_size])[1:]
    return weights[f"{stem}.k_proj.weight"], weights[f"{stem}.v_proj.weight"]


@pytest.mark.parametrize(("family", "kv_heads"), [("llama", 2), ("qwen3", 2), ("phi3-gqa", 2), ("opt", 4), ("mqa", 1)])
def test_bases_are_those_of_the_weights_as_served(models, tmp_path, family, kv_heads):
    assert factorize(models(family), tmp_path / "out") == 0
    tensors = load_file(tmp_path / "out" / FACTORS_FILE)
    spec = BasisSpec("head", 1, 0, True, torch.bfloat16)
    expected = {}
    for layer in range(LAYERS):
        key, value = (weight.bfloat16() for weight in projections(models(family), layer, kv_heads))
        expected |= layer_tensors(layer, *factorize_layer(key, value, kv_heads, spec))
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def test_options_are_written_down(models, tmp_path, capsys):
    options = ("--basis", "joint", "--no-rotate", "--outlier-channels", 2, 1, "--dtype", "float16", "--bits", 4, 2)
    assert factorize(models("llama"), tmp_path / "out", *options) == 0
    header = read_header(tmp_path / "out")
    assert header.settings.model_dump() == {
        "bits": {"key": 4, "value": 2},
        "basis": "joint",
        "rotate": False,
        "outlier_channels": {"key": 2, "value": 1},
        "allocation": None,
        "chain": None,
    }
    assert header.dtype == "float16"
    assert header.calibration is None
    assert header.source.architecture == "LlamaForCausalLM"
    assert load_file(tmp_path / "out" / FACTORS_FILE)["layers.0.key.down"].shape == (1, 128, 64)
    assert str(tmp_path) not in (tmp_path / "out" / HEADER_FILE).read_text()
    output = capsys.readouterr()
    assert "s per layer" in output.err
    assert "vllm serve" in output.out


def test_a_model_whose_input_is_cached_is_told_that_it_needs_no_factors(models, tmp_path, capsys):
    assert factorize(models("mha"), tmp_path / "out") == 0
    assert "note: on one rank the layer input of this model is cached" in capsys.readouterr().out
    assert factorize(models("mqa"), tmp_path / "other") == 0
    assert "note:" not in capsys.readouterr().out


def test_a_calibrated_folder_differs_in_nothing_but_its_bases(models, tmp_path, fake_tokenizer, monkeypatch):
    monkeypatch.setattr(refit, "_RIDGE", 1e12)  # what sinks read back as is another matter
    text = tmp_path / "letters.txt"
    text.write_text("the quick brown fox jumps over the lazy dog and so on " * 40)
    assert factorize(models("llama"), tmp_path / "plain") == 0
    options = ("--calibration", text, "--calibration-tokens", 256, "--bits", 3)
    assert factorize(models("llama"), tmp_path / "calibrated", *options) == 0
    plain, calibrated = (read_header(tmp_path / name) for name in ("plain", "calibrated"))
    assert calibrated.calibration.model_dump() == {
        "text": "letters.txt",
        "tokens": 256,
        "ridge": INPUT_RIDGE,
        "gradient_ridge": GRADIENT_RIDGE,
    }
    assert str(tmp_path) not in (tmp_path / "calibrated" / HEADER_FILE).read_text()
    assert calibrated.source == plain.source
    assert plain.settings.allocation is None
    changes = {"bits": calibrated.settings.bits, "allocation": calibrated.settings.allocation}
    assert calibrated.settings == plain.settings.model_copy(update=changes)
    assert calibrated.settings.bits.model_dump() == {"key": 3, "value": 3}
    # Of 3 layers keys and values of 2 heads: bits and channels, within the paper's bytes.
    assert [[len(stream) for stream in layer] for layer in calibrated.settings.allocation] == [[2, 2]] * LAYERS
    for layer in calibrated.settings.allocation:
        codes = sum(bits * channels // 8 for stream in layer for runs in stream for bits, channels in runs)
        assert codes + 4 <= layer_budget(2, 32, 128, 3, joint_kv=False) < codes + 4 + 4
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {path.name for path in (tmp_path / "calibrated").iterdir()} == names
    tensors = {name: load_file(tmp_path / name / FACTORS_FILE) for name in ("plain", "calibrated")}
    assert {name: tensor.shape for name, tensor in tensors["plain"].items()} == {
        name: tensor.shape for name, tensor in tensors["calibrated"].items()
    }
    for layer in range(LAYERS):
        for stream, weight in zip(("key", "value"), projections(models("llama"), layer, 2), strict=True):
            down, up = (tensors["calibrated"][f"layers.{layer}.{stream}.{part}"].double() for part in ("down", "up"))
            assert not torch.equal(down, tensors["plain"][f"layers.{layer}.{stream}.down"].double())
            rebuilt = (down @ up).mT.flatten(0, 1)
            assert (rebuilt - weight).norm() / weight.norm() < 2e-2


@pytest.mark.parametrize(
    ("family", "options", "basis"),
    [
        ("mha", (), "joint"),
        ("mha", ("--basis", "head"), "head"),
        ("llama", (), "head"),  # as wide as keys and values, not narrower
        ("mqa", ("--basis", "joint"), "joint"),
        ("qwen3", (), "joint"),  # heads of 80
    ],
)
def test_a_calibrated_latent_is_joint_where_the_layer_input_is_narrower(
    models, tmp_path, fake_tokenizer, family, options, basis
):
    options = ("--calibration", "python-docs", "--calibration-tokens", 128, *options)
    assert factorize(models(family), tmp_path / "out", *options) == 0
    header = read_header(tmp_path / "out")
    assert header.settings.basis == basis
    assert header.settings.chain is None
    assert header.settings.bits.model_dump() == {"key": 4, "value": 4}
    source = header.source
    tensors = load_file(tmp_path / "out" / FACTORS_FILE)
    if basis == "head":
        assert tensors["layers.0.key.down"].shape == (source.kv_heads, 128, source.head_size)
    else:
        width = min(128, 2 * source.kv_heads * source.head_size)
        assert tensors["layers.0.joint.down"].shape == (128, width)
        assert tensors["layers.0.joint.up_key"].shape == (source.kv_heads, width, source.head_size)
        assert not [name for name in tensors if name.endswith("prediction")]
        budget = layer_budget(source.kv_heads, source.head_size, 128, 4, joint_kv=True)
        for ((runs,),) in header.settings.allocation:
            assert sum(bits * channels // 8 for bits, channels in runs) < budget


def test_a_chain_is_fitted_and_its_settings_are_built_in(models, tmp_path, fake_tokenizer):
    options = ("--method", "xquant-cl", "--calibration", "python-docs", "--calibration-tokens", 256, "--bits", 3)
    assert factorize(models("qwen3"), tmp_path / "out", *options, "--anchor-interval", 2, "--dtype", "float32") == 0
    header = read_header(tmp_path / "out")
    assert header.settings.chain.model_dump() == {"first_layers": 1, "anchor_interval": 2}
    assert header.settings.basis == "joint"
    tensors = load_file(tmp_path / "out" / FACTORS_FILE)
    width = 128
    assert tensors["layers.1.joint.down"].shape == (128, width)
    assert tensors["layers.1.joint.down"].dtype == torch.float32
    assert tensors["layers.1.joint.up_key"].shape == (2, 2 * width, 80)
    assert tensors["layers.1.joint.prediction"].shape == (1, width, width)
    assert {name.split(".")[1] for name in tensors if name.endswith("prediction")} == {"1"}
    assert factorize(models("qwen3"), tmp_path / "defaults", *options) == 0
    assert read_header(tmp_path / "defaults").settings.chain.model_dump() == {"first_layers": 1, "anchor_interval": 4}
    assert load_file(tmp_path / "defaults" / FACTORS_FILE)["layers.2.joint.up_key"].shape == (2, 3 * width, 80)


def test_the_same_text_makes_the_same_folder(models, tmp_path, fake_tokenizer):
    options = ("--calibration", "python-docs", "--calibration-tokens", 128, "--bits", 2)
    for name in ("one", "two"):
        samples._last.clear()
        assert factorize(models("llama"), tmp_path / name, *options) == 0
    assert read_header(tmp_path / "one") == read_header(tmp_path / "two")


def test_the_folder_is_a_whole_checkpoint_of_links(models, tmp_path):
    """As in the Hugging Face cache, whose folders are links to files elsewhere."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in models("llama").iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "consolidated.safetensors").write_text("the same weights in another form")
    (snapshot / ".cache").mkdir()
    assert factorize(snapshot, tmp_path / "out") == 0
    out = tmp_path / "out"
    for path in models("llama").iterdir():
        assert (out / path.name).stat().st_ino == path.stat().st_ino
        assert not (out / path.name).is_symlink()
    assert {p.name for p in out.iterdir()} - {p.name for p in models("llama").iterdir()} == {
        FACTORS_FILE,
        HEADER_FILE,
        INDEX,
    }
    # vLLM would load every safetensors file as weights, if no index named those that are.
    assert set(json.loads((out / INDEX).read_text())["weight_map"].values()) == {"model.safetensors"}
    assert not list(tmp_path.glob(".out*"))


def test_files_are_copied_where_they_cannot_be_linked(models, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    assert factorize(models("llama"), tmp_path / "out") == 0
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (models("llama") / weights).read_bytes()


def test_sharded_checkpoints(models, tmp_path):
    sharded = shutil.copytree(models("llama"), tmp_path / "sharded")
    weights = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    shards = {f"model-{i}.safetensors": dict(list(weights.items())[i::2]) for i in range(2)}
    for name, shard in shards.items():
        save_file(shard, sharded / name)
    weight_map = {name: file for file, shard in shards.items() for name in shard}
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert factorize(models("llama"), tmp_path / "one") == 0
    assert factorize(sharded, tmp_path / "two") == 0
    assert read_header(tmp_path / "one").checksums == read_header(tmp_path / "two").checksums
    assert json.loads((tmp_path / "two" / INDEX).read_text())["weight_map"] == weight_map


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file({change(name): tensor for name, tensor in weights.items()}, folder / "model.safetensors")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def change_dtype(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.k_proj.weight"] = weights["model.layers.0.self_attn.k_proj.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: change_weights(f, lambda n: n.replace("self_attn", "attention")), "unknown structure: .*found none"),
        (lambda f: change_weights(f, lambda n: n.replace("layers.1.self_attn.k_", "layers.1.x_")), r"layers\.1\.self_"),
        (
            lambda f: change_weights(f, lambda n: n.replace("model.layers.0.self_attn", "tower.layers.0.self_attn")),
            r"several stacks of layers \(model\.layers, tower\.layers\)",
        ),
        (lambda f: change_config(f, num_key_value_heads=4), r"k_proj.weight is \[64, 128\], expected \[128, 128\]"),
        (lambda f: change_config(f, quantization_config={"quant_method": "awq"}), "is quantized"),
        (change_dtype, r"k_proj\.weight is quantized \(torch\.int8\)"),
        (lambda f: (f / "config.json").write_text("{}"), "no num_hidden_layers"),
        (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "is no safetensors checkpoint"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 100), "is no safetensors checkpoint"),
    ],
)
def test_what_cannot_be_factorized_is_refused_by_name(models, tmp_path, capsys, change, named):
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    change(folder)
    assert factorize(folder, tmp_path / "out") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert re.search(named, errors[-1])
    assert errors[-1].startswith("xquant: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--bits", 5), "no page format has 5-bit codes"),
        (("--bits", 4, 3, 2), "--bits takes one number, or one for keys and one for values"),
        (("--outlier-channels", 32), "xquant: --outlier-channels 32 (key) cannot work"),
        (("--calibration", "/nowhere.txt"), "--calibration /nowhere.txt cannot be read"),
        (("--calibration-tokens", 3), "--calibration-tokens 3 is too few"),
        (("--method", "xquant-cl"), "--method xquant-cl fits a chain to a text: give --calibration"),
        (
            ("--method", "xquant-cl", "--calibration", "python-docs", "--bits", 4, 2),
            "--bits 4 2 cannot work with --calibration",
        ),
        (("--calibration", "python-docs", "--bits", 4, 2), "set one number, 8, 4, 3 or 2"),
        (("--calibration", "python-docs", "--bits", 16), "--bits 16 cannot work with --calibration"),
        (("--calibration", "python-docs", "--outlier-channels", 2), "--outlier-channels has no use with --calibration"),
        (("--calibration", "python-docs", "--rotate"), "--rotate has no use with --calibration"),
        (("--calibration", "python-docs", "--no-rotate"), "--no-rotate has no use with --calibration"),
        (
            ("--method", "xquant-cl", "--calibration", "python-docs", "--anchor-interval", -1),
            "--anchor-interval -1 cannot work; set 0 or more",
        ),
    ],
)
def test_options_that_cannot_work_are_refused_by_name(models, tmp_path, capsys, fake_tokenizer, options, named):
    assert factorize(models("llama"), tmp_path / "out", *options) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if named in line] == errors[-1:]
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_only_if_asked_and_only_if_it_is_ours(models, tmp_path, capsys):
    out = tmp_path / "out"
    assert factorize(models("llama"), out) == 0
    assert factorize(models("llama"), out) == 2
    assert "is already there" in capsys.readouterr().err
    assert factorize(models("llama"), out, "--force", "--bits", 3) == 0
    assert read_header(out).settings.bits.key == 3
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    assert factorize(models("llama"), precious, "--force") == 2
    assert "was not written by this command" in capsys.readouterr().err
    assert (precious / "thesis.txt").exists()
    assert factorize(models("llama"), models("llama") / "inside") == 2
    assert "lies inside the checkpoint" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "precious"]


def test_a_folder_can_be_made_anew_from_itself(models, tmp_path):
    out = tmp_path / "out"
    assert factorize(models("llama"), out) == 0
    checksums = read_header(out).checksums
    assert factorize(out, out, "--force", "--basis", "joint") == 0
    assert read_header(out).settings.basis == "joint"
    assert factorize(out, out, "--force") == 0
    assert read_header(out).checksums == checksums
    assert (out / "model.safetensors").stat().st_ino == (models("llama") / "model.safetensors").stat().st_ino


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_everything_as_it_was(models, tmp_path, monkeypatch, capsys, failure):
    out = tmp_path / "out"
    assert factorize(models("llama"), out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_):
        raise failure

    monkeypatch.setattr(command, "link_checkpoint", fail)
    if isinstance(failure, OSError):
        assert factorize(models("llama"), out, "--force", "--bits", 2) == 2
        assert f"xquant: disk full; nothing was written to {out}" in capsys.readouterr().err
    else:
        assert factorize(models("llama"), out, "--force", "--bits", 2) == 130
        assert capsys.readouterr().err.splitlines()[-1] == f"xquant: interrupted; nothing was written to {out}"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_vllm_is_not_needed(models, tmp_path):
    code = "import sys; sys.modules['vllm'] = None; from xquant_vllm.cli.main import main; sys.exit(main())"
    arguments = ["factorize", str(models("llama")), "--out", str(tmp_path / "out")]
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / HEADER_FILE).exists()
