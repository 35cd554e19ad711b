"""The three forms of traces, and what is said of lines that have none of them."""

import json

import pytest

from tests.planning.traces.tokenizers import byte_tokenizer
from xquant_vllm.errors import RefusedError
from xquant_vllm.planning.traces.read import read_trace
from xquant_vllm.planning.traces.request_log import block_names


def written(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def hashed(time, prompt, ids, output=7):
    return {"timestamp": time, "input_length": prompt, "output_length": output, "hash_ids": ids}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "trace.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(byte_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_hash_ids_name_blocks_of_512_tokens(file):
    trace = read_trace(written(file, hashed(2000, 1300, [5, 6, 7]), "", hashed(0, 512, [5])), "", 16)
    assert (trace.block_size, trace.timed, trace.prompt_tokens) == (512, True, 1812)
    first, second = trace.requests
    assert (first.time, first.blocks) == (0.0, (5,))
    # The third block is not full.
    assert (second.time, second.blocks, second.output) == (2.0, (5, 6), 7)


def stored(hashes, parent=None, **more):
    return {"type": "BlockStored", "block_hashes": hashes, "parent_block_hash": parent, "block_size": 16, **more}


def test_kv_events_as_vllm_publishes_them(file):
    lines = [
        [100.0, [stored([1, 2, 3])], 0],
        {"ts": 101.0, "events": [stored([4], 3)]},
        [200.0, [stored([5], 4), {"type": "BlockRemoved", "block_hashes": [3], "medium": "GPU"}]],
        [201.0, [stored([9], group_idx=1), {"type": "AllBlocksCleared"}]],
        [202.0, [stored([7, 8], 2, medium="GPU"), stored([6], medium="CPU")]],
    ]
    trace = read_trace(written(file, *lines), "", 512)
    assert (trace.block_size, trace.timed) == (16, True)
    first, second, third = trace.requests
    # A second later the same request has filled a block; a hundred seconds later it is the next turn.
    assert (first.blocks, first.answers, first.prompt, first.output) == ((1, 2, 3), (4,), 48, 16)
    assert (second.time, second.blocks) == (100.0, (1, 2, 3, 4, 5))
    assert third.blocks == (1, 2, 7, 8)


def test_single_events_have_no_times(file):
    trace = read_trace(written(file, stored(["a"]), stored(["b"], "a")), "", 16)
    assert not trace.timed
    assert trace.requests[0].answers == ("b",)


def test_events_are_what_vllm_encodes(file):
    """The names of fields and the form of a batch are vLLM's own."""
    msgspec = pytest.importorskip("msgspec")
    events = pytest.importorskip("vllm.distributed.kv_events")
    event = events.BlockStored(
        block_hashes=[11, 12], parent_block_hash=None, token_ids=[0] * 32, block_size=16,
        lora_id=None, medium="GPU", lora_name=None, group_idx=0,
    )  # fmt: skip
    removed = events.BlockRemoved(block_hashes=[11], medium="GPU")
    batch = events.KVEventBatch(ts=1.5, events=[event, removed, events.AllBlocksCleared()])
    trace = read_trace(written(file, msgspec.json.encode(batch).decode()), "", 512)
    assert trace.requests[0].blocks == (11, 12)


def test_logs_of_requests_are_tokenized(file, model):
    chat = {"messages": [{"role": "user", "content": "hello " * 20}], "created": 1700000010, "max_tokens": 9}
    batch = {"custom_id": "1", "body": {"prompt": "once upon a time"}, "timestamp": "2023-11-14T22:13:20Z"}
    trace = read_trace(written(file, {**chat, "usage": {"completion_tokens": 5}}, batch), model, 16)
    assert (trace.block_size, trace.timed) == (16, True)
    first, second = trace.requests
    assert (first.time, first.prompt, len(first.blocks)) == (0.0, 16, 1)
    assert (second.time, second.output) == (10.0, 5)
    assert second.prompt > 120


def test_prompts_that_begin_alike_have_the_same_first_blocks(file, model):
    texts = ["a" * 40, "a" * 32 + "b" * 8, [1, 2, 3]]
    trace = read_trace(written(file, *({"prompt": text} for text in texts)), model, 16)
    first, second, third = trace.requests
    assert first.blocks[:2] == second.blocks[:2]
    assert len(first.blocks) == 2
    assert third.prompt == 3
    assert not trace.timed
    assert block_names([1, 2, 3, 4], 2)[1] != block_names([5, 6, 3, 4], 2)[1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        (["", " "], "is empty"),
        (["{"], "line 1 is no JSON"),
        (["[1"], "line 1 is no JSON"),
        ([{"text": "hello"}], "line 1 is of no known form"),
        (["3"], "line 1 is of no known form"),
        ([hashed(0, 512, [1]), "oops"], "line 2 is no JSON"),
        ([hashed(0, 512, [1]), {"prompt": "x"}], "line 2 has no hash_ids"),
        ([hashed(0, 0, [])], "line 1 has 'input_length': 0"),
        ([hashed(0, "512", [1])], "line 1 has 'input_length': '512'"),
        ([hashed(0, 512, [1], output=-1)], "line 1 has 'output_length': -1"),
        ([hashed(None, 512, [1])], "line 1 has 'timestamp': None"),
        (["", hashed(0, 513, [1])], "line 2 has 1 hash_ids for 513 tokens; name every 512 tokens: 2 ids"),
        ([hashed(0, 512, [[1]])], "line 1 has 1 hash_ids"),
        ([stored([1]), hashed(0, 512, [1])], "line 2 is no batch of KV cache events"),
        ([stored([1]), stored([2]) | {"block_size": 32}], "line 2 has blocks of 32 tokens after blocks of 16"),
        ([stored([])], "line 1 has 'block_hashes'"),
        ([stored([1]) | {"block_size": None}], "line 1 has 'block_size': None"),
        ([["soon", [stored([1])]]], "line 1 has the time 'soon'"),
        ([[1.0, [{"type": "Other"}]]], "line 1 has an event without a known type"),
        ([{"prompt": "x"}, {"prompt": "y", "created": 3}], "line 2 has a time, unlike the first"),
        ([{"prompt": "x", "created": "soon"}], "line 1 has the time 'soon'"),
        ([{"prompt": 3}], "line 1 cannot be tokenized"),
        ([{"messages": "hello"}], "line 1 cannot be tokenized"),
    ],
)
def test_lines_that_cannot_be_read_are_named(file, model, lines, message):
    with pytest.raises(RefusedError) as refused:
        read_trace(written(file, *lines), model, 16)
    said = str(refused.value)
    assert message in said
    assert str(file) in said
    assert "\n" not in said


def test_files_that_cannot_be_read_are_named(tmp_path, file):
    with pytest.raises(RefusedError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl", "", 16)
    file.write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(RefusedError, match="cannot be read"):
        read_trace(file, "", 16)


def test_a_log_needs_a_tokenizer(file, tmp_path):
    with pytest.raises(RefusedError, match=r"the tokenizer of .* cannot be loaded"):
        read_trace(written(file, {"prompt": "x"}), str(tmp_path), 16)
