"""Pages that one engine has written and another reads: the answers are those of the engine's own prefix cache.

Equal to the last bit: the same bytes are attended to. An engine whose pages say something else finds nothing.
"""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.families.test_families import ENGINE, GEMMA3_KEPT, PROMPT
from tests.factorizing import FakeTokenizer, factorize
from xquant_vllm.plugin.connectors.keys import TokenKeys

pytestmark = pytest.mark.e2e

CACHED = 192  # of the prompt's 200 tokens, what whole blocks of 32 hold
LATENT = {"bits": 4, "cache": "latent"}
CHAIN = {"method": "xquant-cl", "bits": 4}
CASES = {
    "latents": ("llama", LATENT, {}),
    "X, hot": ("mha", {"bits": 4, "cache": "x"}, {}),
    "chain of X": ("mha", {**CHAIN, "cache": "x", "hot": 0}, {}),
    "chain of latents, hot, in bfloat16": ("qwen2", CHAIN, {"dtype": "bfloat16"}),
    "windows": ("gemma3", LATENT, {}),
    "windows in 16 bit, in blocks of another size": ("gemma3", LATENT, {"attention_config": GEMMA3_KEPT}),
}
# Left out of most runs.
SELDOM = ("chain of latents, hot, in bfloat16", "windows in 16 bit, in blocks of another size")


def transfer(folder, role, **settings):
    extra = {"folder": str(folder), **settings}
    return {"kv_connector": "XQuantConnector", "kv_role": role, "kv_connector_extra_config": extra}


def logits(*prompts):
    return [{"kind": "next_logits", "prompts": [prompt], "max_tokens": 4} for prompt in prompts]


@pytest.fixture(scope="module")
def serve(engines):
    def serve(model, pages, role, tasks, xquant, **settings):
        connector = {"kv_transfer_config": transfer(pages, role)}
        return engines.run(model, "xquant", tasks, xquant=xquant, **{**ENGINE, **connector, **settings})

    return serve


@pytest.mark.alike(keep=2)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly if name in SELDOM else ()) for name in CASES]
)
def test_a_reader_answers_as_the_writer_does_from_its_own_cache(serve, tiny, tmp_path, name):
    family, xquant, settings = CASES[name]
    writer = serve(tiny(family), tmp_path, "kv_producer", logits(PROMPT, PROMPT), xquant, **settings)
    cold, warm = writer.tasks
    assert cold["cached"] == [0]
    assert warm["cached"][0] > 100
    reader = serve(tiny(family), tmp_path, "kv_consumer", logits(PROMPT), xquant, **settings)
    assert reader.tasks == [warm]
    assert "could not be used" in reader.log
    assert " 0 could not be used" in reader.log
    assert ("of the cache keep the keys and values" in reader.log) == ("hot" in name)


@pytest.fixture(scope="module")
def written(serve, tiny, tmp_path_factory):
    """Files of a prompt, and what their writer answered; copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("pages")
    prompts = [PROMPT, [*PROMPT[:64], *PROMPT[:100]], PROMPT[5:180], PROMPT[9:170]]
    writer = serve(tiny("llama"), folder, "kv_producer", logits(*prompts), LATENT)
    return folder, prompts, writer.tasks


def test_prefill_and_decode_in_processes_of_their_own(serve, tiny, written):
    """A producer that has ended; a consumer in a process that has seen nothing of it, with two prompts at once."""
    folder, prompts, answers = written
    task = {"kind": "next_logits", "prompts": prompts[:2], "max_tokens": 4}
    reader = serve(tiny("llama"), folder, "kv_consumer", [task], LATENT, environment={"VLLM_LOGGING_LEVEL": "INFO"})
    assert reader.tasks[0]["cached"] == [192, 160]
    assert reader.tasks[0]["tokens"] == [answer["tokens"][0] for answer in answers[:2]]
    assert "xquant: pages are shared with engines of the same fingerprint in" in reader.log


def other_weight(model, folder):
    """One bit of a matrix of the last layer's MLP."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"].view(-1)[77] *= 1 + 2**-20
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize(
    ("change", "xquant", "differs"),
    [
        (None, {**LATENT, "bits": 3}, "factors, pages, settings"),
        (None, {**LATENT, "basis": "joint"}, "factors, pages, settings"),
        (other_weight, LATENT, "weights"),
    ],
)
def test_whoever_reads_pages_differently_finds_none(serve, tiny, written, tmp_path, change, xquant, differs):
    folder, prompts, _ = written
    model = tiny("llama") if change is None else change(tiny("llama"), tmp_path / "model")
    reader = serve(model, folder, "kv_consumer", logits(prompts[0]), xquant)
    assert reader.tasks[0]["cached"] == [0]
    assert f"which have other: {differs}" in reader.log


def test_factors_from_another_text_are_others(serve, tiny, tmp_path):
    """The same model, settings and bytes per token."""
    answers = []
    for tokens in ("256", "192"):
        out = tmp_path / tokens
        options = ("--calibration", "python-docs", "--calibration-tokens", tokens, "--bits", "4", "--dtype", "float32")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())
            assert factorize(tiny("llama"), out, *options) == 0
        answers.append(serve(out, tmp_path / "pages", "kv_both", logits(PROMPT, PROMPT), {}))
    assert [[task["cached"] for task in answer.tasks] for answer in answers] == [[[0], [CACHED]]] * 2
    assert "which have other: factors" in answers[1].log


def path_of(folder, prompt, block):
    """The file of a block of 32 tokens."""
    keys = TokenKeys(None, 32)
    keys.extend(prompt)
    (path,) = folder.glob(f"*/*/{keys.at((block + 1) * 32).hex()}-0.pages")
    return path


def test_bad_files_are_never_served(serve, tiny, written, tmp_path):
    """What is found to be bad when it is read is computed, named once, and written anew."""
    folder, prompts, answers = written
    pages = shutil.copytree(folder, tmp_path / "pages")
    places = list(zip(prompts, (3, 4, 2, 1), strict=True))
    corrupt, half, foreign, gone = (path_of(pages, *place) for place in places)
    content = bytearray(corrupt.read_bytes())
    content[len(content) // 2] ^= 16
    corrupt.write_bytes(content)
    half.write_bytes(half.read_bytes()[:-1])
    shutil.copy(path_of(pages, prompts[3], 2), foreign)
    gone.unlink()
    part = gone.with_name("1-0123.part")
    part.write_bytes(b"half")
    reader = serve(tiny("llama"), pages, "kv_both", logits(*prompts), LATENT, enable_prefix_caching=False)
    assert [task["cached"] for task in reader.tasks] == [[0], [128], [0], [32]]
    assert [task["tokens"] for task in reader.tasks] == [task["tokens"] for task in answers]
    assert reader.tasks[0]["logits"] == answers[0]["logits"]
    complaints = [line for line in reader.log.splitlines() if "tokens are computed that were to come from" in line]
    assert len(complaints) == 2
    assert str(corrupt) in complaints[0]
    assert "is corrupt: its checksum is wrong" in complaints[0]
    assert str(foreign) in complaints[1]
    assert "has the pages of other tokens" in complaints[1]
    for place in places:
        assert path_of(pages, *place).read_bytes() == path_of(folder, *place).read_bytes()
