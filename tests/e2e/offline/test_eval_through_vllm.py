"""``xquant eval --through vllm``: logits of real pages, the same as vLLM answers by itself and as are found offline."""

import json
import math
import statistics

import pytest

from tests.e2e.families.test_families import ENGINE
from tests.factorizing import FakeTokenizer, factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.cli.main import main
from xquant_vllm.evaluation.tasks.windows import cut_windows
from xquant_vllm.offline.texts import python_docs_to_evaluate

pytestmark = pytest.mark.e2e

# More tokens than are computed in one step.
WINDOW, WINDOWS = 600, 2
SERVER = {**ENGINE, "max_model_len": WINDOW + 1}
BUILT_IN = ("--bits", "8", "--calibration", "python-docs", "--calibration-tokens", "256")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture
def evaluate(tiny, capsys, monkeypatch):
    """The result of an evaluation."""
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())

    def evaluate(*options):
        windows = ("--window", str(WINDOW), "--windows", str(WINDOWS))
        capsys.readouterr()
        assert main(["eval", "perplexity", str(tiny), *windows, *BUILT_IN, *options, "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return evaluate


def test_a_calibrated_cache_is_evaluated_as_it_is_served(engines, tiny, tmp_path, evaluate, monkeypatch):
    kept = ("--through", "vllm", "--resume", str(tmp_path / "kept"))
    through_vllm = evaluate(*kept)

    assert factorize(tiny, tmp_path / "folder", *BUILT_IN, "--dtype", "float32") == 0
    windows = cut_windows(FakeTokenizer(), python_docs_to_evaluate(), "docs", WINDOW, WINDOWS, WINDOW)
    tasks = [{"kind": "prompt_logprobs", "prompts": windows.tolist()}]
    served = engines.run(tmp_path / "folder", "xquant", tasks, **SERVER)
    plain = engines.run(tiny, "CPU_ATTN", tasks, **SERVER)
    for result, name in ((served, "window_perplexities"), (plain, "window_perplexities_16bit")):
        expected = [math.exp(-statistics.mean(logprobs)) for logprobs in result.tasks[0]["logprobs"]]
        assert through_vllm[name] == pytest.approx(expected, rel=1e-5)
    assert through_vllm["perplexity"] != pytest.approx(through_vllm["perplexity_16bit"], rel=1e-5)

    offline = evaluate("--through", "offline")
    for result in (through_vllm, offline):
        assert result["settings"]["factors"]["calibration"] == {"text": "python-docs", "tokens": 256}
    assert through_vllm["bytes_per_token"] == offline["bytes_per_token"] < offline["bytes_per_token_16bit"]
    # A last bit that another processor rounds differently makes another code now and then: 1.01e-4 on an AMD EPYC.
    for name, relative in (("perplexity_16bit", 1e-5), ("perplexity", 2e-4), ("kl", 0.05)):
        assert through_vllm[name] == pytest.approx(offline[name], rel=relative)

    # Nothing is left to ask an engine for.
    monkeypatch.setattr("xquant_vllm.cli.eval_subject.serve", None)
    assert evaluate(*kept) == through_vllm
