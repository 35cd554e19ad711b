"""examples/lm_eval: its datasets, the tasks that read them, and the options of the script."""

import json
import os
import pydoc_data.topics
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples.lm_eval import run
from examples.lm_eval.makers import functions, orders, packages, passages, world

FOLDER = Path(__file__).resolve().parent.parent.parent / "examples" / "lm_eval"


def make(folder, **environment):
    """Run the script as people do."""
    command = [sys.executable, str(FOLDER / "make_dataset.py"), str(folder)]
    variables = {**os.environ, **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The folder of the datasets."""
    folder = tmp_path_factory.mktemp("lm-eval") / "data"
    done = make(folder, PYTHONHASHSEED="1")
    assert done.returncode == 0, done.stderr
    return folder


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_task_reads_a_dataset_that_is_made_and_only_its_columns(data):
    tasks = {path: yaml.safe_load(path.read_text()) for path in (FOLDER / "tasks").glob("*.yaml")}
    assert {task["task"] for task in tasks.values()} == set(run.TASKS)
    assert {path.stem for path in tasks} == {task["task"] for task in tasks.values()}
    for task in tasks.values():
        columns = set(rows(data.parent / task["dataset_kwargs"]["data_files"]["test"])[0])
        templates = " ".join(task.get(key, "") for key in ("doc_to_text", "doc_to_target"))
        named = set(re.findall(r"{{(\w+)}}", templates)) | ({"choices", "label"} if "doc_to_choice" in task else set())
        assert named
        assert named <= columns
        for files in task["dataset_kwargs"]["data_files"].values():
            assert len(rows(data.parent / files)) >= 5


def test_the_same_questions_are_made_in_every_run(data, tmp_path):
    assert make(tmp_path / "again", PYTHONHASHSEED="2").returncode == 0
    names = sorted(path.name for path in data.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (data / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("name", ["continuations", "functions"])
def test_neither_its_place_nor_its_length_gives_the_right_answer_away(data, name):
    questions = rows(data / f"{name}.jsonl")
    assert len(questions) >= 100
    right, wrong, longest = [], [], []
    for question in questions:
        assert len(set(question["choices"])) == 4
        lengths = [len(choice) for choice in question["choices"]]
        answer = lengths.pop(question["label"])
        right.append(answer)
        wrong.append(statistics.mean(lengths))
        longest.append(answer > max(lengths))
    places = [question["label"] for question in questions]
    # A quarter, give or take three standard errors.
    allowed = 3 * (0.25 * 0.75 / len(questions)) ** 0.5
    for place in range(4):
        assert places.count(place) / len(questions) == pytest.approx(0.25, abs=allowed)
    assert statistics.mean(right) == pytest.approx(statistics.mean(wrong), rel=0.05)
    assert statistics.mean(longest) <= 0.25 + allowed


@pytest.mark.parametrize("name", ["orders", "world"])
def test_answers_in_words_are_what_is_read_of_a_line(data, name):
    maker = {"orders": orders.TEXTS * orders.QUESTIONS_PER_TEXT, "world": world.QUESTIONS}
    questions = rows(data / f"{name}.jsonl")
    assert len(questions) == maker[name]
    for question in questions:
        assert question["answer"].strip() == question["answer"] != ""
        assert "\n" not in question["answer"]
    # No answer is right so often that it could be guessed.
    answers = [question["answer"] for question in questions]
    assert max(answers.count(answer) for answer in answers) / len(answers) < 0.1


def test_no_question_is_among_the_examples_before_it(data):
    asked = {row["question"] for row in rows(data / "world.jsonl")}
    shown = {row["question"] for row in rows(data / "world-shots.jsonl")}
    assert len(asked) == world.QUESTIONS
    assert len(shown) == world.SHOTS
    assert not asked & shown
    task = yaml.safe_load((FOLDER / "tasks" / "xquant_world.yaml").read_text())
    assert task["num_fewshot"] == world.SHOTS


def test_the_right_continuation_is_what_follows_and_the_others_are_not(data):
    questions = rows(data / "continuations.jsonl")
    text = " ".join(" ".join(pydoc_data.topics.topics.values()).split())
    assert len(questions) == passages.QUESTIONS
    for question in questions:
        found = [f"{question['context']} {choice}" in text for choice in question["choices"]]
        assert found == [index == question["label"] for index in range(4)]
    assert all(len(row["page"].split()) == passages.PAGE_WORDS for row in rows(data / "pages.jsonl"))


def test_an_answer_about_an_order_stands_once_in_the_text(data):
    questions = rows(data / "orders.jsonl")
    for first in range(0, len(questions), orders.QUESTIONS_PER_TEXT):
        together = questions[first : first + orders.QUESTIONS_PER_TEXT]
        assert len({question["context"] for question in together}) == 1
        assert len({question["question"] for question in together}) == len(together)
    for question in questions:
        assert question["question"] not in question["context"]  # no example gives it away
        name = re.fullmatch(r"Question: What did (.+) order\?\nAnswer: (.+) ordered", question["question"])[1]
        ordered = re.findall(r"^(.+) ordered (\w+), \d\d tons", question["context"], re.M)
        assert len(ordered) == orders.ORDERS
        assert ordered.count((name, question["answer"])) == 1
        assert len({element for _, element in ordered}) == orders.ORDERS


def test_what_is_known_of_the_world():
    known = {country.name: country for country in world.countries()}
    assert known["France"].capital == "Paris"
    assert known["Japan"].region == "Asia"
    asked, shown = world.questions()
    answers = {row["question"]: row["answer"] for row in [*asked, *shown]}
    assert answers["Question: Which chemical element has the symbol Fe?"] == "iron"
    assert "Question: What is the capital of Guatemala?" not in answers  # Guatemala City
    assert {"capital", "element", "country"} <= {word for question in answers for word in question.split()}


def test_what_a_function_does_is_not_said_by_its_name():
    known = functions.functions()
    assert len(known) > 500
    assert len({function.summary for function in known}) == len(known)
    by_name = {function.name: function.summary for function in known}
    assert by_name["math.cbrt"] == "Return the cube root of x"
    for function in known:
        assert function.name.rpartition(".")[2].lower() not in function.summary.lower()


@pytest.mark.parametrize("package", packages.SOURCES)
def test_a_missing_package_is_named_with_what_to_run(package, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(packages.MissingPackageError, match=f"from {package} .*pip install countryinfo periodictable"):
        list(orders.questions()), world.questions()
    blocker = tmp_path / "blocked" / f"{package}.py"
    blocker.parent.mkdir()
    blocker.write_text("raise ImportError")
    path = os.pathsep.join([str(blocker.parent), os.environ.get("PYTHONPATH", "")])
    done = make(tmp_path / "data", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr.startswith("make_dataset: ")
    assert done.stderr.count("\n") == 1


def test_what_the_server_is_started_with():
    options = run.parse(
        ["MODEL", "--backend", "kivi", "--bits", "2", "--settings", '{"residual": 32}', "--", "--seed", "1"]
    )
    arguments = run.server_arguments(options)
    settings = json.loads(arguments[arguments.index("--additional-config") + 1])
    assert settings == {"kivi": {"residual": 32, "bits": 2}}
    assert arguments[-2:] == ["--seed", "1"]
    assert "--additional-config" not in run.server_arguments(run.parse(["MODEL", "--backend", "CPU_ATTN"]))
    assert run.parse(["MODEL"]).tasks == run.TASKS
