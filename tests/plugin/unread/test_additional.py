"""What of ``--additional-config`` is lost, and what is said of it."""

import pytest

from xquant_vllm.plugin.unread.additional import lost_settings

NONE = "no --attention-backend is given"


def lost(additional, *read):
    return list(lost_settings(additional, read, NONE))


@pytest.mark.parametrize(
    "additional",
    [
        {},
        {"xquant": {"bits": 2}},
        {"xquant": None},
        {"xquant": {"bits": 2}, "gdn_prefill_backend": "triton", "other": {"plugin": [1]}},
        {"method": "awq", "cache": {"size": 3}, "prompt": "hello", "rotate": "yes", "hot": "never"},
    ],
)
def test_what_is_read_or_others_is_passed_over(additional):
    assert lost(additional, "xquant") == []


@pytest.mark.parametrize("additional", [{"bits": 2}, {"residual": 128}, {"other": {"bits": 2}}])
def test_without_a_backend_only_what_names_the_package_is_told(additional):
    assert lost(additional) == []


@pytest.mark.parametrize(
    ("additional", "word", "backend"),
    [
        ({"xquant": {"bits": 2}}, "'xquant'", "xquant"),
        ({"xquant": '{"bits": 2}'}, "'xquant'", "xquant"),
        ({"kivi": {"bits": 2}}, "'kivi'", "kivi"),
        ({"XQuant": {}}, "'XQuant'", "xquant"),
        ({"xqaunt": {"bits": 2}}, "'xqaunt'", "xquant"),
        ({"attention": {"xquant": {"bits": 2}}}, "'xquant'", "xquant"),
    ],
)
def test_without_a_backend_it_is_a_warning(additional, word, backend):
    (found,) = lost(additional)
    assert not found.certain
    assert found.text == (
        f"{word} in --additional-config has no effect, since {NONE}; add --attention-backend {backend}, or leave the "
        "settings out"
    )


@pytest.mark.parametrize(
    ("additional", "right"),
    [
        ({"bits": 2}, '{"xquant": {"bits": 2}}'),
        ({"method": "xquant-cl"}, '{"xquant": {"method": "xquant-cl"}}'),
        ({"hot": 0, "xquant": {"bits": 3}}, '{"xquant": {"hot": 0, "bits": 3}}'),
        ({"XQUANT": {"bits": 2}}, '{"xquant": {"bits": 2}}'),
        ({"XQuant": {"bits": 2}}, '{"xquant": {"bits": 2}}'),
        ({"xquant_vllm": {"bits": 2}}, '{"xquant": {"bits": 2}}'),
        ({"xqaunt": {"bits": 2, "group_size": 32}}, '{"xquant": {"bits": 2, "group_size": 32}}'),
        ({"additional_config": {"xquant": {"bits": 2}}}, '{"xquant": {"bits": 2}}'),
        ({"XQuant": '{"bits": 2}'}, '{"xquant": {"bits": 2}}'),
        ({"bits": 2, "skip_layers": [0]}, '{"xquant": {"bits": 2, "skip_layers": [0]}}'),
    ],
)
def test_what_can_only_be_meant_for_the_backend_is_an_error(additional, right):
    (found,) = lost(additional, "xquant")
    assert found.certain
    for word in set(additional) - {"xquant"}:
        assert repr(word) in found.text
    assert found.text.endswith(f"stand in one table under 'xquant'; set --additional-config '{right}'")


def test_settings_of_the_other_backend_alone_are_an_error():
    (found,) = lost({"kivi": {"bits": 2}}, "xquant")
    assert found.certain
    assert "has no effect with --attention-backend xquant; set --attention-backend kivi" in found.text
    for additional in ({"xquant": {"bits": 2}}, {"XQUANT": {}}, {"a": {"xquant": {}}}):
        (found,) = lost(additional, "kivi")
        assert found.certain
        assert "set --attention-backend xquant" in found.text


def test_a_table_for_both_backends_is_a_warning():
    (found,) = lost({"kivi": {"bits": 2}, "xquant": {}}, "xquant")
    assert not found.certain


def test_a_setting_of_the_other_backend_at_the_top_is_a_warning():
    (found,) = lost({"residual": 128}, "xquant")
    assert not found.certain
    assert "it is a setting of kivi" in found.text


def test_with_both_backends_both_are_read():
    assert lost({"kivi": {"bits": 2}, "xquant": {}}, "xquant", "kivi") == []
