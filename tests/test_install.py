"""The package can be imported from anywhere, built without a checkout, and installed where nothing of it was."""

from __future__ import annotations

import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT, python

import asrkf_gguf
from asrkf_gguf.models import cache_folder

FOLDER = asrkf_gguf._native.LIBRARY_FOLDER


def run(*command: object, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, without what this process has in its environment for Python."""
    kept = {key: value for key, value in os.environ.items() if key not in ("LLAMA_CPP_LIB_PATH", "PYTHONPATH", "LLAMA_KV_POLICY")}
    result = subprocess.run([*map(str, command)], cwd=cwd, env={**kept, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result.stdout


# importing

def test_the_libraries_under_test_are_those_installed():
    assert FOLDER.is_relative_to(Path(sys.prefix).resolve())


def test_the_checkout_can_be_imported_from_its_root(tmp_path):
    code = "import asrkf_gguf, llama_cpp; print(asrkf_gguf.__file__); print(llama_cpp.__file__)"
    ours, bindings = run(sys.executable, "-c", code, cwd=ROOT).split()
    assert Path(ours).parent == ROOT / "asrkf_gguf" and Path(bindings).is_relative_to(Path(sys.prefix).resolve())
    test = "tests/test_config.py::test_policies_are_in_the_order_of_the_c_enum"
    assert "1 passed" in run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test, cwd=ROOT)


def test_llama_cpp_may_come_first_and_a_child_gets_nothing_from_us():
    result = python("import llama_cpp, asrkf_gguf, os; print(os.environ.get('LLAMA_CPP_LIB_PATH'), llama_cpp.__file__)")
    assert result.stdout.split() == ["None", str(FOLDER.parent / "__init__.py")], result.stderr
    child = "import llama_cpp; print(llama_cpp.llama_cpp._lib._name)"
    result = python(f"import asrkf_gguf, subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)")
    assert result.stdout.strip() == str(asrkf_gguf._native.LIBRARY), result.stderr


def test_the_multimodal_library_and_ggml_are_found():
    code = "import llama_cpp.mtmd_cpp as m, llama_cpp._ggml; print(m.mtmd_default_marker().decode(), m._libmtmd._name)"
    result = python(code)
    assert result.stdout.split() == ["<__media__>", str(FOLDER / "libmtmd.so")], result.stderr


def test_an_empty_library_path_in_the_environment_means_none():
    assert python("import asrkf_gguf; print('imported')", LLAMA_CPP_LIB_PATH="").stdout.strip() == "imported"


@pytest.mark.parametrize("order", ["import asrkf_gguf", "import llama_cpp, asrkf_gguf"])
@pytest.mark.upstream
def test_a_library_of_another_build_is_refused_with_the_way_out(upstream_libraries, order):
    result = python(order, LLAMA_CPP_LIB_PATH=str(upstream_libraries))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == f"ImportError: LLAMA_CPP_LIB_PATH={upstream_libraries} names a libllama without asrkf: unset it"


def test_a_library_path_without_libraries_is_refused_with_the_way_out(tmp_path):
    result = python("import asrkf_gguf", LLAMA_CPP_LIB_PATH=str(tmp_path))
    assert result.returncode == 1 and f"unset LLAMA_CPP_LIB_PATH={tmp_path}" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(("file", "old", "new", "says"), [
    ("__init__.py", f'"{asrkf_gguf._compat.PINNED}"', '"9.9.9"', "llama_cpp 9.9.9 was installed over the "),
    ("llama_cpp.py", '"llama_max_devices"', '"llama_max_dreams"', "llama_cpp is not of the version of its libllama ("),
])  # fmt: skip
def test_another_llama_cpp_installed_over_ours_is_refused_with_the_way_out(tmp_path, file, old, new, says):
    """A newer one, whose own wheel came without a library: ours would be called as if it were of its version."""
    (tmp_path / "llama_cpp").mkdir()
    for path in FOLDER.parent.glob("*.py"):
        text = path.read_text()
        assert path.name != file or old in text
        (tmp_path / "llama_cpp" / path.name).write_text(text.replace(old, new) if path.name == file else text)
    (tmp_path / "llama_cpp" / "lib").symlink_to(FOLDER)
    result = python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import asrkf_gguf")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: {says}") and "pip uninstall llama-cpp-python" in last


def test_without_llama_cpp_the_error_says_how_to_get_it_back():
    result = python("import sys; sys.modules['llama_cpp'] = None; import asrkf_gguf")
    assert result.returncode == 1 and "install asrkf-gguf anew" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("environment", [{}, {"XDG_CACHE_HOME": "elsewhere"}, {"XDG_CACHE_HOME": " "}, {"ASRKF_CACHE": "mine"}], ids=str)
def test_the_package_and_its_build_agree_on_the_cache_folder(environment, tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "ASRKF_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, str(tmp_path / value) if value.strip() else value)
    spec = importlib.util.spec_from_file_location("llama_tree", ROOT / "scripts/llama_tree.py")
    llama_tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(llama_tree)
    expected = {"XDG_CACHE_HOME=elsewhere": "elsewhere/asrkf-gguf", "ASRKF_CACHE=mine": "mine"}
    where = expected.get(",".join(f"{name}={value}" for name, value in environment.items()), ".cache/asrkf-gguf")
    assert cache_folder() == llama_tree.cache_folder() == tmp_path / where


# wheel and sdist

@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist, unpacked outside the checkout: nothing there is a git repository."""
    folder = tmp_path_factory.mktemp("sdist")
    name = run(sys.executable, "-c", f"from scikit_build_core.build import build_sdist; print(build_sdist({str(folder)!r}))", cwd=ROOT).split()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def tools() -> dict[str, str]:
    """An environment in which pip finds CMake and ninja."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def wheel(sdist, tools) -> Path:
    """The wheel, built from the unpacked sdist without programs: a compiler cache makes it minutes less."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-C", f"build-dir={sdist.parent / 'build'}"]
    run(*pip, "-w", sdist.parent, sdist, cwd=sdist.parent, **tools)
    (found,) = sdist.parent.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def fresh(wheel, tools, tmp_path_factory) -> Path:
    """The interpreter of a virtual environment with the wheel and what it asks for, and nothing else."""
    folder = tmp_path_factory.mktemp("fresh") / "venv"
    run(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    run(folder / "bin" / "python", "-m", "pip", "install", "-q", wheel, cwd=folder.parent, **tools)
    return folder / "bin" / "python"


def test_wheels_of_an_unknown_kind_or_without_its_compiler_are_refused_in_one_line(tmp_path):
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    expected = {"metal": "wheel: cpu, cuda or vulkan, not metal", "cuda": "wheel: cuda needs nvcc", "vulkan": "wheel: vulkan needs glslc"}
    for kind, says in expected.items():
        result = subprocess.run([ROOT / "scripts/wheel", kind], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
        assert result.returncode == 1 and result.stdout == "" and result.stderr.startswith(says) and result.stderr.count("\n") == 1
    assert "py -m pip wheel --no-deps -w dist ." in run(ROOT / "scripts/wheel", "--help", cwd=tmp_path)


def completion(interpreter: Path, model: str, cwd: Path) -> list[str]:
    code = (
        f"from asrkf_gguf import Llama; import asrkf_gguf\nllm = Llama({model!r}, n_ctx=512, kv_policy='asrkf', kv_pool=512, verbose=False)\n"
        "print(asrkf_gguf.__file__, asrkf_gguf._native.LIBRARY_FOLDER)\n"
        "print(llm('The capital of France is', max_tokens=4, temperature=0)['choices'][0]['text'])"
    )
    return run(interpreter, "-c", code, cwd=cwd).split(maxsplit=2)


def test_the_wheel_works_where_nothing_else_is(fresh, smollm2, tmp_path):
    package, libraries, text = completion(fresh, smollm2, tmp_path)
    environment = fresh.parents[1].resolve()
    assert Path(package).is_relative_to(environment) and Path(libraries).is_relative_to(environment)
    assert "Paris" in text
    installed = run(fresh, "-m", "pip", "list", cwd=tmp_path)
    assert "asrkf-gguf" in installed and not re.search(r"llama.cpp.python|torch", installed)
    assert "policies: full, asrkf" in run(fresh.parent / "asrkf", "info", cwd=tmp_path)


def test_an_editable_install_runs_the_files_of_its_folder(fresh, sdist, tools, smollm2, tmp_path):
    run(fresh, "-m", "pip", "install", "-q", "scikit-build-core>=0.11", cwd=tmp_path, **tools)
    build = ("-C", f"build-dir={sdist.parent / 'build'}")
    run(fresh, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", *build, "-e", sdist, cwd=tmp_path, **tools)
    package, libraries, text = completion(fresh, smollm2, tmp_path)
    assert Path(package).parent == sdist / "asrkf_gguf" and "Paris" in text
    assert Path(libraries).is_relative_to(fresh.parents[1].resolve())


def test_the_wheel_serves_every_python_of_the_platform_and_asks_for_no_llama_cpp_python(wheel):
    assert re.fullmatch(r"asrkf_gguf-[\d.]+-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        asks = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
    assert asks and not any("llama" in line for line in asks)
    assert {"llama_cpp/lib/libllama.so", "llama_cpp/lib/libmtmd.so", "llama_cpp/lib/asrkf.h", "llama_cpp/server/app.py"} <= set(names)
    assert "asrkf_gguf/calibrations/SmolLM2-135M-Instruct.Q4_1.asrkf.json" in names


def test_licences_of_what_is_inside_are_in_wheel_and_sdist_and_are_the_pinned_ones(wheel, sdist, tools):
    def tree(command: str) -> Path:
        return Path(run(sys.executable, ROOT / "scripts/llama_tree.py", command, cwd=ROOT).strip())

    llama, bindings = tree("prepare"), tree("bindings")
    sources = {
        "llama.cpp-and-ggml": llama / "LICENSE", "llama-cpp-python": bindings / "LICENSE.md", "nlohmann-json": llama / "licenses/LICENSE-jsonhpp",
        "cpp-httplib": llama / "vendor/cpp-httplib/LICENSE", "xxhash": llama / "vendor/hash/xxhash/LICENSE",
        "sha256": llama / "vendor/hash/sha256/LICENSE", "rotate-bits": llama / "vendor/hash/rotate-bits/LICENSE.md",
    }  # fmt: skip
    assert {path.stem for path in (sdist / "licenses").iterdir()} == set(sources)
    with zipfile.ZipFile(wheel) as archive:
        inside = {Path(name).name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/licenses/" in name}
    assert "LICENSE" in inside
    for name, source in sources.items():
        assert source.read_text() == (sdist / f"licenses/{name}.txt").read_text() == inside[f"{name}.txt"], name
