"""Which words stand for this package, and which do not."""

import pytest

from xquant_vllm.plugin.unread.names import is_setting, keys_inside, meant, named


@pytest.mark.parametrize(
    "word", ["xquant", "XQuant", "XQUANT", "x-quant", "x_quant", "xquant_vllm", "xquants", " xquant "]
)
def test_spellings_of_the_package(word):
    assert named(word) == "xquant"


def test_the_other_backend():
    assert named("KIVI") == "kivi"


@pytest.mark.parametrize("word", ["quant", "xq", "kv", "quantization", "bits", "", "gdn_prefill_backend", 3])
def test_words_of_others(word):
    assert named(word) is None


@pytest.mark.parametrize(
    ("word", "key"),
    [("xqaunt", "xquant"), ("xqant", "xquant"), ("Xquent", "xquant"), ("quant", "xquant"), ("kivy", "kivi")],
)
def test_a_misspelled_word_counts_over_settings_alone(word, key):
    assert meant(word, {"bits": 2}) == key
    for other in ({"block": 2}, {}, {"method": "awq"}, "bits", 2, None):
        assert meant(word, other) is None


def test_common_words_count_with_their_values():
    assert is_setting("xquant", "bits", "anything")
    assert is_setting("xquant", "method", "xquant-cl")
    assert not is_setting("xquant", "method", "awq")
    assert is_setting("xquant", "hot", "20%")
    assert not is_setting("xquant", "hot", {"pool": 1})
    assert not is_setting("xquant", "residual", 128)
    assert is_setting("kivi", "residual", 128)
    assert is_setting("kivi", "prompt", "exact")


def test_tables_inside_of_others():
    assert keys_inside({"a": {"xquant": {"bits": 2}}, "b": [{"XQuant": 1}], "c": 3}) == {
        "xquant": {"bits": 2},
        "XQuant": 1,
    }
    assert keys_inside({"a": "xquant"}) == {}
    endless: dict = {}
    endless["a"] = endless
    assert keys_inside(endless) == {}
