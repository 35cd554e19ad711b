"""Whether vLLM would find the plugin, and may load it."""

from xquant_vllm.diagnosis.entry_point import VALUE, entry_point_facts


def test_the_entry_point():
    assert entry_point_facts({}) == {"found": VALUE, "allowed": True}
    assert entry_point_facts({"VLLM_PLUGINS": "other,xquant"})["allowed"]
    assert not entry_point_facts({"VLLM_PLUGINS": "other"})["allowed"]
    assert not entry_point_facts({"VLLM_PLUGINS": ""})["allowed"]
