"""Arrows between the rooms point down only: a test reads imports and includes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The rooms of native/, and what each may include besides the standard library. "ggml" stands for ggml's public headers,
# "llama-" for llama.cpp's own (its src/); a room's name for all its files. Nothing includes the kernels' room: what it has to
# offer it offers by itself.
CUDA_HEADERS = {"<cuda_fp16.h>", "<cuda_runtime.h>", "<cuda_runtime_api.h>", "cuda_shim.h"}
NATIVE = {
    "policy": {"common.h", "policy"},
    "store": {"common.h", "store", "ggml", "<malloc.h>"},
    "scoring": {"common.h", "scoring", "ggml", "gguf.h"},
    "cuda": {"common.h", "store", "scoring", "cuda", "ggml", "ggml-backend-impl.h", *CUDA_HEADERS},
    "llama": {"common.h", "policy", "store", "scoring", "llama", "ggml", "llama-", "<nlohmann/json.hpp>"},
    "common": {"common.h", "asrkf.h"},
    "asrkf": {"asrkf.h", "common.h", "policy", "llama/engine.h"},
}
LONGEST_FILE, LONGEST_FUNCTION = 600, 60
PYTHON = {
    "_compat": set(),
    "_native": {"_compat"},
    "config": {"_native"},
    "states": {"_native"},
    "stats": {"_native", "config"},
    "header": {"_compat", "_native"},
    "family": {"_compat", "header"},
    "hub": {"family", "header", "stats"},
    "models": {"_native", "family", "hub"},
    "texts": {"models"},
    "tasks": set(),
    "divergence": set(),
    "files": set(),
    "calibration": {"_native", "family", "files", "texts"},
    "gates": set(),
    "gates.file": {"_native", "family", "files"},
    "gates.pytorch": set(),
    "gates.graph": {"_compat", "_native"},
    "gates.teacher": {"gates.graph"},
    "gates.features": {"calibration", "gates.graph", "gates.teacher"},
    "gates.fit": {"gates.file", "gates.graph", "gates.pytorch"},
    "gates.train": {"_native", "family", "files", "gates.features", "gates.file", "gates.fit", "gates.graph", "gates.pytorch", "gates.teacher"},
    "gates.convert": {"_native", "family", "gates.file", "gates.graph", "gates.pytorch"},
    "gates.command": {"calibration", "gates.convert", "gates.file", "gates.train", "models"},
    "chat_prompts": set(),
    "logs": set(),
    "plotting": set(),
    "progress": set(),
    "llama": {"_compat", "_native", "calibration", "chat_prompts", "config", "family", "hub", "logs", "models", "progress", "states", "stats"},
    "live": {"_native", "llama"},
    "opening": {"llama"},
    "traces": {"llama"},
    "plan": {"_compat", "_native", "config", "family", "header", "hub", "llama", "models", "stats"},
    "calibrate": {"_compat", "_native", "calibration", "divergence", "family", "models", "stats"},
    "bench.sides": {"config", "llama"},
    "bench.measure": {"bench.sides", "divergence", "llama"},
    "bench.records": {"_native", "bench.measure", "bench.sides"},
    "bench.quality": {"bench.measure", "bench.records", "bench.sides", "llama", "models", "stats", "texts"},
    "bench.needles": {"bench.measure", "bench.records", "bench.sides", "llama", "stats", "tasks", "texts"},
    "bench.looks": {"bench.measure", "bench.records", "bench.sides", "divergence", "llama", "models", "texts"},
    "bench.sensitivities": {"bench.records", "bench.tables", "calibrate", "calibration", "texts"},
    "bench.pairs": {"bench.measure", "bench.records", "bench.tables", "calibration", "divergence", "family", "gates.file", "texts"},
    "bench.process": set(),  # upstream's side must not load our library
    "bench.speed": {"bench.records", "bench.sides", "stats", "texts"},
    "bench.tables": {"bench.records", "stats"},
    "bench.judge_tables": {"bench.needles", "bench.records", "bench.tables"},
    "bench.judge": {
        "bench.judge_tables", "bench.measure", "bench.needles", "bench.quality", "bench.records", "bench.sides", "gates.file", "models", "tasks",
        "texts",
    },
    "bench.plots": {"bench.measure", "bench.records", "bench.sides", "bench.tables", "plotting", "stats", "texts"},
    "bench.command": {
        "bench.judge", "bench.judge_tables", "bench.looks", "bench.needles", "bench.pairs", "bench.plots", "bench.quality",
        "bench.sensitivities", "bench.sides", "bench.speed", "bench.tables", "models", "tasks", "texts",
    },
    "bench": {"bench.command", "bench.records"},
    "compare.sides": {"bench.sides", "config"},
    "compare.passages": {"bench.measure", "bench.needles", "bench.sides", "llama", "tasks"},
    "compare.progress": {"bench.measure", "bench.needles", "compare.passages", "llama"},
    "compare.run": {
        "bench.measure", "bench.needles", "bench.sides", "compare.passages", "compare.progress", "compare.sides", "llama", "stats", "tasks",
    },
    "compare.report": {"bench.measure", "bench.records", "bench.sides", "compare.run", "stats"},
    "compare.reading": {"compare.report", "compare.sides", "stats"},
    "compare.tables": {"compare.report", "stats"},
    "compare.page": {"compare.report", "compare.sides", "compare.tables", "plotting", "stats"},
    "compare.command": {
        "compare.page", "compare.progress", "compare.reading", "compare.report", "compare.run", "compare.sides", "compare.tables", "models",
        "plotting", "texts",
    },
    "compare": {"compare.command"},
    "serve": {"_compat", "_native", "config", "live", "llama", "models", "opening", "stats"},
    "cli": {"_native"},  # and the modules of its table COMMANDS
    "cli.__main__": {"cli"},
    "cli.info": {"_native", "config", "models", "stats"},
    "cli.answers": {"llama", "progress", "stats"},
    "cli.chat": {"_native", "cli.answers", "llama"},
    "cli.calibrations": {"_native", "calibrate", "models"},
    "cli.run": {"cli.answers", "cli.chat", "config", "llama", "models", "opening", "traces"},
    "cli.plot": {"plotting", "traces"},
    "__init__": {"_native", "config", "llama", "models", "plan", "stats"},
}


def native_files() -> list[Path]:
    files = (path for path in (ROOT / "native").rglob("*") if path.suffix in (".h", ".cpp", ".cu"))
    return sorted(path for path in files if not {"cmake", "include"} & set(path.parts))


def room_of(path: Path) -> str:
    inside = path.relative_to(ROOT / "native")
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def includes_of(path: Path) -> list[str]:
    """Headers of ours, of ggml and of llama.cpp; from elsewhere with their angle brackets; none of the standard library."""
    found = re.findall(r'^#\s*include (?:"([^"]+)"|(<[^>]+/[^>]+>|<[^>]+\.h(?:pp)?>))', path.read_text(), re.M)
    return [ours or other for ours, other in found]


def test_native_files_include_only_what_lies_below_them():
    seen = set()
    for path in native_files():
        seen.add(room_of(path))
        for name in includes_of(path):
            folder = name.split("/")[0] if name[0] != "<" else name
            kind = "ggml" if re.fullmatch(r"ggml[\w-]*(?<!-impl)\.h", name) else "llama-" if name.startswith("llama-") else folder
            assert {kind, name} & NATIVE[room_of(path)], f"{path.relative_to(ROOT)} includes {name}"
    assert seen == set(NATIVE)


def test_only_one_folder_knows_the_headers_of_llama_cpp():
    users = {room_of(path) for path in native_files() if re.search(r'#\s*include "llama-', path.read_text())}
    assert users == {"llama"}
    assert includes_of(ROOT / "native/llama/engine.h") == ["common.h"]  # what the C boundary sees of that folder


def test_the_kernels_know_pointers_and_a_stream_alone():
    for path in native_files():
        if path.suffix == ".cu" or path.stem in ("kernels", "device"):
            ours = [name for name in includes_of(path) if name[0] != "<"]
            assert room_of(path) == "cuda" and set(ours) <= {"cuda/kernels.h", "cuda/device.h", "store/row_slice.h", "cuda_shim.h"}, path.name


def test_no_header_includes_itself_on_a_round_trip():
    below = {str(path.relative_to(ROOT / "native")): includes_of(path) for path in native_files() if path.suffix == ".h"}

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        for other in below.get(name, []):
            visit(other, (*way, name))

    for name in below:
        visit(name, ())


def test_policy_names_no_tensor():
    files = [path for path in native_files() if room_of(path) == "policy"]
    assert len(files) > 8
    for path in files:
        code = re.sub(r'//[^\n]*|"[^"\n]*"', "", path.read_text())
        assert not re.search(r"ggml|llama", code), path.name


def functions_of(path: Path) -> list[tuple[str, int]]:
    """Functions at the left margin, with their lines: our code has its braces there."""
    found, begin = [], None
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        is_other = re.match(r"(namespace|struct|class|enum|using|extern)\b", line) or line.endswith((";", "}"))
        if begin is None and re.match(r"\w.*\(", line) and not is_other:
            begin = number
        elif line == "}" and begin is not None:
            found.append((lines[begin], number - begin + 1))
            begin = None
        elif line in ("", "};"):
            begin = begin if begin is not None and lines[begin + 1 : number] else None
    return found


def test_no_file_and_no_function_is_too_long_to_read():
    n_functions = 0
    for path in native_files():
        assert len(path.read_text().splitlines()) <= LONGEST_FILE, path.name
        for first_line, n_lines in functions_of(path):
            n_functions += 1
            assert n_lines <= LONGEST_FUNCTION, f"{path.name}: {first_line} has {n_lines} lines"
    assert n_functions > 200  # that they were found


def test_patches_name_no_policy():
    for path in (ROOT / "patches").glob("*.patch"):
        added = [line for line in path.read_text().splitlines() if line.startswith("+")]
        assert added and not re.search(r"asrkf|freeze|frozen|policy", "\n".join(added)), path.name


def relative_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports with dots, such as "bench.sides"."""
    found = set()
    folder = path.relative_to(ROOT / "asrkf_gguf").parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = folder[: len(folder) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names if alias.name != "__version__"]
            found |= {".".join([*above, name]) for name in names}
    return found


def test_python_modules_import_only_what_lies_below_them():
    seen = set()
    for path in sorted((ROOT / "asrkf_gguf").rglob("*.py")):
        parts = path.relative_to(ROOT / "asrkf_gguf").with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        seen.add(name)
        found = relative_imports(path)
        assert found <= PYTHON[name], f"{path.relative_to(ROOT)} imports {sorted(found - PYTHON[name])}"
    assert seen == set(PYTHON)
