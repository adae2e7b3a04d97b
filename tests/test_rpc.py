"""The model on an RPC device: weights and pool in another process, a true second memory domain on one machine.

The model tests run again with every layer on the device; here its memory is watched.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
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
    "(device_bytes or same_bytes or never_frozen_run or regeneration or pinned or states_hold or host_limit or pool_that_holds_everything) "
    "and not direct and not moves "  # direct moves need host memory and are refused there, and staged ones are the default
    "and not full[1] and not full[2] and not 512-1] and not 768-1] and not 768-8]"  # of the types some: rows of all go there and back
)

pytestmark = pytest.mark.rpc


def resident_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024


@contextlib.contextmanager
def rpc_server(n_threads: int = 2):
    """A ggml-rpc-server on loopback; yields (endpoint, process)."""
    if not SERVER.exists():
        pytest.skip("the build has no ggml-rpc-server: set ASRKF_PROGRAMS (scripts/setup does)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(SERVER), "-H", "127.0.0.1", "-p", str(port), "-t", str(n_threads)]
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


AUTO = """
import dataclasses, json, sys
import asrkf_gguf, conftest
from asrkf_gguf.stats import read_device_memory
from texts import topics_text
conftest.register_rpc_device()
for policy in sys.argv[2:]:
    llm = asrkf_gguf.Llama(sys.argv[1], n_ctx=4096, n_gpu_layers=-1, n_batch=256, n_ubatch=256, kv_policy=policy, verbose=False)
    llm.eval(llm.tokenize(topics_text()[:20000].encode())[:2600])
    memory = [dataclasses.asdict(row) for row in read_device_memory(llm._ctx.ctx)]
    print(json.dumps({"stats": dataclasses.asdict(llm.kv_stats()), "memory": memory}))
    llm.close()
"""


def test_auto_measures_the_device_that_holds_the_layers(smollm2):
    """All fits the server's memory; under a limit a pool does, with its staging buffer and the margin."""
    limit = 690 << 20
    with rpc_server() as (endpoint, _):
        command = [sys.executable, "-c", AUTO, smollm2, "asrkf", f"asrkf,device_limit={limit}"]
        environment = {**os.environ, "ASRKF_TEST_RPC": endpoint}
        result = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    free, limited = map(json.loads, result.stdout.splitlines())
    assert (free["stats"]["pool_cells"], free["stats"]["type_k"], free["stats"]["frozen_cells"]) == (4096, "f16", 0)
    stats, (device,) = limited["stats"], [row for row in limited["memory"] if not row["is_host"]]
    assert "RPC" in device["name"] and device["name"] in stats["pool_choice"] and "690.0 MiB" in stats["pool_choice"]
    assert 256 <= stats["pool_cells"] < 4096 and (stats["type_k"], stats["type_v"]) == ("q8_0", "q5_0") and stats["frozen_cells"] > 0
    taken = device["weights_bytes"] + device["cache_bytes"] + device["compute_bytes"] + stats["device_staging_bytes"]
    assert stats["device_staging_bytes"] > 0 and taken + (512 << 20) <= limit


def test_the_graph_stays_whole_and_is_used_again_on_another_device():
    with rpc_server() as (endpoint, process):
        result = run_suite(endpoint, "test_graph.py", "pieces or (all_decode_steps and asrkf-1)")
        assert process.poll() is None
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout and "skipped" not in result.stdout


def test_compare_has_a_side_in_host_ram_where_the_model_is_on_another_device(small, tmp_path):
    out = tmp_path / "out.json"
    words = ["compare", small, "-c", "1024", "--positions", "8", "--rounds", "1", "--pools", "0.3", "-t", "1", "--json", str(out)]
    with rpc_server(n_threads=1) as (endpoint, _):
        code = "import sys, conftest; from asrkf_gguf.cli import main; conftest.register_rpc_device(); sys.exit(main(sys.argv[1:]))"
        result = subprocess.run([sys.executable, "-c", code, *words], env={**os.environ, "ASRKF_TEST_RPC": endpoint}, cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=False)  # fmt: skip
    assert result.returncode == 0, result.stderr
    content = json.loads(out.read_text())
    sides = {side["name"]: side["memory"] for side in content["sides"]}
    full, in_ram = sides["upstream f16"], sides["upstream f16 in RAM"]
    assert content["reference"] == "upstream f16" and content["notes"] == [] and any("RPC" in name for name in content["weights_bytes"])
    assert (in_ram["device_kv_bytes"], in_ram["host_kv_bytes"]) == (0, full["device_kv_bytes"]) and full["host_kv_bytes"] == 0
    assert sides["pool 30%"]["device_staging_bytes"] > 0 and sides["pool 30%"]["host_kv_bytes"] > 0


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


COUNT = """
import json, os, sys
from rpc_proxy import CountingProxy
proxy = CountingProxy(os.environ["ASRKF_TEST_RPC"])
os.environ["ASRKF_TEST_RPC"] = proxy.endpoint
import asrkf_gguf, conftest
conftest.register_rpc_device()
model, policy = sys.argv[1:3]
llm = asrkf_gguf.Llama(model, n_ctx=2048, n_gpu_layers=-1, n_batch=64, n_ubatch=64, kv_policy=policy, verbose=False)
llm.eval([7 * i % 251 for i in range(600)])
steps = []
for i in range(96):
    messages, n_bytes, before = proxy.messages.copy(), proxy.bytes, llm.kv_stats()
    with llm.kv_trace() if policy != "full" else __import__("contextlib").nullcontext() as trace:
        llm.eval([5 * i % 251])
        llm._ctx.get_logits_ith(-1)  # has waited for the answer to all that was asked
    after = llm.kv_stats()
    step = trace.steps[0] if trace else {}
    steps.append({"messages": (proxy.messages - messages).total(), "bytes": proxy.bytes - n_bytes, "scored": step.get("scored"),
                  "moved": [after.moved_to_host_bytes - before.moved_to_host_bytes, after.moved_to_device_bytes - before.moved_to_device_bytes]})
print(json.dumps({"steps": steps, "staging": llm.kv_stats().device_staging_bytes, "groups": len(llm.kv_stats().groups)}))
"""


def count(model: str, policy: str) -> dict:
    """Messages and bytes of each of 96 decode steps after a prompt longer than the pool."""
    with rpc_server() as (endpoint, _):
        environment = {**os.environ, "ASRKF_TEST_RPC": endpoint}
        command = [sys.executable, "-c", COUNT, model, policy]
        result = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def twelve_layers(tmp_path_factory: pytest.TempPathFactory) -> str:
    from make_models import write_tiny

    path = tmp_path_factory.mktemp("models") / "twelve.gguf"
    write_tiny(path, n_layer=12)
    return str(path)


def plain_messages(steps: list[dict], scored: bool | None) -> int:
    return statistics.mode(step["messages"] for step in steps if not any(step["moved"]) and step["scored"] == scored)


LAYERS = "/".join(f"{il}@{(512, 768)[il % 2]}" for il in range(12))


KEYS = {
    name: f"asrkf,{keys},window=128"
    for name, keys in (("one group", "pool=512"), ("twelve groups", f"layers={LAYERS}"), ("own ranking", f"layers={LAYERS},ranking=own"))
}


@pytest.mark.parametrize("policy", KEYS.values(), ids=list(KEYS))
def test_a_plain_decode_step_is_at_most_three_messages_more_than_upstreams(twelve_layers, policy):
    full, ours = count(twelve_layers, "full"), count(twelve_layers, policy)
    upstream, plain = plain_messages(full["steps"], None), plain_messages(ours["steps"], 0)
    print(f"upstream {upstream} messages, {full['steps'][50]['bytes']} bytes; with the policy {plain}, {ours['steps'][50]['bytes']} bytes")
    assert plain <= upstream + 3


def test_a_decision_is_at_most_eight_messages_for_each_staging_buffer_full_whatever_the_number_of_layers(twelve_layers):
    ours = count(twelve_layers, f"asrkf,layers={LAYERS},window=128")
    assert ours["groups"] == 12
    decisions = [step for step in ours["steps"] if any(step["moved"])]
    assert sum(step["moved"][0] > 0 for step in decisions) > 2 < sum(step["moved"][1] > 0 for step in decisions)
    for step in decisions:
        more = step["messages"] - plain_messages(ours["steps"], step["scored"])
        print(f"{step['moved']} bytes moved: {more} messages more, {step['bytes']} bytes in all")
        assert more <= 8 * -(-max(step["moved"]) // ours["staging"])
    print(f"plain steps: {plain_messages(ours['steps'], 0)} messages; staging buffer {ours['staging']} bytes")
