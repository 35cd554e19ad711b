"""Any bytes in any file of a model folder with factors: it serves what was written, or ends in our one clear error."""

import contextlib
import itertools
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine_config import engine_config
from tests.factorizing import FakeTokenizer, factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import RefusedError, SettingsError
from xquant_vllm.offline.checkpoint import open_checkpoint
from xquant_vllm.plugin.engine_factors import check_factors, check_folder
from xquant_vllm.plugin.engine_settings import settings_of
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE
from xquant_vllm.scheme.factor_header import read_header
from xquant_vllm.scheme.factor_reader import read_layer, read_link

INDEX = "model.safetensors.index.json"
OURS = (FACTORS_FILE, HEADER_FILE, INDEX)
LAYERS = 3
KINDS = {
    "data-free": (),
    "joint": ("--calibration", "python-docs", "--calibration-tokens", 64, "--bits", 4, "--basis", "joint"),
}
TIMES = itertools.count(10**9)
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory):
    """A model folder with factors, as the command writes it."""
    root = tmp_path_factory.mktemp("whole")
    model = save_tiny_model(root / "model", "llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
        assert factorize(model, root / "out", "--dtype", "float32", *KINDS[request.param]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def copied(whole, tmp_path_factory):
    """Copies of the folder one after another, in the same place."""
    place = tmp_path_factory.mktemp("copied") / "model"

    def copied():
        shutil.rmtree(place, ignore_errors=True)
        return shutil.copytree(whole, place)

    return copied


def write(path, content):
    """In a new file: the one that is there may be a link to the checkpoint's own. At another time than any before."""
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(0, next(TIMES)))


def read(folder):
    """All that a server reads of a folder's factors, in its order; None for a folder without."""
    config = engine_config(folder, layers=LAYERS, kv_heads=2, head_size=32, dtype=torch.float32, settings={})
    check_folder(str(folder))
    check_factors(config, settings_of(config))
    header = read_header(folder)
    if header is None:
        return None
    if header.joint_kv:
        links = [read_link(folder, layer, 1, header) for layer in range(LAYERS)]
        return header, [tensor for link in links for tensor in (link.down, link.up_key, link.up_value)]
    bases = [basis for layer in range(LAYERS) for basis in read_layer(folder, layer, header)]
    return header, [tensor for basis in bases for tensor in (basis.down, basis.up)]


def assert_whole_or_refused(folder, whole):
    """Read it, and compare with what was written."""
    expected_header, expected = read(whole)
    try:
        header, tensors = read(folder)
    except SettingsError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert said.startswith("xquant: ")
        assert "\n" not in said
        assert "xquant factorize" in said
        return False
    assert header == expected_header
    assert all(map(torch.equal, tensors, expected))
    return True


@st.composite
def changes(draw):
    """A change of a file's bytes."""
    kind = draw(st.sampled_from(("bits", "cut", "replace", "insert", "remove", "twice")))
    place, new = draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=30))
    # Most bytes are numbers of tensors: as often one of the first, which say what they are.
    near = draw(st.booleans())

    def change(data):
        at = int(place * (min(400, len(data)) if near else len(data)))
        if kind == "bits":
            return data[:at] + bytes([data[at] ^ (new[0] or 1)]) + data[at + 1 :]
        if kind == "cut":
            return data[:at]
        if kind == "replace":
            return data[:at] + new + data[at + len(new) :]
        if kind == "insert":
            return data[:at] + new + data[at:]
        if kind == "remove":
            return data[:at] + data[at + len(new) :]
        return data[:at] + data

    return change


@pytest.mark.parametrize("name", OURS)
@FUZZ
@given(data=st.data())
def test_any_bytes(whole, copied, name, data):
    folder = copied()
    before = (folder / name).read_bytes()
    after = before
    for change in data.draw(st.lists(changes(), min_size=1, max_size=3)):
        after = change(after or b"\0")
    write(folder / name, after)
    served = assert_whole_or_refused(folder, whole)
    if name == FACTORS_FILE and len(after) < len(before):
        assert not served


@FUZZ
@given(names=st.permutations([*OURS, "config.json", "model.safetensors"]))
def test_files_in_each_others_place(whole, copied, names):
    folder = copied()
    for name, other in zip(OURS, names, strict=False):
        write(folder / name, (whole / other).read_bytes())
    assert assert_whole_or_refused(folder, whole) == (tuple(names[: len(OURS)]) == OURS)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(FACTORS_FILE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(content=JSON, at=st.sampled_from(("", "weight_map", "model.norm.weight")))
def test_any_index(whole, copied, content, at):
    """Served with the weights that it names, or refused: and by the command likewise."""
    folder = copied()
    index = json.loads((folder / INDEX).read_text())
    if at == "weight_map":
        index["weight_map"] = content
    elif at:
        index["weight_map"][at] = content
    write(folder / INDEX, json.dumps(index if at else content).encode())
    served = assert_whole_or_refused(folder, whole)
    if content != "model.safetensors":
        assert not served
    with contextlib.suppress(RefusedError):
        checkpoint = open_checkpoint(folder)
        for layer in range(LAYERS):
            checkpoint.key_value(layer)


@pytest.mark.parametrize("wrong", [FACTORS_FILE, "another.safetensors", "../model.safetensors", 3, None, ["x"]])
def test_an_index_that_leads_elsewhere_is_refused_by_name(copied, wrong):
    folder = copied()
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = wrong
    write(folder / INDEX, json.dumps(index).encode())
    with pytest.raises(SettingsError, match=rf"^xquant: \S*{INDEX} (names|has no weight_map).*xquant factorize"):
        read(folder)
