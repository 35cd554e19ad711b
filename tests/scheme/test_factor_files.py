"""Whatever a factor file or a cache folder may be: the cache is never an error, a model folder's factors are one."""

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engine_config import engine_config
from tests.tiny_models import save_tiny_model
from xquant_vllm.errors import FactorFileError, SettingsError
from xquant_vllm.offline.factorize import factorize
from xquant_vllm.offline.factorize_options import FactorizeOptions
from xquant_vllm.plugin.engine_factors import check_factors, check_folder
from xquant_vllm.plugin.engine_settings import settings_of
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE, read_json, read_tensors
from xquant_vllm.scheme.factor_cache import FactorCache
from xquant_vllm.scheme.factor_cache_folder import cache_folder
from xquant_vllm.scheme.factor_header import read_header

SHAPES = {"x": (torch.float32, (2, 3))}
TENSORS = {"x": torch.arange(6.0).view(2, 3)}
WEIGHTS = torch.eye(4), torch.ones(4, 4)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def warnings(monkeypatch):
    """What the cache warns of."""
    lines = []
    monkeypatch.setattr(
        "xquant_vllm.scheme.factor_cache.logger.warning", lambda line, *values: lines.append(line % values)
    )
    return lines


def empty(path):
    path.write_bytes(b"")


def half(path):
    path.write_bytes(path.read_bytes()[:20])


def huge_header(path):
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def no_json(path):
    path.write_bytes(struct.pack("<Q", 8) + b"no json!" + bytes(64))


def as_folder(path):
    path.unlink()
    path.mkdir()


def full_folder(path):
    as_folder(path)
    (path / "file").write_text("x")


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "nothing")


def round_about(path):
    path.unlink()
    path.symlink_to(path)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


FAULTS = [empty, half, huge_header, no_json, as_folder, full_folder, dangling, round_about, pipe]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_entry_of_the_cache_is_computed_anew(tmp_path, warnings, fault):
    cache = FactorCache(tmp_path)
    path = cache.path("recipe", *WEIGHTS)
    cache.store(path, TENSORS)
    assert torch.equal(cache.load(path, SHAPES)["x"], TENSORS["x"])
    fault(path)
    assert cache.load(path, SHAPES) is None
    assert len(warnings) == 1
    assert "are computed anew, because the file" in warnings[0]
    cache.store(path, TENSORS)


def test_a_cache_whose_folder_cannot_be_made(tmp_path, warnings):
    (tmp_path / "file").write_text("a file where a folder should be")
    cache = FactorCache(tmp_path / "file" / "xquant_vllm")
    for _ in range(2):
        path = cache.path("recipe", *WEIGHTS)
        assert cache.load(path, SHAPES) is None
        cache.store(path, TENSORS)
    assert sum("factors cannot be kept in" in line for line in warnings) == 1


def test_a_user_without_a_home_computes_at_every_start(monkeypatch, warnings):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no entry in the list of users
    assert cache_folder() is None
    cache = FactorCache(None)
    assert cache.path("recipe", *WEIGHTS) is None
    (line,) = warnings
    assert line.startswith("xquant: factors cannot be kept in a home folder (there is none: HOME is not set), so they")


_ANOTHER_USER = """
import os, sys, logging, torch
from pathlib import Path
logging.basicConfig(level=logging.WARNING)
from xquant_vllm.scheme.factor_cache import FactorCache
cache = FactorCache(Path(sys.argv[1]) / "xquant_vllm")
if os.getuid() == 0:
    os.setgid(65534); os.setuid(65534)
for _ in range(2):
    path = cache.path("recipe", torch.eye(4), torch.ones(4, 4))
    assert cache.load(path, {"x": (torch.float32, (2, 3))}) is None
    cache.store(path, {"x": torch.zeros(2, 3)})
"""


@pytest.mark.parametrize("mode", [0o700, 0o555])
def test_a_cache_folder_of_another_user(tmp_path, mode):
    """Not searchable, or not writable: a warning each way, and no more."""
    folder = tmp_path / "cache"
    folder.mkdir()
    if os.getuid() != 0:
        mode &= ~0o700  # our own folder, closed to ourselves
    folder.chmod(mode)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    process = subprocess.run(
        [sys.executable, "-c", _ANOTHER_USER, str(folder)], capture_output=True, text=True, check=False, timeout=120
    )
    folder.chmod(0o755)
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("factors cannot be kept in") == 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model folder with factors, as the command writes it."""
    root = tmp_path_factory.mktemp("made")
    model = save_tiny_model(root / "model", "llama")
    factorize(FactorizeOptions(model=str(model), out=root / "out", dtype="float32"))
    return root / "out"


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def check(folder):
    config = engine_config(folder, layers=3, kv_heads=2, head_size=32, dtype=torch.float32, settings={})
    check_factors(config, settings_of(config))


def test_a_whole_folder_is_accepted(folder):
    check(folder)
    check_folder(str(folder))
    assert read_header(folder).checksum


@pytest.mark.parametrize("name", [FACTORS_FILE, HEADER_FILE])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_of_a_model_folder_is_one_clear_error(folder, name, fault):
    fault(folder / name)
    for look in (check, lambda folder: check_folder(str(folder))):
        with pytest.raises(SettingsError, match=rf"^xquant: \S*{name} .*xquant factorize") as error:
            look(folder)
        assert "\n" not in str(error.value)


def test_a_folder_without_its_index_is_refused(folder):
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(SettingsError, match=rf"index\.json is missing, without which vLLM takes {FACTORS_FILE} for"):
        check(folder)


def edited(folder, change):
    path = folder / HEADER_FILE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    os.utime(path, ns=(0, hash(str(folder)) & 0xFFFFFFFF))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["settings"]["outlier_channels"].update(key=9),
        lambda header: header["settings"].update(bits={"key": 5, "value": 5}),
        lambda header: header["settings"].update(rotate=False),
        lambda header: header["source"].update(architecture="Other"),
        lambda header: header["checksums"].update({"layers.0.key.up": "0" * 64}),
        lambda header: header.update(checksum="0" * 64),
    ],
)
def test_a_header_that_was_changed_is_refused(folder, change):
    edited(folder, change)
    with pytest.raises(SettingsError, match=rf"{HEADER_FILE} was changed: its checksum does not match.*xquant fact"):
        check(folder)


def test_a_header_of_an_older_release_is_read_with_a_warning(folder, monkeypatch):
    lines = []
    monkeypatch.setattr("xquant_vllm.scheme.factor_header.logger.warning", lambda line, *_: lines.append(line))
    edited(folder, lambda header: header.pop("checksum"))
    check(folder)
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"format": 2, "format": 2}', "has 'format' twice"),
        ('{"format": NaN}', "has NaN where a number should be"),
        ('{"format": -Infinity}', "has -Infinity where a number should be"),
        ("[" * 100_000, "is no JSON file"),
        ("[]", "is no JSON object"),
        ('{"format": ' + "9" * 5000 + "}", "is no JSON file"),
    ],
)
def test_json_that_says_nothing_certain_is_refused(folder, text, named):
    (folder / HEADER_FILE).write_text(text)
    with pytest.raises(SettingsError, match=named):
        check(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@FUZZ
@given(data=st.data())
def test_any_value_anywhere_in_a_header_is_read_or_refused(made, tmp_path, data):
    """Without its checksum, which would refuse them all."""
    content = json.loads((made / HEADER_FILE).read_text())
    del content["checksum"]
    place = content
    while True:
        name = data.draw(st.sampled_from(sorted(place)))
        if not isinstance(place[name], dict) or data.draw(st.booleans()):
            break
        place = place[name]
    place[name] = data.draw(JSON)
    path = tmp_path / HEADER_FILE
    path.write_text(json.dumps(content))
    os.utime(path, ns=(0, data.draw(st.integers(0, 1 << 60))))
    with contextlib.suppress(FactorFileError):
        assert read_header(tmp_path) is not None


@FUZZ
@given(start=st.integers(0, 200), new=st.binary(max_size=40), cut=st.none() | st.integers(0, 2000))
def test_any_bytes_of_a_factor_file_are_read_or_refused(tmp_path, start, new, cut):
    path = tmp_path / "cache" / "x.safetensors"
    if not path.exists():
        cache = FactorCache(path.parent)
        cache.store(path, TENSORS)
        shutil.copy(path, tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    path.write_bytes((data[:start] + new + data[start + len(new) :])[:cut])
    loaded = FactorCache(path.parent).load(path, SHAPES)
    assert loaded is None or torch.equal(loaded["x"], TENSORS["x"])
    path.write_bytes(new)
    for read in (read_json, lambda path: read_tensors(path, SHAPES, {})):
        with pytest.raises(FactorFileError):
            read(path)
