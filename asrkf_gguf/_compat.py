"""llama_cpp, and the one place that uses its private names. For each: why, and what would make it needless.

asrkf-gguf's wheel carries llama_cpp (pyproject.toml says why), at the version below. tests/test_compat.py says in words which
of these names a newer version has changed, and that no other module uses one.
"""

from __future__ import annotations

import os
from pathlib import Path

PINNED = "0.3.36"  # of llama_cpp: patches/UPSTREAM
REMEDY = "pip uninstall llama-cpp-python, then install asrkf-gguf anew with --force-reinstall --no-deps"

if not os.environ.get("LLAMA_CPP_LIB_PATH", "unset"):
    del os.environ["LLAMA_CPP_LIB_PATH"]  # empty: llama_cpp would search the working directory

try:
    import llama_cpp
except ModuleNotFoundError as error:
    if error.name != "llama_cpp":
        raise
    raise ImportError(f"llama_cpp, a part of asrkf-gguf, is not installed (uninstalling llama-cpp-python removes it, too): {REMEDY}") from error
except (FileNotFoundError, RuntimeError) as error:
    if "hared library" not in str(error):
        raise
    _chosen = os.environ.get("LLAMA_CPP_LIB_PATH")
    raise ImportError(f"llama_cpp found no libllama ({error}): {f'unset LLAMA_CPP_LIB_PATH={_chosen}' if _chosen else REMEDY}") from error


def loaded_library() -> Path:
    """The file of the libllama that llama_cpp loaded; ImportError with the remedy if it is not ours.

    `llama_cpp.llama_cpp._lib`: the handle. Needless with a public one, or a function that gives its path.
    """
    library = llama_cpp.llama_cpp._lib
    if hasattr(library, "asrkf_version") and llama_cpp.__version__ == PINNED:
        return Path(library._name).resolve()
    chosen = os.environ.get("LLAMA_CPP_LIB_PATH")
    if chosen:
        raise ImportError(f"LLAMA_CPP_LIB_PATH={chosen} names a libllama without asrkf: unset it")
    raise ImportError(f"llama_cpp {llama_cpp.__version__} was installed over the {PINNED} of asrkf-gguf: {REMEDY}")
