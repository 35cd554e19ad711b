"""Which new weights are refused, before anything of the running model has changed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.engine_factors import factors_of
from xquant_vllm.plugin.kept_folder import kept_folder
from xquant_vllm.plugin.refusals import announced
from xquant_vllm.projection.factor_file import HEADER_FILE

# Their ``load_weights`` copies to parameters by itself, which are on the meta device while layers are reloaded. What
# others lose is noticed when it is lost.
_PAST_LOADERS = ("GptOssForCausalLM",)
# Of a configuration: nothing that decides what the model computes.
_FREE = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_FREE |= {"bos_token_id", "eos_token_id", "pad_token_id"}


@announced()
def refuse(why: str) -> None:
    """Refuse new weights.

    Args:
        why: what is wrong; no full stop.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        f"xquant: new weights cannot be loaded into a running model: {why}; it keeps the weights that it has: start "
        "the server anew with the new ones"
    )


def refuse_impossible(record: Any) -> None:
    """Refuse what a model could not be operated on with anew.

    Args:
        record: of the model.

    Raises:
        UnsupportedError: with the reason and what to do.
    """
    for why in _reasons(record):
        refuse(why)


def _reasons(record: Any) -> Iterator[str]:
    config = record.vllm_config
    if record.quantized:
        yield "its key and value projections were quantized, and their packed weights are gone"
    if config.lora_config is not None:
        yield "with --enable-lora its projections are wrapped; leave that out"
    if config.kv_transfer_config is not None:
        yield "a KV connector keeps pages that were made with the old ones; leave it out"
    if not record.own_folder and kept_folder(config) is not None:
        yield 'its factors were calibrated for the weights that it has; set "calibration": "none" to be able to'
    elif not record.own_folder and factors_of(config)[1] is not None:
        yield "its folder has factors, which are made for the weights beside them; serve a folder without"
    graphs = getattr(config.compilation_config.cudagraph_mode, "name", "NONE")
    if graphs != "NONE":
        yield (
            f"its CUDA graphs (cudagraph_mode {graphs}) read matrices at the addresses of the capture, and new ones "
            "lie elsewhere; to be able to, serve without such graphs: --compilation-config.cudagraph_mode none"
        )
    architecture = config.model_config.architecture
    if architecture in _PAST_LOADERS:
        yield f"vLLM's code of {architecture} writes some of its weights where reloading loses them"


def refuse_other_model(model_config: Any, folder: str) -> None:
    """Refuse the weights of a model that is built in another way than the one that runs.

    Args:
        model_config: vLLM's configuration of the model that runs.
        folder: where the new weights are.

    Raises:
        UnsupportedError: with the settings of ``config.json`` that differ.
    """
    from vllm.transformers_utils.config import get_config

    tables = []
    for place in (model_config.model, folder):
        try:
            tables.append(get_config(place, model_config.trust_remote_code).to_dict())
        except Exception as error:  # whatever reading a folder or asking a hub may raise
            refuse(f"the configuration in {place} cannot be read ({type(error).__name__}: {error})".splitlines()[0])
    ours, theirs = tables
    differ = sorted(name for name in (ours.keys() | theirs.keys()) - _FREE if ours.get(name) != theirs.get(name))
    if differ:
        refuse(f"{folder} is of another model, its config.json differs in {', '.join(differ)}")
    if (Path(folder) / HEADER_FILE).exists():
        refuse(f"{folder} has factors, whose pages may be others than those of the model that runs")
