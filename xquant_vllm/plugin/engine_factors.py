"""The factors in the model folder of a vLLM configuration: found, checked before a weight is loaded, and provided."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xquant_vllm.errors import FactorFileError
from xquant_vllm.plugin.kept_folder import kept_folder
from xquant_vllm.projection.factor_file import FACTORS_FILE, HEADER_FILE, dtype_name, read_json
from xquant_vllm.projection.predicted import layers_of_groups
from xquant_vllm.scheme.factor_conflicts import factors_in, over_factors, refuse_factors
from xquant_vllm.scheme.factor_header import FactorHeader
from xquant_vllm.scheme.factor_provider import FactorProvider
from xquant_vllm.scheme.factor_reader import read_layer, read_link
from xquant_vllm.scheme.layer_weights import HeadShard
from xquant_vllm.scheme.settings import XQuantSettings

# Which of the folder's files have the model's weights; vLLM reads all of them in a folder without one.
INDEX_FILE = "model.safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt")


def factors_of(vllm_config: Any) -> tuple[Path | None, FactorHeader | None]:
    """The folder of a model's factors, which is the model's own or where they were kept, and their header; or None.

    Raises:
        SettingsError: the header cannot be used.
    """
    model = getattr(getattr(vllm_config, "model_config", None), "model", None)
    if (kept := kept_folder(vllm_config)) is not None:
        return kept, factors_in(kept)
    if not isinstance(model, str) or not Path(model).is_dir():
        return None, None
    return Path(model), factors_in(Path(model))


def factor_provider(vllm_config: Any, settings: XQuantSettings) -> FactorProvider:
    """The provider of this rank's model.

    Raises:
        SettingsError: the model folder has factors that cannot be used.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    folder, header = factors_of(vllm_config)
    if header is None:
        return FactorProvider(settings, None, None, None, getattr(vllm_config.model_config, "model", None))
    total = vllm_config.model_config.get_total_num_kv_heads()
    ranks = vllm_config.parallel_config.tensor_parallel_size
    shard = HeadShard.of_rank(get_tensor_model_parallel_rank() if ranks > 1 else 0, ranks, total)
    return FactorProvider(settings, folder, header, shard)


def check_factors(vllm_config: Any, settings: XQuantSettings) -> None:
    """Refuse a model folder's factors that cannot be served, before a weight is loaded.

    Args:
        vllm_config: the configuration.
        settings: the settings, with the folder's defaults in them.

    Raises:
        SettingsError: with the file, what is wrong and the command to run.
    """
    folder, header = factors_of(vllm_config)
    if folder is None or header is None:
        return
    for problem, remedy in _problems(vllm_config, header, settings):
        raise refuse_factors(folder / HEADER_FILE, problem, header, remedy)
    _check_files(folder, header, settings)


def _check_files(folder: Path, header: FactorHeader, settings: XQuantSettings) -> None:
    """Refuse a folder whose factors are not whole, or that lets vLLM take them for weights of the model.

    Raises:
        SettingsError: with the file, what is wrong and the command to run.
    """
    # Its last layer is the first to be missing if the file is truncated.
    last = header.source.layers - 1
    if not header.joint_kv:
        read_layer(folder, last, header)
    else:
        chained = header.settings.chain is not None
        groups = layers_of_groups([not chained or settings.is_anchor(index) for index in range(last + 1)])
        read_link(folder, last, groups[last], header)
    if problem := index_problem(folder):
        raise refuse_factors(folder / INDEX_FILE, problem, header)


def index_problem(folder: Path) -> str:
    """Why vLLM would not read the model's own weights, or others too, by the folder's index; "" if it would."""
    if not os.path.lexists(folder / INDEX_FILE):
        weights = [path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.name != FACTORS_FILE]
        return f"is missing, without which vLLM takes {FACTORS_FILE} for weights of the model" if weights else ""
    try:
        files = read_json(folder / INDEX_FILE).get("weight_map")
    except FactorFileError as error:
        return str(error)
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        return "has no weight_map, which says in which file a weight is"
    # As vLLM compares them: names of files in this folder, and not what they lead to.
    there = {path.name for path in folder.glob("*.safetensors")}
    for file in sorted(set(files.values())):
        if file == FACTORS_FILE:
            return f"names {FACTORS_FILE}, which are no weights of the model"
        if file not in there:
            return f"names {file!r}, which is missing"
    return ""


def check_folder(model: Any) -> None:
    """Refuse a model folder's factors, as far as can be told without a configuration: vLLM may not get as far as one.

    Args:
        model: the name that the user gave.

    Raises:
        SettingsError: with the file, what is wrong and the command to run.
    """
    folder = Path(model) if isinstance(model, str) else None
    header = None if folder is None or not folder.is_dir() else factors_in(folder)
    if folder is not None and header is not None:
        _check_files(folder, header, over_factors(XQuantSettings(), folder, header))


def _problems(vllm_config: Any, header: FactorHeader, settings: XQuantSettings) -> Iterator[tuple[str, str]]:
    model, source = vllm_config.model_config, header.source
    ranks = vllm_config.parallel_config.tensor_parallel_size
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if dtype_name(model.dtype) != header.dtype:
        name = dtype_name(model.dtype)
        yield f"is for --dtype {header.dtype}, but the model is served in {name}", f"--dtype {name}"
    if header.settings.chain is not None and ranks > 1:
        yield (
            f"has a chain, whose latents do not shard, so it serves --tensor-parallel-size 1 and not {ranks}",
            "--method xquant --basis head",
        )
    elif header.settings.basis == "joint" and ranks > 1:
        yield (
            f'has the basis "joint", whose latents do not shard, so it serves --tensor-parallel-size 1 and not {ranks}',
            "--basis head",
        )
    if header.settings.chain is not None and stages > 1:
        anchors = _anchors(source.layers, settings)
        if cut := cut_links(vllm_config, source.layers, settings):
            yield (
                f"has a chain, and --pipeline-parallel-size {stages} would cut it before {_listed(cut)}; it can be cut "
                f"before {_listed(anchors)} (set VLLM_PP_LAYER_PARTITION, the number of layers of every rank)",
                "--method xquant",
            )
    shape = (model.get_total_num_hidden_layers(), model.get_total_num_kv_heads(), model.get_head_size())
    made_of = (source.layers, source.kv_heads, source.head_size)
    if shape != made_of:
        yield (
            f"is of another model: it is made of {made_of[0]} layers with {made_of[1]} kv heads of {made_of[2]}, but "
            f"this one has {shape[0]} layers with {shape[1]} of {shape[2]}",
            "",
        )


def cut_links(vllm_config: Any, layers: int, settings: XQuantSettings) -> list[int]:
    """Layers of a chain with which a rank of a pipeline would begin, although they build on the layers before.

    Args:
        vllm_config: the configuration.
        layers: of the model.
        settings: of the chain, with its defaults filled in.
    """
    stages = vllm_config.parallel_config.pipeline_parallel_size
    return sorted({*_first_layers(layers, stages)} - {0, *_anchors(layers, settings)})


def _anchors(layers: int, settings: XQuantSettings) -> list[int]:
    return [layer for layer in range(1, layers) if settings.is_anchor(layer)]


def _first_layers(layers: int, stages: int) -> list[int]:
    """The first layer of every rank of a pipeline, as vLLM cuts the model."""
    from vllm.distributed.utils import get_pp_indices

    return [get_pp_indices(layers, stage, stages)[0] for stage in range(stages)]


def _listed(numbers: list[int]) -> str:
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
