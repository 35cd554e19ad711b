"""The two halves of Python's documentation share nothing."""

import pydoc_data.topics

from xquant_vllm.offline.texts import python_docs_to_calibrate, python_docs_to_evaluate


def words(text: str) -> set[str]:
    return {" ".join(paragraph.split()) for paragraph in text.split("\n\n")} - {""}


def test_no_paragraph_is_calibrated_on_and_evaluated_on():
    calibrated, evaluated = words(python_docs_to_calibrate()), words(python_docs_to_evaluate())
    assert not calibrated & evaluated
    whole = words("\n\n".join(pydoc_data.topics.topics.values()))
    assert calibrated | evaluated == whole


def test_both_are_long_enough_for_what_they_are_for():
    assert len(python_docs_to_calibrate()) > 100_000
    assert len(python_docs_to_evaluate()) > 100_000


def test_topics_take_turns_by_name():
    names = sorted(pydoc_data.topics.topics)
    assert python_docs_to_evaluate().startswith(pydoc_data.topics.topics[names[1]])
