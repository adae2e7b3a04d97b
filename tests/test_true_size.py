"""scripts/true_size, with a small model: upstream's cache does not fit under the limit, the pools do; and what makes it fail."""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import subprocess
import sys

import gguf
import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from make_llama3 import Shape, rope_factors, tensors, write_llama3

GIB = 1 << 30
SMALL = Shape(n_layer=32, n_embd=256, n_head=2, n_head_kv=2, n_ff=256)  # 4 GiB of K and V for 131,072 tokens


@pytest.fixture
def true_size():
    loader = importlib.machinery.SourceFileLoader("true_size", str(ROOT / "scripts" / "true_size"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("true_size", loader))
    loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of an address space, and /proc/self/status")
def test_under_a_limit_a_pool_reads_and_decodes_where_upstreams_cache_cannot_be_had(tmp_path):
    write_llama3(tmp_path / "small.gguf", SMALL)
    command = [sys.executable, str(ROOT / "scripts/true_size"), "--model", str(tmp_path / "small.gguf"), "--limit", "3GiB", "--pool", "512",
               "--large-pool", "1024", "--tokens", "800", "--decode", "3", "--out", str(tmp_path / "rows.csv")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    upstream, large, small = csv.DictReader((tmp_path / "rows.csv").open())
    assert upstream["outcome"].endswith(f"failed to allocate buffer of size {4 * GIB}")
    assert large["outcome"] == "loaded" and small["outcome"] == "decoded"
    assert int(large["full_kv_bytes"]) == 4 * GIB and int(large["device_kv_bytes"]) == 4 * GIB * 1024 // 131072
    assert int(small["frozen_cells"]) >= 803 - 512 and int(small["host_kv_bytes"]) >= int(small["frozen_cells"]) * 4 * GIB // 131072
    for row in (large, small):
        assert 0 < int(row["resident_peak_bytes"]) < int(row["address_peak_bytes"]) < int(row["limit_bytes"]) == 3 * GIB
    assert float(small["prompt_tokens_per_second"]) > 0 and float(small["decoded_tokens_per_second"]) > 0


@pytest.mark.parametrize(("rows", "says"), [
    ({"upstream": {"outcome": "loaded"}}, "upstream's cache fits"),
    ({"pool 8192": {"outcome": "failed to allocate buffer of size 1"}}, "pool 8192: failed to allocate"),
    ({"pool 512": {"outcome": "decoded", "frozen_cells": 290, "prompt_tokens": 800, "decoded_tokens": 3, "pool_cells": 512}}, "290 frozen"),
    ({"upstream": {"outcome": "failed"}, "pool 512": {"outcome": "loaded"}}, None),
])  # fmt: skip
def test_what_does_not_show_it_is_a_failure(true_size, rows, says):
    found = true_size.failures(rows)
    assert len(found) == (says is not None) and (says is None or says in found[0])


def test_the_model_has_llama_3_1_8bs_sizes():
    assert sum(int(np.prod(size)) for _, size, _ in tensors(Shape())) == 8030261248 + 64  # the model's parameters, and its rope factors
    factors = rope_factors(128, 500000.0)
    assert factors[0] == 1 and factors[-1] == 8 and np.all(np.diff(factors) >= 0)


def test_random_weights_have_the_spread_that_was_asked_for(tmp_path):
    write_llama3(tmp_path / "small.gguf", SMALL)
    for tensor in gguf.GGUFReader(tmp_path / "small.gguf").tensors:
        if tensor.name in ("blk.31.attn_q.weight", "blk.0.ffn_down.weight", "output.weight"):
            values = gguf.dequantize(tensor.data[:256], tensor.tensor_type)
            assert np.std(values) == pytest.approx(256**-0.5 * (1.5 if "attn_q" in tensor.name else 1), rel=0.05)
            assert len(np.unique(tensor.data[:256].reshape(-1, 18)[:, 2:], axis=0)) > 500  # not one block again and again


def test_committed_rows_show_it():
    path = ROOT / "results/true_size.csv"
    rows = {row["side"]: row for row in csv.DictReader(path.open())}
    assert int(rows["pool 2048"]["frozen_cells"]) > 0 and int(rows["pool 2048"]["full_kv_bytes"]) == 16 * GIB
    assert f"failed to allocate buffer of size {16 * GIB}" in rows["upstream"]["outcome"] and rows["pool 8192"]["outcome"] == "loaded"
    for row in rows.values():
        assert all(row[key] for key in ("commit", "machine", "model", "command", "config", "limit_bytes")) and "+changes" not in row["commit"]


def test_the_table_of_the_document_is_made_from_the_rows():
    made = subprocess.run([sys.executable, str(ROOT / "scripts/true_size"), "--table"], capture_output=True, text=True, check=True).stdout.strip()
    text = (ROOT / "docs/results.md").read_text()
    assert text.split("<!-- true size: scripts/true_size --table -->")[1].split("<!-- end of true size -->")[0].strip() == made
