"""The model on an RPC device: weights and pool in another process, a true second memory domain on one machine.

The model tests run again with every layer on the device; here its memory is watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import python

import asrkf_gguf

SERVER = asrkf_gguf._native.PROGRAM_FOLDER / "ggml-rpc-server"
# what bytes on another device can break; the rest is policy, the same on any device
SUITE = (
    "(device_bytes or same_bytes or never_frozen_run or 6000_tokens or regeneration or pinned or states_hold "
    "or host_limit or pool_that_holds_everything) and not direct"  # direct moves need host memory: refused there
)

pytestmark = pytest.mark.rpc


def resident_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@contextlib.contextmanager
def rpc_server():
    """A ggml-rpc-server on loopback; yields (endpoint, process)."""
    if not SERVER.exists():
        pytest.skip("the build has no ggml-rpc-server: set ASRKF_PROGRAMS (scripts/setup does)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(SERVER), "-H", "127.0.0.1", "-p", str(port), "-t", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    else:
        pytest.fail("ggml-rpc-server did not open its port")
    yield f"127.0.0.1:{port}", process
    process.terminate()
    process.wait(10)


def test_the_model_tests_pass_with_weights_and_pool_in_another_process():
    with rpc_server() as (endpoint, process):
        result = run_suite(endpoint)
        assert process.poll() is None
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout
    print(result.stdout.splitlines()[-1])


def test_direct_moves_are_refused_where_the_pool_is_not_host_memory(smollm2):
    with rpc_server() as (endpoint, _):
        code = "import sys, asrkf_gguf, conftest; conftest.register_rpc_device(); asrkf_gguf.Llama(sys.argv[1], n_ctx=1024, n_gpu_layers=-1, "
        code += "kv_policy='asrkf,pool=512,moves=direct', verbose=False)"
        environment = {**os.environ, "ASRKF_TEST_RPC": endpoint}
        command = [sys.executable, "-c", code, smollm2]
        result = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and "use moves=auto" in result.stderr


def test_the_graph_stays_whole_and_is_used_again_on_another_device():
    with rpc_server() as (endpoint, process):
        result = run_suite(endpoint, "test_graph.py", "pieces or (all_decode_steps and asrkf-1)")
        assert process.poll() is None
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def run_suite(endpoint: str, file: str = "test_llama.py", suite: str = SUITE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))", "-q", "-k", suite, "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(Path(__file__).parent / file)],
        env={**os.environ, "ASRKF_TEST_RPC": endpoint}, cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )


SCRIPT = """
import json, sys
import asrkf_gguf, conftest
from texts import topics_text
conftest.register_rpc_device()
model, policy = sys.argv[1:3]
llm = asrkf_gguf.Llama(model, n_ctx=8192, n_gpu_layers=-1, n_batch=64, n_ubatch=64, kv_policy=policy, verbose=False)
tokens = llm.tokenize(topics_text()[:40000].encode())[:3000]
for begin in range(0, 3000, 500):
    llm.eval(tokens[begin : begin + 500])
stats = llm.kv_stats()
print(json.dumps({"device": stats.device_kv_bytes, "host": stats.host_kv_bytes, "staging": stats.device_staging_bytes,
                  "index": stats.device_index_bytes, "compute": stats.device_compute_bytes,
                  "frozen": stats.frozen_cells, "moved": stats.moved_to_host_bytes}))
sys.stdout.flush()
input()
"""


def measure(model: str, policy: str) -> tuple[dict, int]:
    """The client's stats and the resident bytes of a server of its own, while the context is alive."""
    with rpc_server() as (endpoint, process):
        client = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, model, policy], env={**os.environ, "ASRKF_TEST_RPC": endpoint}, cwd=Path(__file__).parent,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        line = client.stdout.readline()
        assert line, "the client failed"
        resident = resident_bytes(process.pid)
        client.communicate("\n")
    return json.loads(line), resident


def test_the_servers_memory_shows_the_bound(smollm2):
    small, small_resident = measure(smollm2, "asrkf,pool=1024")
    full, full_resident = measure(smollm2, "full")
    assert full["device"] == 8 * small["device"] == 8192 * 23040
    assert small["frozen"] > 1900 and small["staging"] > 0
    assert small["host"] >= small["frozen"] * 23040
    # the server's KV, index and staging are touched, so they are resident; of compute buffers any part may be, no more
    kept = full["device"] - small["device"] - small["index"] - small["staging"]
    saved, slack = full_resident - small_resident, 4 << 20  # the rest: the same weights, each run's graphs and heap
    print(f"resident: full {full_resident >> 20} MiB, pool {small_resident >> 20} MiB; saved {saved / 2**20:.1f}, claimed {kept / 2**20:.1f} MiB, "
          f"compute buffers {full['compute'] / 2**20:.1f} and {small['compute'] / 2**20:.1f} MiB")  # fmt: skip
    assert kept - small["compute"] - slack < saved < kept + full["compute"] + slack
    assert small["compute"] + full["compute"] < kept / 4  # so the bounds say something


PARTLY = """
import conftest
from devices import check_that_it_freezes_as_on_the_cpu
from make_models import write_tiny
conftest.register_rpc_device()
write_tiny(path := MODEL, n_layer=4)
check_that_it_freezes_as_on_the_cpu(path, is_staged=STAGED, **OPTIONS)
"""


@pytest.mark.parametrize(
    ("options", "staged"),
    [
        pytest.param({"n_gpu_layers": 3}, True, id="some layers on the device"),
        pytest.param({"n_gpu_layers": -1, "offload_kqv": False}, False, id="weights on the device, the cache not"),
        pytest.param({"n_gpu_layers": 3, "offload_kqv": False}, False, id="some weights on the device, the cache not"),
    ],
)
def test_a_device_that_has_a_part_only_freezes_as_the_cpu_does(tmp_path: Path, options: dict, staged: bool):
    code = PARTLY.replace("MODEL", repr(str(tmp_path / "model.gguf"))).replace("OPTIONS", repr(options)).replace("STAGED", repr(staged))
    with rpc_server() as (endpoint, process):
        result = python(code, ASRKF_TEST_RPC=endpoint)
        assert process.poll() is None
    print(result.stdout)
    assert result.returncode == 0, result.stderr[-3000:]
