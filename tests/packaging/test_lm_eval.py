"""examples/lm_eval: its datasets, and the tasks that read them."""

import json
import pydoc_data.topics
import sys
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples" / "lm_eval"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the datasets."""
    sys.path.insert(0, str(FOLDER))
    try:
        import make_dataset
    finally:
        sys.path.remove(str(FOLDER))
    folder = tmp_path_factory.mktemp("lm-eval") / "data"
    make_dataset.main(folder)
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_task_reads_a_dataset_that_is_made_and_only_its_columns(data):
    tasks = {path: yaml.safe_load(path.read_text()) for path in (FOLDER / "tasks").glob("*.yaml")}
    assert {task["task"] for task in tasks.values()} == {"xquant_continuation", "xquant_pages"}
    assert {path.stem for path in tasks} == {task["task"] for task in tasks.values()}
    for task in tasks.values():
        columns = set(rows(data.parent / task["dataset_kwargs"]["data_files"]["test"])[0])
        named = {task[key].strip("{}") for key in ("doc_to_text", "doc_to_choice", "doc_to_target") if key in task}
        assert named - {""} == columns


def test_the_right_choice_is_what_follows_and_the_others_are_not(data):
    questions = rows(data / "continuations.jsonl")
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    assert len(questions) == 100
    for question in questions:
        assert len(question["choices"]) == 4
        found = [f"{question['context']} {choice}" in text for choice in question["choices"]]
        assert found == [index == question["label"] for index in range(4)]
    assert len({question["label"] for question in questions}) == 4
    assert all(len(row["page"].split()) == 500 for row in rows(data / "pages.jsonl"))
