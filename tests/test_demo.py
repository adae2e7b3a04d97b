"""The README's first command says what it shows: a fact that was frozen is recalled and answered."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "scripts" / "demo.py"


def test_the_demo_freezes_a_fact_recalls_it_and_answers_as_the_full_cache_does(smollm2: str):
    out = subprocess.run([sys.executable, str(DEMO), smollm2], capture_output=True, text=True, check=True).stdout
    full, pooled = (out.split(f"[{side}]\n")[1].split("\n")[0] for side in ("upstream's full cache", "asrkf, pool 2048"))
    assert full == pooled and "48291" in full
    end = int(re.search(r"At positions \d+ to (\d+) it says", out)[1])
    assert end < 5900 - 1024  # the window is half of the pool: the fact is far outside
    before, after = (int(re.search(rf"the fact, {when} the question +active +(\d+)% frozen", out)[1]) for when in ("before", "at"))
    assert before > 30 and after < before / 4


def test_the_demo_shows_what_the_same_bytes_buy(small: str):
    command = [sys.executable, str(DEMO), small, "--equal-bytes", "--tokens", "1000", "--pool", "512"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = {line.split("  ")[0]: re.split(r"  +", line)[1:] for line in out.splitlines() if re.match(r"(device|their)", line)}
    kv, index = ([float(cell) for cell in rows[f"device {what}, MiB"]] for what in ("KV", "index"))
    f16, _, q8_0, _, _, *pools = kv
    assert rows["their type"] == ["f16", "f16", "q8_0", "q8_0/q4_0", "q4_0", "q8_0", "f16"] and q8_0 < 0.6 * f16
    assert all(0.2 * f16 < pool + beside <= 0.34 * f16 for pool, beside in zip(pools, index[5:], strict=True))
    assert len(re.findall(r"^\[.+\]$", out, re.M)) == 7
