"""What was loaded into layers, and what was not."""

from torch import nn
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from xquant_vllm.plugin.reload.linears import lost_weights


def test_weights_that_were_written_past_the_loaders_are_lost():
    model = nn.ModuleDict({name: nn.Linear(2, 3) for name in ("past", "partly", "processed")})
    names = ["processed.weight", "past.weight", "past.bias", "partly.weight", "unknown.weight"]
    for name, loaded in (("past", 0), ("partly", 4)):
        info = get_layerwise_info(model[name])
        info.load_numel, info.load_numel_total = loaded, 9
    assert lost_weights(model, names) == ["past.bias", "past.weight"]
