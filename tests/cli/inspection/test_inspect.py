"""``xquant inspect``: what it says of folders, and what it refuses."""

import io
import json
import os
import shutil
import sys

import pytest

from tests.factorizing import FakeTokenizer, factorize
from xquant_vllm.cli.main import main
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE

CALIBRATED = ("--calibration", "python-docs", "--calibration-tokens", 64)
KINDS = {
    "data-free": (),
    "calibrated": (*CALIBRATED, "--bits", 3),
    "chain": ("--method", "xquant-cl", *CALIBRATED, "--bits", 2),
}


@pytest.fixture(scope="module")
def folders(llama, tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
        for name, options in KINDS.items():
            assert factorize(llama, root / name, *options) == 0
    return root


def inspect(capsys, folder, *options, status=0):
    capsys.readouterr()
    assert main(["inspect", str(folder), *options]) == status
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_the_object(folders, capsys, kind):
    facts = json.loads(inspect(capsys, folders / kind, "--json"))
    assert facts["schema"] == 1
    assert facts["model"] == {
        "architecture": "LlamaForCausalLM",
        "layers": 3,
        "hidden_size": 128,
        "kv_heads": 2,
        "head_size": 32,
    }
    assert facts["method"] == ("xquant-cl" if kind == "chain" else "xquant")
    assert facts["calibration"] is None if kind == "data-free" else facts["calibration"]["text"] == "python-docs"
    assert facts["bits_built_in"] == (kind != "data-free")
    assert facts["problems"] == []
    assert facts["header_checked"]
    assert [layer["layer"] for layer in facts["layers"]] == [0, 1, 2]
    assert facts["bytes_per_token"] == sum(layer["bytes_per_token"] for layer in facts["layers"])
    assert facts["bytes_per_token_16bit"] == 3 * 4 * 2 * 32
    assert facts["bytes_per_token"] < facts["bytes_per_token_16bit"]
    assert [layer["reads"] for layer in facts["layers"]] == ([[], [0], [0, 1]] if kind == "chain" else [[]] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_words(folders, capsys, kind):
    lines = inspect(capsys, folders / kind).splitlines()
    assert "factors of LlamaForCausalLM with 3 layers, hidden size 128, 2 kv heads of 32" in lines[0]
    assert (
        lines[3] == "data-free: from the weights alone" if kind == "data-free" else "tokens of python-docs" in lines[3]
    )
    assert len([line for line in lines if line.startswith(("   0  ", "   1  ", "   2  "))]) == 3
    assert lines[-1].startswith("checksums: those of the header and of all ")


def test_a_file_of_the_folder_stands_for_it(folders, capsys):
    whole = inspect(capsys, folders / "data-free")
    for name in (FACTORS_FILE, HEADER_FILE):
        assert inspect(capsys, folders / "data-free" / name) == whole


def test_a_terminal_without_blocks(folders, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert main(["inspect", str(folders / "calibrated")]) == 0
    assert b"bits of every layer's channels" in written.getvalue()


def test_a_picture(folders, capsys, tmp_path):
    for kind in KINDS:
        inspect(capsys, folders / kind, "--plot", str(tmp_path / "new" / f"{kind}.png"))
        assert (tmp_path / "new" / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == len(KINDS)


def test_a_picture_without_matplotlib(folders, capsys, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["inspect", str(folders / "data-free"), "--plot", str(tmp_path / "x.png")]) == 2
    captured = capsys.readouterr()
    assert "factors of LlamaForCausalLM" in captured.out
    assert captured.err == (
        "xquant: --plot needs matplotlib, which is not installed; pip install matplotlib, or leave the option out\n"
    )


def test_a_place_where_no_picture_can_be(folders, capsys, tmp_path):
    assert main(["inspect", str(folders / "data-free"), "--plot", str(tmp_path)]) == 2
    assert "--plot" in capsys.readouterr().err


@pytest.fixture
def copied(folders, tmp_path):
    return shutil.copytree(folders / "calibrated", tmp_path / "copied")


def overwrite(path, content):
    path.unlink()
    path.write_bytes(content)


def test_a_tensor_that_was_changed_is_named(copied, capsys):
    path = copied / FACTORS_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    overwrite(path, bytes(content))
    facts = json.loads(inspect(capsys, copied, "--json", status=1))
    assert facts["problems"] == [f"{FACTORS_FILE} is corrupt: the checksum of layers.2.value.up does not match"]
    assert "NOT WHOLE: " + facts["problems"][0] in inspect(capsys, copied, status=1).splitlines()


def test_an_index_that_is_lost_is_said(copied, capsys):
    (copied / "model.safetensors.index.json").unlink()
    (line,) = json.loads(inspect(capsys, copied, "--json", status=1))["problems"]
    assert line.startswith("model.safetensors.index.json is missing")


def test_a_header_of_an_older_release_is_whole(copied, capsys):
    header = json.loads((copied / HEADER_FILE).read_text())
    header["checksum"] = None
    overwrite(copied / HEADER_FILE, json.dumps(header).encode())
    assert "checksums: the header has none (an older release); those of all" in inspect(capsys, copied)


def as_folder(path):
    path.unlink()
    path.mkdir()


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


FAULTS = {
    "empty": lambda path: overwrite(path, b""),
    "torn": lambda path: overwrite(path, path.read_bytes()[: path.stat().st_size // 2]),
    "something else": lambda path: overwrite(path, b"\x93NUMPY" + b"\0" * 200),
    "huge header": lambda path: overwrite(path, b"\xff" * 200),
    "missing": lambda path: path.unlink(),
    "a folder": as_folder,
    "a pipe": as_pipe,
}


@pytest.mark.parametrize("name", [FACTORS_FILE, HEADER_FILE])
@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_cannot_be_read_are_one_line(copied, capsys, name, fault):
    FAULTS[fault](copied / name)
    capsys.readouterr()
    assert main(["inspect", str(copied)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("xquant: ")
    assert name in line
    assert captured.out == ""


def test_what_is_no_folder_of_factors_is_one_line(llama, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    cases = {
        llama: "has no factors",
        tmp_path / "empty": "has no factors",
        tmp_path / "file": "is no folder, and no file of factors",
        tmp_path / "link": "is not there",
        tmp_path / "nowhere": "is not there",
        tmp_path / ("x" * 300): "File name too long",
        llama / "model.safetensors": "is no folder, and no file of factors",
    }
    for given, said in cases.items():
        capsys.readouterr()
        assert main(["inspect", str(given)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("xquant: ")
        assert said in line
