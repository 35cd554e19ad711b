"""Templates of issues are what GitHub's schema for forms allows."""

import pytest
import yaml

from tests.docs.pages import ROOT

FOLDER = ROOT / ".github" / "ISSUE_TEMPLATE"
FORMS = sorted(path for path in FOLDER.glob("*.yml") if path.name != "config.yml")
# Attributes of the elements: those that must be there, and all.
ELEMENTS = {
    "markdown": ({"value"}, {"value"}),
    "input": ({"label"}, {"label", "description", "placeholder", "value"}),
    "textarea": ({"label"}, {"label", "description", "placeholder", "value", "render"}),
    "dropdown": ({"label", "options"}, {"label", "description", "options", "multiple", "default"}),
    "checkboxes": ({"label", "options"}, {"label", "description", "options"}),
}


def test_there_are_forms():
    assert {path.name for path in FORMS} == {"bug_report.yml", "request.yml"}
    config = yaml.safe_load((FOLDER / "config.yml").read_text())
    assert config.keys() <= {"blank_issues_enabled", "contact_links"}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_follows_githubs_schema(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    assert form.keys() <= {"name", "description", "body", "labels", "title", "assignees", "projects", "type"}
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    questions = [element for element in form["body"] if element["type"] != "markdown"]
    assert questions, "a form must ask something"
    for element in form["body"]:
        assert element.keys() <= {"type", "id", "attributes", "validations"}
        needed, known = ELEMENTS[element["type"]]
        assert needed <= element["attributes"].keys() <= known
        assert element.get("validations", {}).keys() <= {"required"}
        assert all(isinstance(value, bool) for value in element.get("validations", {}).values())
    for key in ("id", "label"):
        values = [element.get(key) or element["attributes"].get(key) for element in questions]
        assert len(values) == len(set(values)), f"two elements have the same {key}"
    for element in questions:
        options = element["attributes"].get("options", [])
        if element["type"] == "dropdown":
            assert len(options) == len(set(options))
            assert all(isinstance(option, str) and option != "None" for option in options)
        elif element["type"] == "checkboxes":
            assert all(option.keys() <= {"label", "required"} and option["label"] for option in options)


def test_a_bug_report_asks_for_what_is_needed():
    form = yaml.safe_load((FOLDER / "bug_report.yml").read_text())
    asked = {element["id"] for element in form["body"] if "id" in element}
    assert {"doctor", "command", "settings", "log", "model"} <= asked
