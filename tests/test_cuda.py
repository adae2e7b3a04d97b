"""The CUDA kernels are compiled for every card that they are meant for, and with their host code as a build with GGML_CUDA does.

What they compute is shown on a CPU: native/test_cuda.cpp, native/test_scorers.cpp, native/test_cuda_engine.cpp.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from asrkf_gguf import _native

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (75, 80, 86, 89, 90, 120)
KERNELS = sorted((ROOT / "native/cuda").glob("*.cu"))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda path: path.name)
def test_a_kernel_compiles_for_every_card_without_a_warning(tmp_path, kernel):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA kernels are not compiled here")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    missing = [number for number in ARCHITECTURES if f"sm_{number}" not in known]
    if missing:
        pytest.skip(f"this nvcc does not know {missing}: CUDA 12.8 to 13 knows all of {ARCHITECTURES}")
    made = tmp_path / "kernel.cubins"
    command = [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'native'}", "-fatbin", "-o", str(made), str(kernel), "--threads=2"]
    command += [f"-gencode=arch=compute_{number},code=sm_{number}" for number in ARCHITECTURES]
    command += ["--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xptxas=-v"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compiled = set(re.findall(r"Compiling entry function '\w+' for 'sm_(\d+)'", done.stderr))
    assert compiled == {str(number) for number in ARCHITECTURES}
    frames = [int(size) for size in re.findall(r"(\d+) bytes stack frame", done.stderr)]
    assert len(frames) >= len(ARCHITECTURES) and max(frames) <= 128  # a few spilled registers, no array in a card's slow memory
    assert made.stat().st_size > 0


@pytest.fixture(scope="module")
def cuda_build(tmp_path_factory) -> tuple[Path, Path]:
    """native/cuda/ as CMake compiles it beside ggml's CUDA backend, which is configured and not compiled; and CUDA's runtime library."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the CUDA build is not configured here")
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=True).stderr
    toolkit = Path(re.search(r"_HERE_=(\S+)", said)[1]).parent
    runtime = next((path for path in (toolkit / "lib64/libcudart.so", toolkit / "lib/libcudart.so") if path.exists()), None)
    if runtime is None:
        pytest.skip(f"no libcudart.so in {toolkit}: the CUDA build cannot be configured here")
    build = tmp_path_factory.mktemp("build-cuda")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # a small toolkit lacks the library of matrix products and the driver's: nothing that needs them is linked here
    options = ["-DGGML_CUDA=ON", "-DGGML_CUDA_NO_VMM=ON", "-DCMAKE_CUDA_ARCHITECTURES=75;86", f"-DCUDA_cublas_LIBRARY={runtime}"]
    for command in (["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *options], ["ninja", "-C", str(build), "-j2", "asrkf_cuda"]):
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return build, runtime


def test_a_build_with_cuda_puts_the_kernels_into_libllama_for_ggmls_own_architectures(cuda_build):
    rules = (cuda_build[0] / "build.ninja").read_text().split("\nbuild ")
    library = next(rule for rule in rules if rule.startswith("bin/libllama.so"))
    compiled = [rule for rule in rules if re.match(r"native/cuda/\S+\.cu\.o:", rule)]
    assert len(compiled) == len(KERNELS)
    for rule in compiled:
        assert rule.split(":")[0] in library.splitlines()[0]
        assert set(re.findall(r"code=\[compute_\d+,sm_(\d+)\]", rule)) == {"75", "86"}
    assert "native/cuda/CMakeFiles/asrkf_cuda.dir/scorer.cpp.o" in library.splitlines()[0] and "libcudart.so" in library


def test_flash_attention_has_a_kernel_for_each_type_that_the_engine_chooses(cuda_build):
    rules = (cuda_build[0] / "build.ninja").read_text()
    compiled = set(re.findall(r"fattn-vec-instance-(\w+)-(\w+)\.cu", rules))
    assert {("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q5_0")} <= compiled
    assert "-DGGML_CUDA_FA_Q8_0_Q5_0=1" in rules


def test_with_cudas_own_runtime_an_index_on_no_card_is_refused_with_a_reason(cuda_build, tmp_path):
    build, runtime = cuda_build
    tree = subprocess.run([sys.executable, str(ROOT / "scripts/llama_tree.py"), "prepare"], capture_output=True, text=True, check=True).stdout.strip()
    objects = sorted(map(str, (build / "native/cuda/CMakeFiles/asrkf_cuda.dir").glob("*.o")))
    libraries = [str(_native.LIBRARY), str(_native.LIBRARY_FOLDER / "libggml-base.so"), str(_native.LIBRARY_FOLDER / "libggml.so"), str(runtime)]
    includes = [f"-I{ROOT / 'native'}", f"-I{ROOT / 'native/include'}", f"-I{tree}/ggml/include"]
    program = str(tmp_path / "without_card")
    # every name is found in what a build would link
    command = ["c++", "-std=c++17", *includes, "-o", program, str(ROOT / "tests/native/without_card.cpp"), *objects, *libraries, "-Wl,-z,defs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    folders = os.pathsep.join([str(_native.LIBRARY_FOLDER), str(runtime.parent)])
    done = subprocess.run([program], env={**os.environ, "LD_LIBRARY_PATH": folders}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.match(r"status 6: CUDA failed to .+: .+\n1 kinds of scorers\n", done.stdout), done.stdout


def test_there_are_kernels():
    assert [path.name for path in KERNELS] == ["entropy.cu", "relevance.cu", "rows.cu"]
