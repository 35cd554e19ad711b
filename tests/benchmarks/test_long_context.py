"""Lengths and prompts that are measured later stand beside those of before."""

from benchmarks.long_context import with_more


def _cell(length: int, found: float, prompts: int) -> dict[str, float]:
    return {
        "length": length,
        "depth": 0.5,
        "prompts": prompts,
        "accuracy": found,
        "accuracy_16bit": 1.0,
        "nll": 1 - found,
        "nll_16bit": 0.0,
    }


def test_they_add_up() -> None:
    first = with_more({"name": "some", "positions": {}, "needle": None}, {"8192": ["far"]}, [_cell(8192, 0.0, 1)])
    assert first["needle"]["accuracy"] == 0
    both = with_more(first, {"4096": ["near"]}, [_cell(4096, 1.0, 3)])
    assert list(both["positions"]) == ["4096", "8192"]
    assert [cell["length"] for cell in both["needle"]["cells"]] == [4096, 8192]
    assert (both["needle"]["accuracy"], both["needle"]["nll"]) == (0.75, 0.25)
    assert both["name"] == "some"


def test_without_prompts_there_is_no_needle() -> None:
    assert with_more({"positions": {}, "needle": None}, {"4096": []}, [])["needle"] is None
