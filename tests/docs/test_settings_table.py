"""The table of settings in docs/choosing.md has exactly the settings that there are, with their defaults."""

import json
import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from xquant_vllm.scheme.settings import PerStream, XQuantSettings, parse_settings

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "choosing.md"
HEAD = "| setting | type | default | meaning |"


def _rows() -> dict[str, list[str]]:
    """Cells of the table by the setting's name."""
    lines = PAGE.read_text().split(HEAD)[1].splitlines()[2:]
    table = lines[: lines.index("")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]
    return {row[0].strip("`"): row for row in rows}


ROWS = _rows()


def test_the_table_has_all_settings_and_no_other():
    assert list(ROWS) == list(XQuantSettings.model_fields)
    assert all(len(row) == 4 and all(row) for row in ROWS.values())


@pytest.mark.parametrize("name", ROWS)
def test_a_default_is_that_of_the_code(name):
    default = XQuantSettings.model_fields[name].default
    cell = ROWS[name][2]
    if default is None:
        assert cell.startswith("none: "), "say what is taken where the setting is left out"
        return
    # As users write it: JSON, the same once it is parsed.
    assert re.fullmatch("`[^`]+`", cell)
    assert getattr(parse_settings({name: json.loads(cell.strip("`"))}), name) == default


@pytest.mark.parametrize("name", ROWS)
def test_a_type_names_values_that_can_be_set(name):
    values = [json.loads(value) for value in re.findall("`([^`]+)`", ROWS[name][1]) if value not in ROWS]
    for value in values:
        assert getattr(parse_settings({name: value}), name) in (
            value,
            PerStream(**value) if type(value) is dict else value,
        )


def test_no_value_of_a_choice_is_left_out():
    for name, field in XQuantSettings.model_fields.items():
        for choices in (field.annotation, *get_args(field.annotation)):
            for choice in get_args(choices) if get_origin(choices) is Literal else ():
                assert f'`"{choice}"`' in ROWS[name][1]
