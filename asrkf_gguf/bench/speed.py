"""Seconds and resident bytes: sides in one run, interleaved, medians over rounds; each side in a process of its own.

speed: decoding at a depth against upstream's full cache, and against upstream with n_ctx = pool (the limit: the same
attention, nothing frozen), with the share of a step that scoring, policy and moves take. prefill: reading a prompt, and the
peak resident bytes of each process. Upstream's sides are the unpatched build (scripts/build_upstream); only one computes at
a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Optional

from ..stats import MIB
from ..texts import topics
from .records import Table, checkout, describe, results_file
from .sides import BATCH_TOKENS, Side

N_CTX = 8192
SPEED = ["date", "commit", "machine", "model", "threads", "command", "metric", "side", "value", "unit", "against", "ratio", "rounds", "config"]
SIZES = {"device KV": "device_kv_bytes", "device index": "device_index_bytes", "compute buffers": "device_compute_bytes", "host KV": "host_kv_bytes"}


def upstream_libraries() -> Path:
    """The folder of the unpatched build; ValueError says how to make it."""
    root = checkout()
    folder = (root or Path.cwd()) / "build-upstream" / "bin"
    if root is None or not any(folder.glob("*llama.*")):
        raise ValueError("no unpatched build beside which to measure: run scripts/build_upstream in a checkout")
    return folder


class SideProcess:
    """A side with one context in a process (process.py), which answers one JSON line per request."""

    def __init__(self, side: Side, depth: int, text: str, arguments: argparse.Namespace) -> None:
        self.name = side.name
        n_ctx = side.n_ctx(N_CTX)
        options = {
            "model": str(arguments.model.absolute()), "threads": arguments.threads, "n_ctx": n_ctx, "n_batch": BATCH_TOKENS, "depth": depth,
            "policy": side.policy, "pool": side.cells(N_CTX), "text": text[: n_ctx * 8],
        }  # fmt: skip
        environment = {key: value for key, value in os.environ.items() if key not in ("LLAMA_KV_POLICY", "LLAMA_CPP_LIB_PATH")}
        if not side.is_pooled:
            environment["LLAMA_CPP_LIB_PATH"] = str(upstream_libraries())
        program = Path(__file__).with_name("process.py")
        self._process = subprocess.Popen(
            [sys.executable, str(program)], env=environment, cwd=program.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._write(options)
        self.config = self.ask("config")["config"]

    def _write(self, line: dict[str, Any]) -> None:
        self._process.stdin.write(json.dumps(line) + "\n")  # type: ignore[union-attr]
        self._process.stdin.flush()  # type: ignore[union-attr]

    def ask(self, request: str, **arguments: object) -> dict[str, Any]:
        try:
            self._write({"do": request, **arguments})
            line = self._process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the side {self.name} died with status {self._process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.wait()


class SpeedTable:
    """Rows of results/speed.csv, printed as they are added."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.table = Table(arguments.out or results_file("speed.csv"), SPEED)
        self.fixed = {**describe(arguments), "rounds": arguments.rounds}

    def add(self, metric: str, side: SideProcess, value: float, unit: str, against: str = "", ratio: Optional[float] = None) -> None:
        figures = {"value": f"{value:.6g}", "unit": unit, "against": against, "ratio": "" if ratio is None else f"{ratio:.4f}"}
        self.table.add({**self.fixed, "metric": metric, "side": side.name, **figures, "config": side.config})
        print(f"  {metric:<28} {side.name:<22} {value:10.4g} {unit}" + (f"   {ratio:.3f} x {against}" if ratio is not None else ""))


def require_active(stats: dict[str, Any]) -> None:
    if not stats["frozen_cells"]:
        raise ValueError("nothing was frozen, so the figures would not show the policy: lower --pool or raise --depth")


def open_sides(arguments: argparse.Namespace, with_limit: bool) -> list[SideProcess]:
    """Upstream's full cache, ours, and on request the limit, a context of the pool's size."""
    text, pool = arguments.text.read_text() if arguments.text else topics(), str(arguments.pool)
    sides = [(Side("upstream full"), arguments.depth), (Side(side_name(arguments.policy), arguments.policy, pool), arguments.depth)]
    if with_limit:  # it goes back to its depth before each round: as full as it can be
        sides.append((Side("upstream n_ctx=pool", pool=pool, ctx_is_pool=True), arguments.pool - arguments.tokens - 8))
    return [SideProcess(side, depth, text, arguments) for side, depth in sides]


def side_name(policy: str) -> str:
    """The default policy is "ours"; another is named beside it, so that a table has both."""
    return "ours" if policy == "asrkf" else f"ours, {policy.removeprefix('asrkf,')}"


def speed(arguments: argparse.Namespace) -> int:
    upstream_libraries()
    table = SpeedTable(arguments)
    sides = full, ours, limit = open_sides(arguments, with_limit=True)
    for side in sides:
        print(f"reading the prompt: {side.name}", file=sys.stderr)
        side.ask("prefill")
        side.ask("decode", tokens=arguments.tokens, rewind=side is limit)  # warm
    warm = ours.ask("stats")["stats"]  # what follows is decoding alone
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    shares, branch = [], []
    for _ in range(arguments.rounds):
        for side in sides:
            answer = side.ask("decode", tokens=arguments.tokens, rewind=side is limit)
            times[side.name].append(statistics.fmean(answer["seconds"]))  # the mean: a decision comes every few tokens
            if side is ours:
                require_active(answer["stats"])
                shares.append(answer["host_seconds"] / sum(answer["seconds"]))
                branch.append(branch_share(answer))
    rate = {name: 1 / statistics.median(values) for name, values in times.items()}

    def ratio(side: SideProcess) -> float:
        """Paired: the ratio of each round, then the median."""
        return statistics.median(b / a for a, b in zip(times[ours.name], times[side.name], strict=True))

    table.add("decode", full, rate[full.name], "tok/s")
    table.add("decode", limit, rate[limit.name], "tok/s")
    table.add("decode", ours, rate[ours.name], "tok/s", full.name, ratio(full))
    table.add("decode", ours, rate[ours.name], "tok/s", limit.name, ratio(limit))
    table.add("policy, moves, read-back", ours, 100 * statistics.median(shares), "% of a step")
    table.add("scoring branch in the graph", ours, 100 * statistics.median(branch), "% of a step")
    stats = ours.ask("stats")["stats"]
    n_decoded = stats["decoded"] - warm["decoded"]
    token_bytes = sum(group["token_bytes"] for group in stats["groups"])
    to_device, to_host = (stats[key] - warm[key] for key in ("moved_to_device_bytes", "moved_to_host_bytes"))
    table.add("restored a token", ours, to_device / token_bytes / n_decoded, "tokens")
    table.add("moved a token", ours, (to_device + to_host) / MIB / n_decoded, "MiB")
    for side in sides:
        side.close()
    print(f"rows added to {table.table.path}")
    return 0


def branch_share(answer: dict[str, Any]) -> float:
    """What steps with scoring take more than those without, as a part of all steps' time."""
    steps = list(zip(answer["seconds"], answer["scored"], strict=True))
    scored, plain = [t for t, s in steps if s], [t for t, s in steps if not s]
    return (statistics.median(scored) - statistics.median(plain)) * len(scored) / sum(answer["seconds"])


def prefill(arguments: argparse.Namespace) -> int:
    upstream_libraries()
    table = SpeedTable(arguments)
    sides = full, ours = open_sides(arguments, with_limit=False)
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for round_ in range(arguments.rounds):
        for side in sides:
            print(f"round {round_ + 1} of {arguments.rounds}: {side.name}", file=sys.stderr)
            times[side.name].append(side.ask("prefill")["seconds"])
    ratio = statistics.median(b / a for a, b in zip(times[ours.name], times[full.name], strict=True))
    answers = {side.name: side.ask("stats") for side in sides}
    base, mine = answers[full.name]["stats"], answers[ours.name]["stats"]
    require_active(mine)
    table.add("prefill", full, arguments.depth / statistics.median(times[full.name]), "tok/s")
    table.add("prefill", ours, arguments.depth / statistics.median(times[ours.name]), "tok/s", full.name, ratio)
    for metric, key in SIZES.items():
        table.add(metric, full, base[key] / MIB, "MiB")
        table.add(metric, ours, mine[key] / MIB, "MiB", full.name if base[key] else "", mine[key] / base[key] if base[key] else None)
    peak, my_peak = (answers[side.name]["peak_resident_bytes"] for side in sides)
    table.add("peak resident", full, peak / MIB, "MiB")
    table.add("peak resident", ours, my_peak / MIB, "MiB", full.name, my_peak / peak)
    for side in sides:
        side.close()
    print(f"rows added to {table.table.path}")
    return 0
