"""Two ranks that meet over NIXL, by vLLM's own handshake; the package itself is not needed for that."""

import socket
import threading
from types import SimpleNamespace

import msgspec
import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlHandshakePayload
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import NixlBaseConnectorScheduler

from xquant_vllm.errors import UnsupportedError
from xquant_vllm.plugin.connectors.nixl import FingerprintedWorker, compared
from xquant_vllm.plugin.connectors.transfers import blocks_written

PARTS = {"vllm": "00ff", "factors": "1", "settings": '{"bits": 4}', "rank": "0 of 1"}


@pytest.fixture(scope="module")
def listen():
    """Start what an engine listens with, comparing itself by a string; returns its port."""
    stop, threads = threading.Event(), []

    def listen(text):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        payload = msgspec.msgpack.encode(NixlHandshakePayload(text, b"no metadata"))
        ready = threading.Event()
        arguments = ({(0, 0): payload}, ready, stop, "127.0.0.1", port)
        threads.append(threading.Thread(target=NixlBaseConnectorScheduler._nixl_handshake_listener, args=arguments))
        threads[-1].start()
        assert ready.wait(10)
        return port

    yield listen
    stop.set()
    for thread in threads:
        thread.join()


def meet(port, parts):
    """As a worker whose caches are registered."""
    worker = FingerprintedWorker.__new__(FingerprintedWorker)
    worker._is_csa_linear, worker.use_host_buffer, worker.enforce_compat_hash = False, True, True
    worker.transfer_topo = SimpleNamespace(handshake_target_ranks=lambda *_: [0])
    worker.compat_hash = compared(parts)
    worker.shutdown = lambda: None
    return worker._nixl_handshake("127.0.0.1", port, 1, "another engine")


def test_the_same_are_met(listen):
    """It goes on to the metadata, of which there are none."""
    with pytest.raises(RuntimeError, match="Failed to decode NixlAgentMetadata"):
        meet(listen(compared(PARTS)), PARTS)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"factors": "2"}, "which has other: factors; start both with the same"),
        ({"settings": '{"bits": 3. Prefill and}', "vllm": "11"}, "which has other: settings, vllm; start"),
        ({"rank": "0 of 2"}, "which has other: rank; start"),
    ],
)
def test_whoever_differs_is_refused_by_what_differs(listen, caplog, theirs, said):
    port = listen(compared({**PARTS, **theirs}))
    with pytest.raises(UnsupportedError) as refused:
        meet(port, PARTS)
    assert str(refused.value).startswith(f"xquant: no pages are read from the engine at 127.0.0.1:{port}, {said}")
    assert refused.value.__cause__ is None
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [str(refused.value)]


def test_an_engine_of_another_backend_is_refused(listen):
    with pytest.raises(UnsupportedError, match="which does not run with --attention-backend xquant; start both"):
        meet(listen("5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"), PARTS)


def test_blocks_that_are_read_are_known():
    """So that their keys and values are not hot any more."""
    reads = {"a": SimpleNamespace(local_block_ids=([3, 4], [9])), "b": SimpleNamespace(local_block_ids=[])}
    assert blocks_written(SimpleNamespace(reqs_to_recv=reads)) == [3, 4, 9]
