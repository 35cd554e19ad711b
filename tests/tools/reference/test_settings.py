"""The page on settings says what the models say."""

import pytest
from pydantic import BaseModel
from reference.settings import attributes, page, variables

from xquant_vllm.kivi.plugin.settings import KiviSettings
from xquant_vllm.scheme.settings import XQuantSettings


class Documented(BaseModel):
    """Settings.

    Attributes:
        first: what it is; None takes ``8``,
            see :data:`~package.module.OTHER`.
        second: another.
    """

    first: int | None = None
    second: int = 1


class Undocumented(BaseModel):
    """Settings.

    Attributes:
        first: what it is.
    """

    first: int = 1
    second: int = 1


def test_what_the_docstring_says_becomes_markdown():
    assert attributes(Documented) == {"first": "what it is; not set, it is `8`, see `OTHER`.", "second": "another."}


def test_a_field_without_a_line_is_an_error():
    with pytest.raises(ValueError, match="nothing of second"):
        attributes(Undocumented)


def test_every_setting_has_its_section():
    text = page()
    sections = [line[4:] for line in text.splitlines() if line.startswith("### ")]
    assert sections == [*XQuantSettings.model_fields, *(f"kivi: {name}" for name in KiviSettings.model_fields)]
    assert '\n* Set: `"head"` or `"joint"`\n* Default: `"head"`\n' in text
    assert "\n* Set: a number of layers, 0 for none\n* Default: not set\n" in text
    assert '\n* Default: `{"key": 1, "value": 0}`\n' in text
    assert "None" not in text


def test_every_variable_of_the_environment_is_there():
    assert "XQUANT_ATTENTION_KERNELS" in variables()
    assert all(f"\n* `{name}`: " in page() for name in variables())
