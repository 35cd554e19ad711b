"""Texts that need no file of the user's."""

from xquant_vllm.offline.texts import calibration_text
from xquant_vllm.scheme.calibration.texts import mixed_text, text_digest, text_name


def test_the_text_of_the_package_is_long_enough_for_the_default():
    """A token is about four letters."""
    assert len(mixed_text()) > 4 * 8192
    assert calibration_text("mixed-text") == mixed_text()


def test_names_tell_no_path():
    assert [text_name(source) for source in ("mixed-text", "python-docs", "/home/me/my.txt")] == [
        "mixed-text",
        "python-docs",
        "my.txt",
    ]


def test_texts_are_told_apart(tmp_path):
    (tmp_path / "text").write_text(mixed_text(), encoding="utf-8")
    assert text_digest(str(tmp_path / "text")) == text_digest("mixed-text") != text_digest("python-docs")
