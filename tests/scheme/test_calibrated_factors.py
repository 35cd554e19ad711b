"""Calibrated folders as the command writes them: read, cut among ranks, and settings that contradict them."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tests.engine_config import engine_config
from tests.factorizing import FakeTokenizer, factorize
from tests.tiny_models import save_tiny_model
from xquant_vllm.cli.main import main
from xquant_vllm.errors import SettingsError
from xquant_vllm.offline.checkpoint import open_checkpoint
from xquant_vllm.plugin.engine_factors import check_factors
from xquant_vllm.plugin.engine_settings import settings_of
from xquant_vllm.projection.calibrated import layer_budget
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE
from xquant_vllm.scheme.factor_header import FactorHeader, read_header
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.formats import LayerFormat, LayerShape, layer_formats
from xquant_vllm.scheme.layer_weights import HeadShard, LayerWeights
from xquant_vllm.scheme.settings import XQuantSettings, parse_settings

LAYERS, KV_HEADS, HEAD_SIZE, HIDDEN = 3, 4, 32, 128
SIZES = (KV_HEADS, HEAD_SIZE, HIDDEN)
CALIBRATE = ("--calibration", "python-docs", "--calibration-tokens", 300, "--bits", 3)
KINDS = {
    "head": ("--basis", "head", *CALIBRATE),
    "joint": CALIBRATE,  # multi-head attention
    "chain": ("--method", "xquant-cl", "--anchor-interval", 2, *CALIBRATE),
    "data-free": (),
}


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda _: FakeTokenizer())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders by kind; copy before changing."""
    folder = tmp_path_factory.mktemp("calibrated")
    model = save_tiny_model(folder / "model", "mha")

    def made(kind: str) -> Path:
        out = folder / kind
        if not out.exists():
            assert factorize(model, out, *KINDS[kind]) == 0
        return out

    return made


@pytest.fixture
def folder_of(made, tmp_path):
    return lambda kind: shutil.copytree(made(kind), tmp_path / "model of mine")


def weights_of(folder: Path, layer: int, heads: slice = slice(None)) -> LayerWeights:
    pair = (weight.bfloat16() for weight in open_checkpoint(str(folder)).key_value(layer))
    key, value = (weight.unflatten(0, (KV_HEADS, -1))[heads].flatten(0, 1) for weight in pair)
    return LayerWeights(layer, key, value, key.shape[0] // HEAD_SIZE)


def config_of(folder, *, ranks=1, stages=1, dtype=torch.bfloat16, **settings):
    sizes = {"layers": LAYERS, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
    return engine_config(folder, ranks=ranks, stages=stages, dtype=dtype, settings=settings, **sizes)


@dataclass
class Rank:
    """One rank's view of a folder."""

    folder: Path
    kv_heads: int
    provider: FactorProvider
    formats: tuple[LayerFormat, ...]


def rank_of(folder: Path, rank=0, ranks=1, layers=range(LAYERS)) -> Rank:
    settings, kv_heads = settings_of(config_of(folder)), max(1, KV_HEADS // ranks)
    provider = FactorProvider(settings, folder, read_header(folder), HeadShard.of_rank(rank, ranks, KV_HEADS))
    shapes = [LayerShape(layer, HIDDEN, kv_heads, HEAD_SIZE) for layer in layers]
    allocations = {layer: provider.allocation(layer, kv_heads) for layer in layers}
    return Rank(folder, kv_heads, provider, layer_formats(settings, shapes, allocations))


def edit(folder: Path, change) -> None:
    content = json.loads((folder / HEADER_FILE).read_text())
    change(content)
    (folder / HEADER_FILE).write_text(json.dumps(content))


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def test_bases_of_every_head_with_their_bits(made):
    rank = rank_of(made("head"))
    budget = layer_budget(*SIZES, 3, joint_kv=False)
    for layer, form in enumerate(rank.formats):
        weights = weights_of(rank.folder, layer)
        for basis, weight in zip(rank.provider.layer_factors(weights), (weights.key, weights.value), strict=True):
            rebuilt = (basis.down.float() @ basis.up).mT.flatten(0, 1)
            # Not all of it: where sinks read back better, something else does a little worse.
            assert relative(rebuilt, weight.float()) < 0.1
        assert form.holds == "latents"
        assert [(stream.width, stream.num_heads) for stream in form.streams] == [(HEAD_SIZE, KV_HEADS)] * 2
        assert budget - 4 * KV_HEADS < form.bytes_per_token <= budget
    assert "(calibrated on 300 tokens)" in rank.provider.describe(0)


@pytest.mark.parametrize("kind", ["joint", "chain"])
def test_joint_latents_alone_and_in_a_chain(made, kind):
    rank = rank_of(made(kind))
    # The layer input is narrower than keys and values.
    budget = layer_budget(*SIZES, 3, joint_kv=True)
    assert budget == HIDDEN * 3 // 8 + 4
    assert [form.reads for form in rank.formats] == ([(), (0,), ()] if kind == "chain" else [()] * 3)
    stored, generator = [], torch.Generator().manual_seed(0)
    for layer, form in enumerate(rank.formats):
        assert form.holds == "joint_kv"
        assert [(stream.width, stream.num_heads) for stream in form.streams] == [(HIDDEN, 1)]
        assert budget - 8 < form.bytes_per_token <= budget
        weights = weights_of(rank.folder, layer)
        link = rank.provider.layer_link(weights, len(form.reads) + 1)
        # Whatever the input is: what is stored of it and of the layers before yields its keys and values.
        hidden = torch.randn(50, HIDDEN, generator=generator)
        own = hidden @ link.down.float()
        if not form.reads:
            assert link.prediction is None
            stored = []
        else:
            own = own - torch.cat(stored, 1) @ link.prediction[0]
        stored.append(own)
        for up, weight in ((link.up_key, weights.key), (link.up_value, weights.value)):
            read = torch.einsum("tw,hws->ths", torch.cat(stored, 1), up).flatten(1)
            assert relative(read, hidden @ weight.float().T) < 0.1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_take_the_bases_and_bits_of_their_heads(made, ranks):
    whole = rank_of(made("head"))
    for number in range(ranks):
        rank = rank_of(made("head"), number, ranks)
        first = number * KV_HEADS // ranks  # of eight ranks two hold the same head
        heads = slice(first, first + rank.kv_heads)
        for layer in range(LAYERS):
            bases = whole.provider.layer_factors(weights_of(whole.folder, layer))
            ours = rank.provider.layer_factors(weights_of(whole.folder, layer, heads))
            for stream in range(2):
                assert torch.equal(ours[stream].down, bases[stream].down[heads])
                assert torch.equal(ours[stream].up, bases[stream].up[heads])
                runs = whole.formats[layer].streams[stream].runs
                assert rank.formats[layer].streams[stream].runs == runs[heads]
    # Or else heads of the wrong rank would not be noticed.
    assert len({runs for form in whole.formats for stream in form.streams for runs in stream.runs}) > 2


@pytest.mark.parametrize("kind", ["head", "joint", "chain"])
def test_a_rank_of_a_pipeline_takes_the_bases_and_bits_of_its_layers(made, kind):
    """Its first layer is the model's third, in the file and in the header."""
    whole, last = rank_of(made(kind)), rank_of(made(kind), layers=[2])
    assert [replace(form, reads=()) for form in whole.formats[2:]] == list(last.formats)
    weights = weights_of(whole.folder, 2)
    if kind == "head":
        assert whole.formats[2].streams != whole.formats[0].streams  # or else the first layer's would do
        bases = [rank.provider.layer_factors(weights) for rank in (whole, last)]
        for ours, theirs in zip(*bases, strict=True):
            assert torch.equal(ours.down, theirs.down)
            assert torch.equal(ours.up, theirs.up)
        return
    ours, theirs = (rank.provider.layer_link(weights, 1) for rank in (whole, last))
    assert ours.prediction is None
    assert torch.equal(ours.down, theirs.down)
    assert torch.equal(ours.up_key, theirs.up_key)


def test_a_pipeline_may_cut_a_chain_at_its_anchors_only(made, monkeypatch):
    """Three layers, the first and the third of which are anchors. vLLM gives the first rank two of them."""
    chain = config_of(made("chain"), stages=2)
    check_factors(chain, settings_of(chain))
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "1,2")
    with pytest.raises(SettingsError, match="--pipeline-parallel-size 2 would cut it before layer 1; it") as error:
        check_factors(chain, settings_of(chain))
    assert "cut before layer 2 (set VLLM_PP_LAYER_PARTITION" in str(error.value)
    assert "--method xquant" in str(error.value)
    for kind in ("head", "joint", "data-free"):
        config = config_of(made(kind), stages=2)
        check_factors(config, settings_of(config))


def test_a_data_free_folder_has_no_bits_of_its_own(made):
    provider = FactorProvider(parse_settings({}), made("data-free"), read_header(made("data-free")), None)
    assert provider.allocation(0, KV_HEADS) is None
    assert provider.layer_link(weights_of(made("data-free"), 0), 1) is None
    assert FactorProvider(parse_settings({}), None, None, None).allocation(0, KV_HEADS) is None


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_changed_are_refused_with_the_command_that_made_the_folder(folder_of, kind, monkeypatch):
    folder = folder_of(kind)
    weights = weights_of(folder, 1)
    weights.value[-1, -1] += 1
    rank = rank_of(folder) if kind != "data-free" else None
    provider = rank.provider if rank else FactorProvider(parse_settings({}), folder, read_header(folder), None)
    with pytest.raises(SettingsError, match="is stale: the key and value weights of layer 1 are not") as error:
        provider.layer_factors(weights) if kind in ("head", "data-free") else provider.layer_link(weights, 2)
    before = read_header(folder)
    assert main([*command_in(error.value), "--no-certificate"]) == 0
    assert read_header(folder) == before


@pytest.mark.parametrize("kind", ["head", "joint", "chain"])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: data[:-1], "is truncated or no safetensors file"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), r"is corrupt: the checksum of layers\.2\."),
    ],
)
def test_a_damaged_file_is_refused_before_weights_are_loaded(folder_of, kind, damage, named):
    folder = folder_of(kind)
    settings = settings_of(config_of(folder))
    check_factors(config_of(folder), settings)
    path = folder / FACTORS_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SettingsError, match=f"{FACTORS_FILE} {named}.*xquant factorize .* --calibration python-docs"):
        check_factors(config_of(folder), settings)


def change_runs(layer, stream, head, runs):
    def change(content):
        content["settings"]["allocation"][layer][stream][head] = runs

    return change


@pytest.mark.parametrize(
    ("kind", "change", "named"),
    [
        ("head", lambda c: c["settings"]["allocation"].pop(), "not one per layer and latent head"),
        ("head", lambda c: c["settings"]["allocation"][1].pop(), "not one per layer and latent head"),
        ("head", lambda c: c["settings"]["allocation"][2][1].pop(), "not one per layer and latent head"),
        ("joint", lambda c: c["settings"]["allocation"][2].append([[[4, 16]]]), "not one per layer and latent head"),
        ("joint", lambda c: c["settings"].update(basis="head"), "not one per layer and latent head"),
        ("head", change_runs(1, 0, 3, [[5, 8]]), "of layer 1: a run of 5 bits is not supported"),
        ("head", change_runs(1, 0, 3, [[16, 8]]), "of layer 1: a run of 16 bits is not supported"),
        ("head", change_runs(0, 1, 0, [[4, 36]]), r"of layer 0: runs .* do not fit 32 channels"),
        ("head", change_runs(0, 1, 0, [[4, 6]]), "of layer 0: 6 codes of 4 bits cannot be packed"),
        ("head", change_runs(0, 1, 0, [[4, -4]]), "of layer 0: -4 codes of 4 bits cannot be packed"),
        ("head", change_runs(0, 1, 0, [[2, 8], [4, 8]]), "of layer 0: the bits of the runs .* ascend"),
        ("head", change_runs(0, 1, 0, []), "of layer 0: runs"),
        ("head", change_runs(0, 1, 0, [[4, 8, 2]]), r"settings\.allocation"),
        ("chain", change_runs(2, 0, 0, [[2, 132]]), "of layer 2: runs .* do not fit 128 channels"),
        ("joint", lambda c: c["settings"].update(bits=None), r"settings\.bits: missing"),
        ("chain", lambda c: c["settings"].update(allocation=None), r"settings\.chain: of factors that are no"),
        ("chain", lambda c: c["settings"]["chain"].update(bits=4), r"settings\.chain\.bits"),
        ("head", lambda c: c.update(format=1), "has format version 1, this version of xquant-vllm reads 2"),
        ("head", lambda c: c["calibration"].pop("gradient_ridge"), r"calibration\.gradient_ridge"),
    ],
)
def test_a_header_that_no_folder_can_have_is_refused_with_one_line(folder_of, kind, change, named):
    folder = folder_of(kind)
    edit(folder, change)
    with pytest.raises(SettingsError, match=named) as error:
        settings_of(config_of(folder))
    (line,) = str(error.value).splitlines()
    assert line.startswith(f"xquant: {folder / HEADER_FILE} ")
    assert "xquant factorize" in line


@pytest.mark.parametrize("kind", ["head", "joint", "chain"])
def test_settings_come_from_the_folder(made, kind):
    settings = settings_of(config_of(made(kind), factor_cache=False))
    assert settings.method == ("xquant-cl" if kind == "chain" else "xquant")
    assert settings.basis == ("head" if kind == "head" else "joint")
    assert (settings.bits.key, settings.bits.value) == (3, 3)
    assert (settings.first_layers, settings.anchor_interval) == ((1, 2) if kind == "chain" else (None, None))
    assert settings.factor_cache is False
    # Saying the same is no contradiction, nor is leaving it to the package.
    same = {"bits": 3, "cache": "latent", "method": settings.method, "group_size": None, "rotate": True}
    assert settings_of(config_of(made(kind), **same)).bits == settings.bits


def command_in(error: SettingsError) -> list[str]:
    """The words of the command that an error tells to run, but for the first."""
    (line,) = str(error).splitlines()
    (command,) = re.findall("`([^`]*)`", line)
    words = shlex.split(command)
    assert words[0] == "xquant"
    return words[1:]


@pytest.mark.parametrize(
    ("kind", "settings", "named"),
    [
        ("head", {"bits": 2}, "made with bits key 3 / value 3, but the setting 'bits' asks for key 2 / value 2"),
        ("head", {"bits": {"key": 4, "value": 2}}, "asks for key 4 / value 2"),
        ("joint", {"bits": 16}, "asks for key 16 / value 16"),
        ("head", {"basis": "joint", "bits": 2}, "'bits' asks for key 2 / value 2"),
        ("head", {"method": "xquant-cl", "anchor_interval": 0}, "'method' asks for \"xquant-cl\""),
        ("chain", {"method": "xquant-cl", "anchor_interval": 3, "first_layers": 2}, "'anchor_interval' asks for 3"),
        ("chain", {"method": "xquant"}, 'with method "xquant-cl"'),
        ("joint", {"rotate": False, "outlier_channels": 2}, "'outlier_channels' asks for key 2 / value 0"),
        ("joint", {"cache": "x"}, 'with cache "latent", but the setting \'cache\' asks for "x"'),
        ("head", {"group_size": 16, "skip_layers": [0]}, "'group_size' asks for 16"),
        ("data-free", {"method": "xquant-cl", "bits": 2}, 'with method "xquant"'),
        ("data-free", {"basis": "joint", "rotate": False, "bits": {"key": 4, "value": 2}}, "'basis' asks for"),
    ],
)
def test_settings_that_contradict_the_folder_are_refused_with_a_command_that_helps(folder_of, kind, settings, named):
    folder = folder_of(kind)
    with pytest.raises(SettingsError) as error:
        settings_of(config_of(folder, **settings))
    assert named in str(error.value)
    assert f"xquant: {folder / HEADER_FILE} is made with" in str(error.value)
    command = command_in(error.value)
    if "--bits" in command and not isinstance(settings.get("bits"), dict):
        # One number for both, as one types it.
        assert not command[command.index("--bits") + 2 : command.index("--bits") + 3][0].isdigit()
    assert main(command) == 0
    served = settings_of(config_of(folder, **settings))
    check_factors(config_of(folder), served)
    for name, value in parse_settings(settings):
        assert name not in settings or getattr(served, name) == value


@pytest.mark.parametrize("name", XQuantSettings.model_fields)
def test_any_other_setting_may_stand_beside_one_that_contradicts(made, name):
    others = {"hot": 0, "calibration": "none", "quality_probe": 0.01, "group_size": 16, "cache": "latent"}
    default = XQuantSettings.model_fields[name].default
    settings = {name: others.get(name, default), "bits": 2}
    with pytest.raises(SettingsError, match="'bits' asks for key 2 / value 2"):
        settings_of(config_of(made("head"), **settings))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("chain", {"skip_layers": [1]}),
        ("chain", {"anchor_bits": 4, "bits": 2}),
        ("chain", {"basis": "head"}),
        ("chain", {"bits": {"key": 4, "value": 2}}),
        ("data-free", {"method": "xquant-cl", "cache": "x"}),
    ],
)
def test_where_no_factors_would_do_no_command_is_told(made, kind, settings):
    if kind == "chain":
        settings = {"method": "xquant-cl", **settings}
    with pytest.raises(SettingsError, match=r"; serve the model that it was made from$") as error:
        settings_of(config_of(made(kind), **settings))
    assert "`" not in str(error.value)


@pytest.mark.parametrize("kind", ["joint", "chain"])
def test_joint_latents_serve_one_rank_and_the_command_makes_what_serves_more(folder_of, kind):
    folder = folder_of(kind)
    check_factors(config_of(folder), settings_of(config_of(folder)))
    with pytest.raises(SettingsError, match="do not shard, so it serves --tensor-parallel-size 1 and not 2") as error:
        check_factors(config_of(folder, ranks=2), settings_of(config_of(folder)))
    assert main(command_in(error.value)) == 0
    check_factors(config_of(folder, ranks=2), settings_of(config_of(folder)))
    header = read_header(folder)
    assert isinstance(header, FactorHeader)
    assert header.calibration is not None
    assert header.settings.bits.key == 3


def test_a_dtype_that_the_folder_does_not_serve_is_refused(folder_of):
    folder = folder_of("chain")
    with pytest.raises(SettingsError, match="is for --dtype bfloat16, but the model is served in float32") as error:
        check_factors(config_of(folder, dtype=torch.float32), settings_of(config_of(folder)))
    assert main(command_in(error.value)) == 0
    check_factors(config_of(folder, dtype=torch.float32), settings_of(config_of(folder)))
    assert read_header(folder).settings.chain is not None
    # And it stays so.
    with pytest.raises(SettingsError) as error:
        settings_of(config_of(folder, bits=2))
    assert "--dtype float32" in str(error.value)
