"""The provider of bases: what it takes from where, and what it refuses."""

import concurrent.futures
import json
import shlex
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from tests.engine_config import engine_config
from xquant_vllm.errors import SettingsError
from xquant_vllm.plugin.engine_factors import check_factors
from xquant_vllm.plugin.engine_settings import settings_of
from xquant_vllm.projection.factor_file import (
    FACTORS_FILE,
    FORMAT_VERSION,
    HEADER_FILE,
    TensorWriter,
    head_fingerprints,
    layer_shapes,
    layer_tensors,
    write_json,
)
from xquant_vllm.projection.layer import factorize_layer
from xquant_vllm.scheme import factor_cache
from xquant_vllm.scheme.factor_cache import FactorCache
from xquant_vllm.scheme.factor_conflicts import refuse_factors
from xquant_vllm.scheme.factor_header import (
    Calibration,
    ChainSettings,
    FactorHeader,
    FactorSettings,
    Source,
    read_header,
)
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.layer_weights import HeadShard, LayerWeights, spec_of
from xquant_vllm.scheme.settings import PerStream, parse_settings

LAYERS, KV_HEADS, HEAD_SIZE, HIDDEN = 3, 4, 8, 24


def weights_of(layer: int) -> LayerWeights:
    generator = torch.Generator().manual_seed(layer)
    key, value = (torch.randn(KV_HEADS * HEAD_SIZE, HIDDEN, generator=generator).bfloat16() for _ in range(2))
    return LayerWeights(layer, key, value, KV_HEADS)


def write_factors(folder, **settings):
    """Factors as the command writes them, but of bases that no computation would give: read ones are recognized."""
    parsed = parse_settings(settings)
    spec = spec_of(parsed, torch.bfloat16)
    shapes = {}
    for layer in range(LAYERS):
        shapes |= layer_shapes(layer, HIDDEN, KV_HEADS, HEAD_SIZE, spec.kind, spec.dtype)
    writer = TensorWriter(folder / FACTORS_FILE, shapes)
    fingerprints = []
    for weights in map(weights_of, range(LAYERS)):
        key, value = factorize_layer(weights.key, weights.value, KV_HEADS, spec)
        writer.write(layer_tensors(weights.layer_index, value, key))
        fingerprints.append(head_fingerprints(weights.key, weights.value, KV_HEADS))
    writer.close()
    outliers = parsed.outlier_channels
    header = FactorHeader(
        format=FORMAT_VERSION,
        package="0",
        source=Source(
            architecture="X",
            layers=LAYERS,
            hidden_size=HIDDEN,
            kv_heads=KV_HEADS,
            head_size=HEAD_SIZE,
            fingerprints=fingerprints,
        ),
        settings=FactorSettings(
            bits=PerStream(key=3, value=2),
            basis=parsed.basis,
            rotate=parsed.rotate,
            outlier_channels=PerStream(key=outliers.key, value=outliers.value),
        ),
        dtype="bfloat16",
        calibration=None,
        checksums=writer.checksums,
    )
    write_json(folder / HEADER_FILE, header.model_dump())
    return folder


def config_of(folder, *, ranks=1, dtype=torch.bfloat16, layers=LAYERS, **settings):
    sizes = {"layers": layers, "kv_heads": KV_HEADS, "head_size": HEAD_SIZE}
    return engine_config(folder, ranks=ranks, dtype=dtype, settings=settings, **sizes)


def provider_of(folder, shard=None):
    return FactorProvider(settings_of(config_of(folder)), folder, read_header(folder), shard)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "xquant_vllm"


@pytest.fixture
def warnings(monkeypatch):
    """What the cache warns of."""
    lines = []
    monkeypatch.setattr(
        "xquant_vllm.scheme.factor_cache.logger.warning", lambda line, *values: lines.append(line % values)
    )
    return lines


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_factors(tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "model")


def assert_same(bases, others):
    for basis, other in zip(bases, others, strict=True):
        assert torch.equal(basis.down, other.down)
        assert torch.equal(basis.up, other.up)


def computed(weights):
    return factorize_layer(
        weights.key, weights.value, weights.num_kv_heads, spec_of(parse_settings({}), torch.bfloat16)
    )


def test_a_fitting_file_is_read(folder, cache):
    with provider_of(folder) as provider:
        provider.announce(map(weights_of, range(LAYERS)))
        for layer in range(LAYERS):
            key, value = provider.layer_factors(weights_of(layer))
            assert_same((value, key), computed(weights_of(layer)))
    assert provider.describe(0.5) == f"factors read from {folder / FACTORS_FILE} (data-free) in 0.5 s"
    assert not cache.exists()


@pytest.mark.parametrize(("ranks", "heads"), [(2, [(0, 1), (2, 3)]), (4, [(0,), (1,), (2,), (3,)])])
def test_ranks_take_their_heads(folder, ranks, heads):
    whole, all_heads = weights_of(1), computed(weights_of(1))
    for rank, own in enumerate(heads):
        rows = slice(own[0] * HEAD_SIZE, (own[-1] + 1) * HEAD_SIZE)
        part = LayerWeights(1, whole.key[rows], whole.value[rows], len(own))
        provider = provider_of(folder, HeadShard.of_rank(rank, ranks, KV_HEADS))
        key, value = provider.layer_factors(part)
        assert_same((value, key), [type(b)(b.down[list(own)], b.up[list(own)]) for b in all_heads])


def test_ranks_that_share_a_head_start_at_it():
    assert [HeadShard.of_rank(rank, 8, 4).first for rank in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_weights_that_changed_are_refused(folder):
    weights = weights_of(2)
    weights.value[-1, -1] += 1
    with pytest.raises(
        SettingsError, match=r"xquant_factors.json is stale: .* layer 2 .* --out .*/model --bits 3 2 --force`"
    ):
        provider_of(folder).layer_factors(weights)


def test_another_models_file_is_refused(folder):
    narrow = LayerWeights(0, torch.zeros(32, 16), torch.zeros(32, 16), KV_HEADS)
    with pytest.raises(SettingsError, match=r"is of another model: .* hidden size 24, but layer 0 has 4 of 8 and 16"):
        provider_of(folder).layer_factors(narrow)
    with pytest.raises(SettingsError, match="is of another model: it is made of 3 layers"):
        check_factors(config_of(folder, layers=7), parse_settings({}))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda data: data[:-1], "is truncated or no safetensors file"),
        (lambda data: data[:4], "is truncated or no safetensors file"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is corrupt: the checksum of layers.2.value.up"),
    ],
)
def test_a_damaged_file_is_refused_before_weights_are_loaded(folder, damage, named):
    path = folder / FACTORS_FILE
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SettingsError, match=f"{FACTORS_FILE} {named}.*xquant factorize"):
        check_factors(config_of(folder), parse_settings({}))


@pytest.mark.parametrize("name", [FACTORS_FILE, HEADER_FILE])
def test_half_a_pair_is_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(SettingsError, match=f"{name} is missing"):
        check_factors(config_of(folder), parse_settings({}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 99}, "has format version 99"),
        ({"settings": {}}, "is no header of factors"),
        ({"dtype": "int4"}, "is no header of factors"),
        ({"checksums": {}}, None),
    ],
)
def test_another_header_is_refused(folder, change, named):
    path = folder / HEADER_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(SettingsError, match=named or "checksum of layers"):
        check_factors(config_of(folder), parse_settings({}))


def test_a_header_that_is_no_json_is_refused(folder):
    (folder / HEADER_FILE).write_text("{")
    with pytest.raises(SettingsError, match=f"{HEADER_FILE} is no JSON file"):
        settings_of(config_of(folder))


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"basis": "joint"}, ['basis "head"', "'basis' asks for \"joint\"", "--basis joint --bits 3 2 --force"]),
        ({"rotate": False}, ["rotate true", "--no-rotate --bits 3 2 --force"]),
        ({"outlier_channels": 2}, ["outlier_channels key 1 / value 0", "--outlier-channels 2 0 --bits 3 2 --force"]),
    ],
)
def test_settings_that_contradict_the_file_are_refused(folder, setting, named):
    with pytest.raises(SettingsError) as error:
        settings_of(config_of(folder, **setting))
    for part in [str(folder / HEADER_FILE), *named]:
        assert part in str(error.value)


def test_a_dtype_or_a_number_of_ranks_that_the_file_does_not_serve_is_refused(folder, tmp_path):
    check_factors(config_of(folder, ranks=2), parse_settings({}))
    with pytest.raises(
        SettingsError, match=r"is for --dtype bfloat16, but .* float32; .* --dtype float32 --bits 3 2 --force"
    ):
        check_factors(config_of(folder, dtype=torch.float32), parse_settings({}))
    (tmp_path / "joint").mkdir()
    joint = write_factors(tmp_path / "joint", basis="joint")
    check_factors(config_of(joint), parse_settings({}))
    with pytest.raises(SettingsError, match=r"--tensor-parallel-size 1 and not 2; .* --basis head --bits 3 2 --force"):
        check_factors(config_of(joint, ranks=2), parse_settings({}))


def test_the_folders_settings_are_defaults(tmp_path):
    folder = write_factors(tmp_path, basis="joint", rotate=False, outlier_channels={"key": 2, "value": 1})
    settings = settings_of(config_of(folder, group_size=8))
    assert (settings.bits.key, settings.bits.value, settings.basis, settings.rotate) == (3, 2, "joint", False)
    assert (settings.outlier_channels.key, settings.outlier_channels.value) == (2, 1)
    assert settings.group_size == 8
    assert settings_of(config_of(folder, bits=8, rotate=False)).bits.key == 8


def test_without_a_file_bases_are_computed_once_and_then_cached(cache):
    for expected in ("computed", "cached"):
        with FactorProvider(parse_settings({}), None, None, None) as provider:
            provider.announce(map(weights_of, range(LAYERS)))
            for layer in range(LAYERS):
                assert_same(provider.layer_factors(weights_of(layer)), computed(weights_of(layer)))
        assert f"factors {expected}" in provider.describe(0)
        assert len(list(cache.iterdir())) == LAYERS


def test_bases_of_keys_and_values_together_are_cached_beside_the_others(cache):
    together = [replace(weights_of(layer), together=True) for layer in range(LAYERS)]
    bases = []
    for expected in ("computed", "cached"):
        with FactorProvider(parse_settings({"method": "xquant-cl"}), None, None, None) as provider:
            provider.announce(together)
            bases.append([provider.joint_kv_basis(layer) for layer in together])
        assert f"factors {expected}" in provider.describe(0)
    for first, second, layer in zip(*bases, together, strict=True):
        assert torch.equal(first.down, second.down)
        assert torch.equal(first.lift, second.lift)
        columns = torch.cat((layer.key, layer.value)).float().T
        assert torch.allclose(first.down[0].float() @ first.lift @ columns, columns, atol=0.05 * columns.std().item())
    FactorProvider(parse_settings({}), None, None, None).layer_factors(weights_of(0))
    assert len(list(cache.iterdir())) == LAYERS + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda w: (w, {"basis": "joint"}),
        lambda w: (w, {"rotate": False}),
        lambda w: (w, {"outlier_channels": 2}),
        lambda w: (LayerWeights(0, w.key.float(), w.value.float(), KV_HEADS), {}),
        lambda w: (LayerWeights(0, w.value, w.key, KV_HEADS), {}),
        lambda w: (LayerWeights(0, w.key, w.value, KV_HEADS // 2), {}),
    ],
)
def test_whatever_changes_the_bases_changes_the_cached_file(cache, change):
    FactorProvider(parse_settings({}), None, None, None).layer_factors(weights_of(0))
    weights, settings = change(weights_of(0))
    FactorProvider(parse_settings(settings), None, None, None).layer_factors(weights)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:-1] + b"\x55"])
def test_a_damaged_entry_is_computed_anew_with_one_line(cache, damage, warnings):
    FactorProvider(parse_settings({}), None, None, None).layer_factors(weights_of(0))
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    provider = FactorProvider(parse_settings({}), None, None, None)
    assert_same(provider.layer_factors(weights_of(0)), computed(weights_of(0)))
    assert len(warnings) == 1
    assert str(entry) in warnings[0]
    assert "computed" in provider.describe(0)
    # All but the time at which it was made.
    assert load(entry.read_bytes()).keys() == load(whole).keys()
    assert all(torch.equal(tensor, load(whole)[name]) for name, tensor in load(entry.read_bytes()).items())


def test_a_folder_that_cannot_be_written_costs_one_line(cache, warnings):
    cache.parent.write_text("a file where the folder should be")
    provider = FactorProvider(parse_settings({}), None, None, None)
    for layer in range(2):
        assert_same(provider.layer_factors(weights_of(layer)), computed(weights_of(layer)))
    assert len(warnings) == 1
    assert '"factor_cache": false' in warnings[0]


def test_ranks_that_compute_the_same_layer_at_once_keep_one_entry(cache, warnings):
    """As two ranks with the same kv head do, and two engines side by side."""
    barrier = threading.Barrier(4)

    def rank(_):
        provider = FactorProvider(parse_settings({}), None, None, None)
        barrier.wait()
        return [provider.layer_factors(weights_of(layer)) for layer in range(LAYERS)]

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(rank, range(4)))
    for bases in answers:
        for layer in range(LAYERS):
            assert_same(bases[layer], computed(weights_of(layer)))
    assert warnings == []
    assert len(list(cache.iterdir())) == LAYERS  # and nothing unfinished


@pytest.mark.parametrize("links", [True, False])
def test_an_entry_is_not_replaced_under_a_rank_that_reads_it(cache, warnings, monkeypatch, links):
    """A reader takes checksums first and numbers then; another rank's numbers differ in rounding."""
    ours, other = FactorCache(cache), FactorCache(cache)
    path = cache / "entry.safetensors"
    shapes = {"x": (torch.float32, (3,))}
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    ours.store(path, {"x": torch.ones(3)})
    read = factor_cache.read_tensors

    def read_late(*arguments):
        if links:
            other.store(path, {"x": torch.full((3,), 1 + 1e-6)})
        return read(*arguments)

    monkeypatch.setattr(factor_cache, "read_tensors", read_late)
    assert torch.equal(ours.load(path, shapes)["x"], torch.ones(3))
    assert warnings == []
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_the_cache_can_be_turned_off(cache):
    FactorProvider(parse_settings({"factor_cache": False}), None, None, None).layer_factors(weights_of(0))
    assert not cache.exists()


def test_the_command_that_makes_factors_anew_says_all_that_is_not_a_default(tmp_path):
    folder = write_factors(tmp_path, basis="joint", rotate=False, outlier_channels={"key": 2, "value": 1})
    (folder / FACTORS_FILE).unlink()
    with pytest.raises(SettingsError) as error:
        check_factors(config_of(folder), settings_of(config_of(folder)))
    assert "--basis joint --bits 3 2 --no-rotate --outlier-channels 2 1 --force`" in str(error.value)
    with pytest.raises(SettingsError) as error:
        settings_of(config_of(folder, rotate=True, outlier_channels=1))
    assert "--rotate --outlier-channels 1 0 --basis joint --bits 3 2 --force`" in str(error.value)


def chain_header(**changes):
    settings = FactorSettings(
        bits=PerStream(key=2, value=2),
        basis="joint",
        rotate=True,
        outlier_channels=PerStream(key=1, value=0),
        allocation=[],
        chain=ChainSettings(first_layers=1, anchor_interval=8),
    )
    source = Source(architecture="X", layers=0, hidden_size=24, kv_heads=4, head_size=8, fingerprints=[])
    calibration = Calibration(text="t", tokens=9, ridge=0.1, gradient_ridge=0.05)
    return FactorHeader(
        format=FORMAT_VERSION,
        package="0",
        source=source,
        settings=settings,
        dtype="bfloat16",
        calibration=calibration,
        checksums={},
    ).model_copy(update=changes)


@pytest.mark.parametrize(
    ("asked", "options"),
    [
        ("", "--method xquant-cl --first-layers 1 --anchor-interval 8 --bits 2"),
        ("--bits 4", "--bits 4 --method xquant-cl --first-layers 1 --anchor-interval 8"),
        ("--method xquant", "--method xquant --bits 2"),
    ],
)
def test_the_command_that_makes_a_chain_anew_makes_a_chain(asked, options):
    error = str(refuse_factors(Path("/m/xquant_factors.json"), "is stale", chain_header(), asked))
    command = f"`xquant factorize /m --out /m {options} --calibration t --calibration-tokens 9"
    assert f"{command} --force` (with the path of t), or" in error
    assert error.endswith("or serve the model that it was made from")
    half = str(refuse_factors(Path("/m/xquant_factors.json"), "is stale", chain_header(dtype="float16"), asked))
    assert f"{command} --dtype float16 --force`" in half


def test_a_folder_with_an_odd_name_is_quoted():
    error = str(refuse_factors(Path("/my models/a'b/xquant_factors.json"), "is stale", None))
    assert shlex.split(error.split("`")[1])[2:5] == ["/my models/a'b", "--out", "/my models/a'b"]


def test_a_remedy_that_does_not_exist_is_not_told():
    assert str(refuse_factors(Path("/m/f.json"), "is odd", None, None)) == (
        "xquant: /m/f.json is odd; serve the model that it was made from"
    )
