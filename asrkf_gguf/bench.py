"""The quality bench: what a pool costs in perplexity, KL divergence and needles, at how many bytes on the device.

Every side reads the same real texts. The reference is upstream's full cache in F16; what it predicts is kept in the cache
folder and reused, and so is every finished measurement: a run that was interrupted goes on where it stopped. Rows go to
CSV files with commit, machine, model, command and configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
from tqdm import tqdm

from . import _native  # before llama_cpp: it decides which libllama is loaded
from .config import FreezeConfig
from .divergence import kl_divergence, log_softmax
from .llama import Llama
from .models import cache_folder, resolve_model
from .texts import FILLER, NEEDLE_TASKS, PASSKEY_PREFACE, Needle, is_found, load_texts, make_needles

import llama_cpp  # isort: skip
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # isort: skip

MIB = 1 << 20
CELLS = 256  # pools and contexts are multiples of it
BATCH_TOKENS = 512
ANSWER_TOKENS = 12
QUESTION_TOKENS = 128  # room for question, chat template, and a haystack that takes more tokens when it is put together
DESCRIPTION = ["date", "commit", "machine", "threads", "model", "command"]
FIGURES = [
    "ppl", "ppl_ratio", "ppl_ratio_se", "kl_mean", "kl_se", "kl_p99", "top1_ratio",
    "device_kv_bytes", "device_index_bytes", "device_compute_bytes", "device_bytes", "host_kv_bytes",
    "moved_bytes_per_token", "restored_bytes_per_token", "rewalks", "decode_seconds_per_token",
]  # fmt: skip
QUALITY = [*DESCRIPTION, "text", "length", "positions", "passages", "chunk", "side", "config", "type", *FIGURES, "run"]
NEEDLES = [*DESCRIPTION, "texts", "task", "length", "side", "config", "type", "found", "asked", "device_bytes", "rewalks", "answers", "run"]


# sides

@dataclass(frozen=True)
class Side:
    """One way to keep the cache: a policy without its pool, the pool (cells, part of the length, or bytes), a cache type."""

    name: str
    policy: str = "full"
    pool: str = ""
    type: str = "f16"
    ctx_is_pool: bool = False
    """Upstream's cache in a context of pool cells: only the text's last tokens fit."""

    @property
    def is_pooled(self) -> bool:
        return self.policy.split(",")[0] != "full"

    def cells(self, length: int) -> Union[int, str, None]:
        """The pool in cells for texts of `length` tokens; a size in bytes as it is; None without a pool."""
        if not self.pool or self.pool.isdigit():
            return int(self.pool) if self.pool else None
        try:
            part = float(self.pool)
        except ValueError:
            return self.pool
        if not 0 < part <= 1:
            raise ValueError(f"side {self.name}: pool={self.pool} is neither cells (1024) nor a part of the length (0 to 1): try pool=0.33")
        return max(CELLS, round(part * length / CELLS) * CELLS)

    def n_ctx(self, length: int) -> int:
        return self.cells(length) if self.ctx_is_pool else math.ceil(length / CELLS) * CELLS  # type: ignore[return-value]


REFERENCE = Side("full-f16")


def default_sides(pool: str) -> dict[str, Side]:
    sides = [REFERENCE, Side("full-q8_0", type="q8_0"), Side("full-q4_0", type="q4_0"), Side("n_ctx=pool", pool=pool, ctx_is_pool=True)]
    sides += [Side(policy, policy, pool) for policy in ("window", "random", "flag-all", "paper", "asrkf")]
    return {side.name: side for side in [*sides, Side("asrkf-q8_0", "asrkf", pool, "q8_0")]}


def parse_side(text: str, pool: str) -> Side:
    """A default side by its name, or NAME=POLICY[;type=q8_0][;ctx=pool], POLICY being a kv_policy string with its pool."""
    defaults = default_sides(pool)
    if text in defaults:
        return defaults[text]
    name, equals, rest = text.partition("=")
    if not (name and equals and rest):
        raise ValueError(f"--side {text}: expected NAME=POLICY[;type=q8_0][;ctx=pool] or one of {', '.join(defaults)}")
    policy, *options = rest.split(";")
    values = dict(option.partition("=")[::2] for option in options)
    unknown = set(values) - {"type", "ctx"}
    if unknown or values.get("ctx", "pool") != "pool":
        raise ValueError(f"--side {text}: after ';' come type=... and ctx=pool, nothing else")
    pairs = policy.split(",")
    pools = [pair.partition("=")[2] for pair in pairs if pair.startswith("pool=")]
    policy = ",".join(pair for pair in pairs if not pair.startswith("pool="))
    side = Side(name, policy, "".join(pools[-1:]), values.get("type", "f16"), "ctx" in values)
    FreezeConfig.from_string(side.policy)  # refuses unknown keys and values
    cache_type(side)
    if side.ctx_is_pool and (side.is_pooled or not isinstance(side.cells(CELLS), int)):
        raise ValueError(f"--side {text}: ctx=pool is upstream's cache with few cells: full,pool=0.33;ctx=pool")
    if side.is_pooled and not side.pool and "@" not in side.policy:
        raise ValueError(f"--side {text}: {side.policy} needs a pool: add ,pool=0.33 (part of the length) or ,pool=1024 (cells)")
    return side


def chosen_sides(arguments: argparse.Namespace) -> list[Side]:
    """The reference first, then what was asked for; names are unique."""
    asked = [parse_side(text, arguments.pool) for text in arguments.side] or list(default_sides(arguments.pool).values())
    sides = [REFERENCE, *(side for side in asked if side != REFERENCE)]
    names = [side.name for side in sides]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--side {name}: the name is given twice ({REFERENCE.name} is the reference's): choose another")
    return sides


def cache_type(side: Side) -> int:
    value = getattr(llama_cpp, f"GGML_TYPE_{side.type.upper()}", None)
    if value is None:
        raise ValueError(f"side {side.name}: type={side.type} is unknown: f16, bf16, f32, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl")
    return value


def open_side(side: Side, length: int, arguments: argparse.Namespace) -> Llama:
    kind = cache_type(side)
    return Llama(
        str(arguments.model), n_ctx=side.n_ctx(length), n_batch=BATCH_TOKENS, n_ubatch=BATCH_TOKENS, n_gpu_layers=arguments.n_gpu_layers,
        n_threads=arguments.threads, n_threads_batch=arguments.threads, type_k=kind, type_v=kind, seed=1, verbose=False,
        kv_policy=side.policy, kv_pool=side.cells(length) if side.is_pooled else None,
    )  # fmt: skip


def config_text(llm: Llama) -> str:
    config = llm.kv_config()
    if config is None:
        return f"full,n_ctx={llm.n_ctx()}"
    if config.calibration:  # a path says nothing elsewhere
        config = dataclasses.replace(config, calibration=Path(config.calibration).name)
    return config.to_string()


def read_counters(llm: Llama) -> dict[str, Any]:
    """kv_stats() as a dict, with what this engine may not have as 0."""
    stats = {"device_index_bytes": 0, "rewalks_total": 0, **dataclasses.asdict(llm.kv_stats())}
    return {**stats, "device_bytes": stats["device_kv_bytes"] + stats["device_index_bytes"]}


def require_frozen(side: Side, length: int, stats: dict[str, Any]) -> None:
    if side.is_pooled and not stats["frozen_cells"]:
        raise SystemExit(
            f"bench: side {side.name} froze nothing at {length} tokens (pool of {stats['pool_cells']} cells): "
            "the row would not show the policy; lower its pool or raise --length"
        )


# arithmetic

def standard_error(values: np.ndarray) -> float:
    """Of the mean; positions are taken as independent."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def summarise(reference_nll: np.ndarray, nll: np.ndarray, kl: np.ndarray, agree: np.ndarray) -> dict[str, float]:
    """Pooled over positions. The error of the ratio is paired: delta method on the mean difference of the same positions."""
    difference = nll - reference_nll
    ratio = math.exp(difference.mean())
    return {
        "ppl": math.exp(nll.mean()), "ppl_ratio": ratio, "ppl_ratio_se": ratio * standard_error(difference),
        "kl_mean": float(kl.mean()), "kl_se": standard_error(kl), "kl_p99": float(np.percentile(kl, 99)), "top1_ratio": float(agree.mean()),
    }  # fmt: skip


# measuring

def feed(llm: Llama, tokens: Sequence[int], bar: Optional[tqdm] = None) -> None:
    """One eval of all tokens; the bar follows its batches."""
    seen = 0

    def advance(done: int, _total: int) -> None:
        nonlocal seen
        if bar is not None:
            bar.update(done - seen)
        seen = done

    llm.progress = advance
    llm.eval(tokens)
    llm.progress = None
    advance(len(tokens), len(tokens))


def clear(llm: Llama) -> None:
    llm.reset()
    llm._ctx.kv_cache_clear()


def last_logits(llm: Llama) -> np.ndarray:
    """Of the last token that was read; valid until the next one."""
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), shape=(llm.n_vocab(),))


def cut_passages(llm: Llama, name: str, text: str, length: int, n: int) -> list[list[int]]:
    """n passages of length + 1 tokens (the last is only predicted), one after the other from 20 % of the text on."""
    begin = len(text) // 5
    begin = max(begin, text.find("\n\n", begin) + 2)
    tokens = llm.tokenize(text[begin : begin + n * (length + 1) * 10].encode(), add_bos=True)
    head = tokens[:1] if tokens[:1] == [llm.token_bos()] else []
    body, size = tokens[len(head) :], length + 1 - len(head)
    if len(body) < n * size:
        raise ValueError(f"text {name}: {len(body)} tokens after its first fifth, {n} passages of {length} need {n * size}: a longer text, or less")
    return [head + body[i * size : (i + 1) * size] for i in range(n)]


def fit(llm: Llama, tokens: list[int], n_read: int) -> list[int]:
    """The newest tokens, with the first one if it is the model's beginning-of-sequence token: what a short context holds."""
    head = tokens[:1] if tokens[0] == llm.token_bos() else []
    return tokens if len(tokens) <= n_read else head + tokens[len(tokens) - n_read + len(head) :]


@dataclass
class Measured:
    """Per-position arrays over all passages of one text, and what the cache did while they were decoded."""

    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray
    seconds_per_token: float
    moved_bytes: int
    restored_bytes: int
    rewalks: int
    stats: dict[str, Any]


def measure(
    llm: Llama, passages: list[list[int]], positions: int, chunk: int = 1,
    reference: Optional[np.ndarray] = None, keep: Optional[np.ndarray] = None, bar: Optional[tqdm] = None,
) -> Measured:  # fmt: skip
    """Read all but `positions` tokens of each passage at once, then the rest in chunks as if generated.

    After each chunk the prediction of the next token is compared with its row of `reference` (log probabilities) and
    written to `keep`, if given. The seconds are a by-product of one run, not a benchmark: scripts/bench speed is one.
    """
    rows: list[tuple[float, float, bool]] = []
    seconds, moved_bytes, restored_bytes, rewalks = [], 0, 0, 0
    for tokens in passages:
        clear(llm)
        n_prefill = len(tokens) - 1 - positions
        feed(llm, tokens[:n_prefill], bar)
        before = read_counters(llm)
        for begin in range(n_prefill, len(tokens) - 1, chunk):
            began = time.perf_counter()
            llm.eval(tokens[begin : begin + chunk])
            logits = last_logits(llm)
            seconds.append((time.perf_counter() - began) / chunk)
            found = log_softmax(logits)
            expected = found
            if reference is not None:  # normalised again: it is stored in half precision, and KL must not be negative
                expected = log_softmax(np.asarray(reference[len(rows)], dtype=np.float64))
            if keep is not None:
                keep[len(rows)] = found
            rows.append((-float(found[tokens[begin + chunk]]), kl_divergence(expected, found), bool(expected.argmax() == found.argmax())))
            if bar is not None:
                bar.update(chunk)
        after = read_counters(llm)
        to_host, to_device = (after[key] - before[key] for key in ("moved_to_host_bytes", "moved_to_device_bytes"))
        moved_bytes, restored_bytes, rewalks = moved_bytes + to_host + to_device, restored_bytes + to_device, rewalks + after["rewalks_total"]
    nll, kl, agree = (np.array(column) for column in zip(*rows, strict=True))
    return Measured(nll, kl, agree, float(np.median(seconds)), moved_bytes, restored_bytes, rewalks, after)


# records and rows

class Table:
    """A CSV file that rows are appended to, each at once; a row is known by its `run`."""

    def __init__(self, path: Path, columns: list[str], again: bool = False) -> None:
        self.path, self.columns, self.rows = path, columns, []
        self._again = again
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = list(reader)
                if reader.fieldnames != columns:
                    raise ValueError(f"{path} has other columns than this version writes: move it away, or name another file with --out")
        else:
            path.write_text(",".join(columns) + "\n")

    def find(self, run: str) -> Optional[dict[str, Any]]:
        """The newest row of a run; None with --again, until it has been made anew."""
        return None if self._again else next((row for row in reversed(self.rows) if row["run"] == run), None)

    def add(self, row: dict[str, Any]) -> None:
        if self.find(row["run"]):
            return
        self.rows.append(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)


@functools.cache
def library_stamp() -> str:
    """Of the libraries' contents, not of the commit: a tree with changes has the commit of one without."""
    digest = hashlib.sha256()
    for path in sorted({path.resolve() for path in _native.LIBRARY_FOLDER.glob(f"*{_native._LIBRARY.suffix}*")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_key(side: Side, length: int, arguments: argparse.Namespace, **more: Any) -> str:
    """Names a measurement by all that decides its outcome. Upstream's cache does not change with our library (tested)."""
    status = arguments.model.stat()
    parts = {
        "model": [arguments.model.name, status.st_size, status.st_mtime_ns], "side": dataclasses.asdict(dataclasses.replace(side, name="")),
        "library": library_stamp() if side.is_pooled else llama_cpp.__version__, "length": length, "batch": BATCH_TOKENS, **more,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def checkout() -> Optional[Path]:
    candidates = (Path(__file__).resolve().parent.parent, Path(sys.argv[0]).resolve().parent.parent, Path.cwd())
    return next((path for path in candidates if (path / ".git").exists() and (path / "native/include/asrkf.h").exists()), None)


def results_file(name: str) -> Path:
    return (checkout() or Path.cwd()) / "results" / name


def describe(arguments: argparse.Namespace) -> dict[str, Any]:
    """The first columns of every row."""
    root = checkout()
    commit = importlib.metadata.version("asrkf-gguf")
    if root:
        def git(*command: str) -> str:
            return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

        changes = git("status", "--porcelain", "--", "native", "patches", "asrkf_gguf")
        commit = git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")] or [platform.processor() or platform.machine()]
    program = Path(sys.argv[0])
    command = shlex.join([f"scripts/{program.name}" if program.parent.name == "scripts" else program.name, *sys.argv[1:]])
    return {
        "date": time.strftime("%Y-%m-%d"), "commit": commit, "machine": f"{names[0]} x{os.cpu_count()}", "threads": arguments.threads,
        "model": arguments.model.name, "command": command,
    }  # fmt: skip


def load_record(path: Path) -> Optional[dict[str, Any]]:
    """Arrays nll, kl and agree, and the row made of them; None if there is no such record."""
    if not path.exists():
        return None
    with np.load(path) as file:
        return {**{name: file[name] for name in ("nll", "kl", "agree")}, "row": json.loads(str(file["row"]))}


def save_record(path: Path, measured: Measured, row: dict[str, Any]) -> dict[str, Any]:
    part = path.with_suffix(".part.npz")
    np.savez(part, nll=measured.nll, kl=measured.kl, agree=measured.agree, row=np.array(json.dumps(row)))
    part.rename(path)
    return {"nll": measured.nll, "kl": measured.kl, "agree": measured.agree, "row": row}


# quality

class Quality:
    """One run of `quality`: sides by lengths by texts; one context per side and length."""

    def __init__(self, arguments: argparse.Namespace, texts: dict[str, str], sides: list[Side]) -> None:
        self.arguments, self.texts, self.sides = arguments, texts, sides
        self.folder = cache_folder() / "bench"
        self.folder.mkdir(exist_ok=True)
        self.table = Table(arguments.out or results_file("quality.csv"), QUALITY, arguments.again)
        self.description = describe(arguments)
        self.rows: list[dict[str, Any]] = []

    def run_of(self, side: Side, length: int, text: str) -> str:
        arguments = self.arguments
        digest = hashlib.sha256(self.texts[text].encode()).hexdigest()
        return run_key(side, length, arguments, text=digest, positions=arguments.positions, passages=arguments.passages, chunk=arguments.chunk)

    def paths(self, side: Side, length: int, text: str) -> tuple[Path, Path]:
        """Of the record, and (of the reference only) of the matrix of log probabilities."""
        run = self.run_of(side, length, text)
        return self.folder / f"{run}.npz", self.folder / f"{run}.npy"

    def is_done(self, side: Side, length: int, text: str) -> bool:
        record, matrix = self.paths(side, length, text)
        return not self.arguments.again and record.exists() and (side != REFERENCE or matrix.exists())

    def run(self) -> None:
        jobs = [(length, side) for length in self.arguments.length for side in self.sides]
        missing = {(length, side.name): [text for text in self.texts if not self.is_done(side, length, text)] for length, side in jobs}
        total = sum(min(length, side.n_ctx(length)) * len(missing[length, side.name]) for length, side in jobs) * self.arguments.passages
        with tqdm(total=total, unit="tok", desc="quality", disable=None) as bar:
            for length, side in jobs:
                if missing[length, side.name]:
                    with contextlib.closing(open_side(side, length, self.arguments)) as llm:
                        for text in missing[length, side.name]:
                            bar.set_description(f"{side.name} {length} {text}")
                            self.measure_text(llm, side, length, text, bar)
                for text in self.texts:
                    row = load_record(self.paths(side, length, text)[0])["row"]  # type: ignore[index]
                    row["side"] = side.name  # the measurement is the same under another name
                    self.rows.append(row)
                    if text not in missing[length, side.name]:
                        self.table.add(row)

    def measure_text(self, llm: Llama, side: Side, length: int, text: str, bar: tqdm) -> None:
        arguments = self.arguments
        record_path, matrix_path = self.paths(side, length, text)
        passages = [fit(llm, tokens, side.n_ctx(length) + 1) for tokens in cut_passages(llm, text, self.texts[text], length, arguments.passages)]
        reference, keep, part = None, None, matrix_path.with_suffix(".part.npy")
        if side == REFERENCE:
            shape = (arguments.passages * arguments.positions // arguments.chunk, llm.n_vocab())
            keep = np.lib.format.open_memmap(part, "w+", np.float16, shape)
        else:
            reference = np.load(self.paths(REFERENCE, length, text)[1], mmap_mode="r")
        measured = measure(llm, passages, arguments.positions, arguments.chunk, reference, keep, bar)
        require_frozen(side, length, measured.stats)
        if keep is not None:
            keep.flush()
            part.rename(matrix_path)
        reference_record = load_record(self.paths(REFERENCE, length, text)[0]) if side != REFERENCE else None
        reference_nll = reference_record["nll"] if reference_record else measured.nll
        decoded = arguments.passages * arguments.positions
        figures = {
            **{key: measured.stats[key] for key in FIGURES if key in measured.stats},
            **summarise(reference_nll, measured.nll, measured.kl, measured.agree),
            "moved_bytes_per_token": measured.moved_bytes / decoded, "restored_bytes_per_token": measured.restored_bytes / decoded,
            "rewalks": measured.rewalks, "decode_seconds_per_token": measured.seconds_per_token,
        }  # fmt: skip
        row = {
            **self.description, "text": text, "length": length, "positions": arguments.positions, "passages": arguments.passages,
            "chunk": arguments.chunk, "side": side.name, "config": config_text(llm), "type": side.type,
            **{key: f"{value:.6g}" if isinstance(value, float) else value for key, value in figures.items()}, "run": record_path.stem,
        }  # fmt: skip
        save_record(record_path, measured, row)
        self.table.add(row)


def pooled(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per length and side: means over texts and the worst text; the newest row of each text counts."""
    newest = {(int(row["length"]), row["side"], row["text"]): row for row in rows}
    lines: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for (length, side, _), row in newest.items():
        lines.setdefault((length, side), []).append(row)
    result = []
    for (length, side), group in lines.items():
        worst = max(group, key=lambda row: float(row["kl_mean"]))
        result.append({
            "length": length, "side": side, "device_bytes": float(group[0]["device_bytes"]),
            "worst": worst["text"], "worst_kl": float(worst["kl_mean"]),
            "kl": float(np.mean([float(row["kl_mean"]) for row in group])), "top1": float(np.mean([float(row["top1_ratio"]) for row in group])),
            "ppl_ratio": math.exp(np.mean([math.log(float(row["ppl_ratio"])) for row in group])),
        })  # fmt: skip
    return sorted(result, key=lambda line: (line["length"], line["device_bytes"], line["kl"]))


def quality(arguments: argparse.Namespace) -> int:
    if arguments.positions % arguments.chunk:
        raise ValueError(f"--positions {arguments.positions} is no multiple of --chunk {arguments.chunk}")
    sides = chosen_sides(arguments)
    for length in arguments.length:
        for side in sides:
            if min(length, side.n_ctx(length)) <= arguments.positions:
                raise ValueError(
                    f"--positions {arguments.positions} leaves {side.name} nothing to read first of {min(length, side.n_ctx(length))} tokens: "
                    "lower --positions or raise --length or the pool"
                )
    run = Quality(arguments, load_texts(arguments.text), sides)
    run.run()
    print(f"{'length':>6}  {'side':<22}{'device MiB':>11}{'mean KL':>10}{'ppl ratio':>11}{'top-1':>8}  worst text (KL)")
    for line in pooled(run.rows):
        figures = f"{line['device_bytes'] / MIB:>11.1f}{line['kl']:>10.4f}{line['ppl_ratio']:>11.4f}{line['top1']:>8.3f}"
        print(f"{line['length']:>6}  {line['side']:<22}{figures}  {line['worst']} ({line['worst_kl']:.4f})")
    print(f"rows in {run.table.path}")
    return 0


# needles

def chat_prompt(llm: Llama, message: str) -> str:
    """The message in the model's own chat template; as a plain question if it has none."""
    template = llm.metadata.get("tokenizer.chat_template")
    if not template:
        return f"{message}\nAnswer:"
    bos, eos = (llm._model.token_get_text(token) if token != -1 else "" for token in (llm.token_bos(), llm.token_eos()))
    return Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)(messages=[{"role": "user", "content": message}]).prompt


def prompt_tokens(llm: Llama, prompt: str) -> list[int]:
    tokens = llm.tokenize(prompt.encode(), add_bos=True, special=True)
    return tokens[1:] if tokens[:2] == [llm.token_bos()] * 2 else tokens  # some templates write it themselves


def needle_prompts(
    llm: Llama, task: str, needle: Needle, source: str, length: int, positions: int
) -> list[tuple[list[int], list[int], list[int], str]]:
    """For each question: prompt, tokens fed one by one as if generated, tokens of the question after them, answer.

    Together with the answer they take at most `length` tokens.
    """
    n_generated = positions if task == "early-fact" else 0
    hidden = sum(len(llm.tokenize(sentence.encode(), add_bos=False)) for _, sentence in needle.sentences)
    n_haystack = length - n_generated - hidden - QUESTION_TOKENS - ANSWER_TOKENS
    tokens = llm.tokenize(source[: length * 10].encode(), add_bos=False)
    if n_haystack < CELLS or len(tokens) < n_haystack + n_generated:
        raise ValueError(f"task {task}: no haystack for {length} tokens in a text of {len(tokens)}: change --length, --positions or --text")
    haystack = needle.hide(llm.detokenize(tokens[:n_haystack]).decode(errors="ignore").strip())
    result = []
    for question, stem, answer in needle.questions:
        if task == "passkey-filler":  # a small model completes it, and answers no question about it
            prompt, suffix = f"{PASSKEY_PREFACE}{haystack} {stem}", ""
        elif task == "passkey-text":
            prompt, suffix = chat_prompt(llm, f"{haystack}\n\n{question} Answer with the number only."), ""
        else:
            prompt, suffix = (haystack, f"\n\n{question} {stem}") if n_generated else (f"{haystack}\n\n{question} {stem}", "")
        after = llm.tokenize(suffix.encode(), add_bos=False) if suffix else []
        result.append((prompt_tokens(llm, prompt), tokens[n_haystack : n_haystack + n_generated], after, answer))
    return result


def answer_greedily(llm: Llama) -> str:
    tokens: list[int] = []
    while len(tokens) < ANSWER_TOKENS:
        token = int(last_logits(llm).argmax())
        if token == llm.token_eos():
            break
        tokens.append(token)
        llm.eval([token])
    return llm.detokenize(tokens).decode(errors="replace")


def ask(llm: Llama, prompt: list[int], generated: list[int], question: list[int], bar: Optional[tqdm] = None) -> str:
    """The answer. What the cache still holds of the prompt is used again; what a short context cannot hold is left out."""
    excess = len(prompt) + len(generated) + len(question) + ANSWER_TOKENS - llm.n_ctx()
    prompt = prompt[max(0, excess) :]
    if not prompt:
        raise ValueError(f"{llm.n_ctx()} cells hold no prompt before {len(generated)} generated tokens: raise the pool or lower --positions")
    shared = 0
    while shared < min(llm.n_tokens, len(prompt) - 1) and llm.input_ids[shared] == prompt[shared]:
        shared += 1
    llm.n_tokens = shared  # the next eval cuts the cache back to it
    if bar is not None:
        bar.update(shared)
    feed(llm, prompt[shared:], bar)
    for token in generated:
        feed(llm, [token], bar)
    if question:
        feed(llm, question, bar)
    return answer_greedily(llm)


def run_needles(llm: Llama, side: Side, task: str, texts: dict[str, str], length: int, arguments: argparse.Namespace, bar: tqdm) -> dict[str, Any]:
    """Figures of one task; the questions on one haystack share its prompt."""
    answers, found, rewalks = [], 0, 0
    for i, needle in enumerate(needles := make_needles(task, arguments.needles)):
        text = list(texts.values())[i % len(texts)]
        begin = int(len(text) * (0.2 + 0.5 * i / len(needles)))
        source = FILLER * (length // 8) if task == "passkey-filler" else text[text.find(". ", begin) + 2 :]
        clear(llm)
        for prompt, generated, question, answer in needle_prompts(llm, task, needle, source, length, arguments.positions):
            output = ask(llm, prompt, generated, question, bar)
            found += is_found(answer, output)
            answers.append([answer, output])
        stats = read_counters(llm)
        require_frozen(side, length, stats)
        rewalks += stats["rewalks_total"]
    return {"found": found, "asked": len(answers), "device_bytes": stats["device_bytes"], "rewalks": rewalks, "answers": json.dumps(answers)}


def needles(arguments: argparse.Namespace) -> int:
    texts, sides, tasks = load_texts(arguments.text), chosen_sides(arguments), arguments.task or list(NEEDLE_TASKS)
    table = Table(arguments.out or results_file("needles.csv"), NEEDLES, arguments.again)
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()
    runs = {
        (length, side, task): run_key(side, length, arguments, task=task, texts=digest, needles=arguments.needles, positions=arguments.positions)
        for length in arguments.length for side in sides for task in tasks
    }  # fmt: skip
    description, rows = describe(arguments), {}
    total = sum(length * arguments.needles for (length, _, _), run in runs.items() if not table.find(run))
    with tqdm(total=total, unit="tok", desc="needles", disable=None) as bar:
        for length in arguments.length:
            for side in sides:
                missing = [task for task in tasks if not table.find(runs[length, side, task])]
                with contextlib.closing(open_side(side, length, arguments)) if missing else contextlib.nullcontext() as llm:
                    for task in tasks:
                        run = runs[length, side, task]
                        if task in missing:
                            bar.set_description(f"{side.name} {length} {task}")
                            figures = run_needles(llm, side, task, texts, length, arguments, bar)
                            about = {"texts": "+".join(texts), "task": task, "length": length, "side": side.name, "type": side.type}
                            rows[length, side, task] = {**description, **about, "config": config_text(llm), **figures, "run": run}
                            table.add(rows[length, side, task])
                        else:
                            rows[length, side, task] = table.find(run)
    print(f"{'length':>6}  {'side':<22}{'device MiB':>11}" + "".join(f"{task:>20}" for task in tasks) + "   found of what the full cache finds")
    for length in arguments.length:
        for side in sides:
            counts = "".join(f"{rows[length, side, task]['found']} of {rows[length, REFERENCE, task]['found']}".rjust(20) for task in tasks)
            print(f"{length:>6}  {side.name:<22}{int(rows[length, side, tasks[0]]['device_bytes']) / MIB:>11.1f}{counts}")
    print(f"rows in {table.path}")
    return 0


# plots

def plot(arguments: argparse.Namespace) -> int:
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install 'asrkf-gguf[bench]' or pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = plot_run(pyplot, arguments) if arguments.run else plot_quality(pyplot, arguments)
    path = arguments.out or results_file("run.png" if arguments.run else "quality.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(path)
    return 0


def plot_quality(pyplot: Any, arguments: argparse.Namespace) -> Any:
    """Mean KL over device bytes, one panel a length, from the newest row of each side, length and text."""
    source = arguments.rows or results_file("quality.csv")
    if not source.exists():
        raise ValueError(f"{source} does not exist: run the quality bench first, or name a file with --rows")
    with source.open(newline="") as file:
        lines = [line for line in pooled(csv.DictReader(file)) if line["kl"] > 0]  # the reference has none
    lengths = sorted({line["length"] for line in lines})
    if not lengths:
        raise ValueError(f"{source} has no row besides the reference's: run the quality bench with more sides")
    figure, axes = pyplot.subplots(1, len(lengths), figsize=(4 * len(lengths) + 2, 5), squeeze=False, sharey=True, layout="constrained")
    sides = list(dict.fromkeys(line["side"] for line in sorted(lines, key=lambda line: line["kl"])))
    markers = {side: ("osD^v"[i // 10 % 5], f"C{i % 10}") for i, side in enumerate(sides)}
    drawn: dict[str, Any] = {}
    for axis, length in zip(axes[0], lengths, strict=True):
        for line in lines:
            if line["length"] == length:
                marker, colour = markers[line["side"]]
                drawn[line["side"]] = axis.plot(line["device_bytes"] / MIB, line["kl"], marker, color=colour)[0]
        axis.set(yscale="log", xlabel="KV and index on the device, MiB", title=f"{length} tokens", xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="mean KL to the full F16 cache, nats")
    figure.legend([drawn[side] for side in sides], sides, loc="outside right upper")
    return figure


def plot_run(pyplot: Any, arguments: argparse.Namespace) -> Any:
    """Active and frozen cells, and entropy if the engine records it, while one text is read and continued."""
    side = parse_side(arguments.side, arguments.pool)
    if not side.is_pooled:
        raise ValueError(f"--side {arguments.side}: only a policy freezes, and upstream's cache has no trace: try --side asrkf")
    name, text = next(iter(load_texts(arguments.text).items()))
    with contextlib.closing(open_side(side, arguments.length, arguments)) as llm:
        tokens = cut_passages(llm, name, text, arguments.length, 1)[0][: arguments.length - arguments.positions]
        with llm.kv_trace() as trace, tqdm(total=arguments.length, unit="tok", desc="run", disable=None) as bar:
            feed(llm, tokens, bar)
            for _ in range(arguments.positions):
                feed(llm, [int(last_logits(llm).argmax())], bar)
        config = config_text(llm)
    ends = [step["pos"] + step["n_tokens"] for step in trace.steps]
    has_entropy = bool(trace.steps) and "entropy" in trace.steps[0]
    figure, axes = pyplot.subplots(1 + has_entropy, 1, figsize=(9, 4 + 2 * has_entropy), sharex=True, squeeze=False, layout="constrained")
    cells = [[step[key] for step in trace.steps] for key in ("active_cells", "frozen_cells")]
    axes[0][0].stackplot(ends, *cells, labels=["active", "frozen"], alpha=0.8)
    axes[0][0].axvline(len(tokens), color="black", linestyle=":", label="generation begins")
    axes[0][0].set(ylabel="tokens", title="\n".join(config[i : i + 110] for i in range(0, len(config), 110)))
    axes[0][0].title.set_fontsize(7)
    axes[0][0].legend(loc="upper left")
    if has_entropy:
        axes[1][0].plot(ends, [step["entropy"] for step in trace.steps], linewidth=0.8)
        axes[1][0].set(ylabel="entropy, nats")
    axes[-1][0].set(xlabel="position")
    return figure


# command line

def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", required=True)
    uses = {"quality": "perplexity and KL against the full cache", "needles": "facts found in long prompts", "plot": "a picture of rows, or of a run"}
    for name, text in uses.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--model", default="smollm2", help="path of a GGUF, smollm2, or hf:OWNER/REPO/FILE.gguf (default smollm2)")
        command.add_argument("--text", action="append", default=[], metavar="NAME=FILE",
                             help="repeatable; default: novel, essay, technical out of Debian packages; NAME=topics: Python's reference")
        command.add_argument("--pool", default="0.33", help="of the default sides: part of the length, or cells (default 0.33)")
        command.add_argument("--positions", type=int, default=512, help="last tokens of a text, decoded as if generated (default 512)")
        command.add_argument("--threads", type=int, default=2)
        command.add_argument("--n-gpu-layers", type=int, default=-1, help="layers on the GPU (default: all)")
        command.add_argument("--out", type=Path, help="file to write (default: in results/)")
        if name == "plot":
            command.add_argument("--rows", type=Path, help="rows to draw (default results/quality.csv)")
            command.add_argument("--run", action="store_true", help="draw active and frozen cells over one generation instead")
            command.add_argument("--side", default="asrkf", help="of --run: NAME=POLICY[;type=...], or a default side")
            command.add_argument("--length", type=int, default=4096, help="of --run, tokens (default 4096)")
            continue
        command.add_argument("--length", type=int, action="append", help="tokens, repeatable (default 4096)")
        command.add_argument("--side", action="append", default=[], metavar="NAME=POLICY[;type=q8_0][;ctx=pool]",
                             help=f"repeatable; POLICY with pool (asrkf,pool=0.33), or one of {', '.join(default_sides('0.33'))} (default: all)")
        command.add_argument("--again", action="store_true", help="measure anew what was measured")
    quality_command, needles_command = commands.choices["quality"], commands.choices["needles"]
    quality_command.add_argument("--chunk", type=int, default=1, help="tokens a decoding step (default 1)")
    quality_command.add_argument("--passages", type=int, default=1, help="passages of each text (default 1)")
    needles_command.add_argument("--needles", type=int, default=10, help="questions a task (default 10)")
    needles_command.add_argument("--task", action="append", choices=NEEDLE_TASKS, help="repeatable (default: all)")


def main(arguments: argparse.Namespace) -> int:
    if arguments.what != "plot" or arguments.run:
        arguments.model = resolve_model(arguments.model)
    for name in ("positions", "threads", "chunk", "passages", "needles"):
        if getattr(arguments, name, 1) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)}: at least 1")
    if arguments.what != "plot":
        arguments.length = arguments.length or [4096]
    return {"quality": quality, "needles": needles, "plot": plot}[arguments.what](arguments)
