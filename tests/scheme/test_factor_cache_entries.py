"""What is listed of the factor cache, what is removed, and what is left alone."""

import os
import threading
import time

import pytest
import torch

from xquant_vllm.scheme.factor_cache import FactorCache
from xquant_vllm.scheme.factor_cache_entries import ABANDONED, cache_entries, remove
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.layer_weights import LayerWeights
from xquant_vllm.scheme.settings import parse_settings

TENSORS, SHAPES = {"x": torch.arange(6.0)}, {"x": (torch.float32, (6,))}


def store(folder, number, about=None):
    cache = FactorCache(folder)
    path = cache.path("recipe", torch.full((2, 2), float(number)), torch.ones(2, 2))
    cache.store(path, TENSORS, about)
    return path


def test_a_server_notes_what_its_entries_are_of(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(16, 24, generator=generator).bfloat16() for _ in range(2))
    provider = FactorProvider(parse_settings({"basis": "joint"}), None, None, None, "org/model")
    provider.layer_factors(LayerWeights(3, key, value, 2))
    (entry,) = cache_entries(tmp_path / "xquant_vllm")
    assert (entry.model, entry.about["layer"], entry.part) == ("org/model", 3, False)
    assert entry.about["settings"] == {
        "basis": "joint",
        "outlier_channels": {"key": 1, "value": 0},
        "rotate": True,
        "dtype": "bfloat16",
    }
    assert abs(entry.about["created"] - time.time()) < 60
    assert entry.size == entry.path.stat().st_size
    # What is noted changes neither the name nor what is read.
    again = FactorProvider(parse_settings({"basis": "joint"}), None, None, None)
    again.layer_factors(LayerWeights(3, key, value, 2))
    assert len(cache_entries(tmp_path / "xquant_vllm")) == 1
    assert "cached" in again.describe(0.0)


def test_reading_makes_an_entry_the_last_used(tmp_path):
    path = store(tmp_path, 1)
    os.utime(path, (1000, 1000))
    assert FactorCache(tmp_path).load(path, SHAPES) is not None
    (entry,) = cache_entries(tmp_path)
    assert abs(entry.last_used - time.time()) < 60
    os.utime(path, (1000, 1000))
    (entry,) = cache_entries(tmp_path)
    assert entry.last_used == 1000  # looking is no use


def test_what_is_not_the_caches_is_not_listed(tmp_path):
    path = store(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine")
    (tmp_path / f"{'a' * 63}.safetensors").write_text("mine")
    (tmp_path / f"{'b' * 64}.safetensors").symlink_to(tmp_path / "notes.txt")
    (tmp_path / f"{'c' * 64}.safetensors").mkdir()
    assert [entry.path for entry in cache_entries(tmp_path)] == [path]
    assert cache_entries(tmp_path / "nowhere") == []


def test_entries_that_say_nothing_of_themselves(tmp_path):
    store(tmp_path, 1)
    for number, content in enumerate((b"", b"x", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}")):
        (tmp_path / f"{number:064d}.safetensors").write_bytes(content)
    entries = cache_entries(tmp_path)
    assert len(entries) == 6
    assert all(entry.about == {} and entry.model is None for entry in entries)
    assert all(map(remove, entries))
    assert list(tmp_path.iterdir()) == []


def test_parts_are_entries_once_nobody_writes_them_any_more(tmp_path):
    part = tmp_path / ".abc_1.tmp"
    part.write_bytes(b"half")
    assert cache_entries(tmp_path) == []
    os.utime(part, (time.time() - ABANDONED - 1,) * 2)
    (entry,) = cache_entries(tmp_path)
    assert entry.part
    assert remove(entry)
    assert not part.exists()


def test_what_is_used_meanwhile_stays(tmp_path):
    path = store(tmp_path, 1)
    os.utime(path, (1000, 1000))
    (entry,) = cache_entries(tmp_path)
    FactorCache(tmp_path).load(path, SHAPES)
    assert not remove(entry)
    assert path.exists()
    path.unlink()
    assert not remove(entry)


def test_names_of_models(tmp_path):
    store(tmp_path, 1, {"model": "/models/smollm2"})
    (entry,) = cache_entries(tmp_path)
    assert entry.is_of("/models/smollm2")
    assert entry.is_of("smollm2")
    assert not entry.is_of("smollm")


def test_clearing_disturbs_nobody(tmp_path, caplog):
    """A reader and a writer at work while everything is removed, again and again."""
    failures, stop = [], threading.Event()

    def work():
        cache = FactorCache(tmp_path)
        path = cache.path("recipe", torch.eye(2), torch.ones(2, 2))
        while not stop.is_set():
            try:
                loaded = cache.load(path, SHAPES)
                assert loaded is None or torch.equal(loaded["x"], TENSORS["x"])
                cache.store(path, TENSORS)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 2
    removed = 0
    while time.monotonic() < end:
        removed += sum(map(remove, cache_entries(tmp_path)))
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert removed > 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not [record for record in caplog.records if "cannot be kept" in record.getMessage()]


def test_a_folder_that_cannot_be_read(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        cache_entries(tmp_path / "file")
