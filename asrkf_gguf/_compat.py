"""llama_cpp, and the one place that uses what is not its interface: PRIVATE lists each name, why, and what would replace it.

asrkf-gguf's wheel carries llama_cpp (pyproject.toml says why), at the version below. tests/test_compat.py says in words which
of these names a newer version has changed, and sees to it that no other module uses one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

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
except AttributeError as error:  # a function that the library does not have
    raise ImportError(f"llama_cpp is not of the version of its libllama ({error}): {REMEDY}") from error


@dataclass(frozen=True)
class Private:
    """A name of llama_cpp that is not part of its interface; its instances are listed at the end of this file."""

    where: str
    """Module, then the name in it; of an attribute that objects get when they are made, Class.name."""
    why: str
    instead: str
    """What of llama_cpp's would make it needless."""


def loaded_library() -> Path:
    """The file of the libllama that llama_cpp loaded; ImportError with the remedy if it is not ours."""
    library = llama_cpp.llama_cpp._lib
    if hasattr(library, "asrkf_version") and llama_cpp.__version__ == PINNED:
        return Path(library._name).resolve()
    chosen = os.environ.get("LLAMA_CPP_LIB_PATH")
    if chosen:
        raise ImportError(f"LLAMA_CPP_LIB_PATH={chosen} names a libllama without asrkf: unset it")
    raise ImportError(f"llama_cpp {llama_cpp.__version__} was installed over the {PINNED} of asrkf-gguf: {REMEDY}")


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Nothing is written to the standard streams in its with block, not by C code either."""
    return llama_cpp._utils.suppress_stdout_stderr(disable=False)


class LlamaBase(llama_cpp.Llama):
    """llama_cpp.Llama, its private parts under other names."""

    _stack = contextlib.ExitStack()  # until __init__ makes one: close() wants it, also where we refuse before

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._init_sampler(*args, **kwargs)
        for token in self.tokens_before_sampling():
            sampler.accept(token)
        return sampler

    def tokens_before_sampling(self) -> list[int]:
        """Tokens that a sampler is made to believe it chose, such as those of an answer that goes on."""
        return []

    @property
    def current_seed(self) -> int:
        """Of the next sampler; set_seed() sets it."""
        return self._seed

    @property
    def must_eval(self) -> bool:
        """Are the logits those of other tokens, so that the last one has to be evaluated again before a token is sampled?"""
        return self._requires_eval

    @must_eval.setter
    def must_eval(self, value: bool) -> None:
        self._requires_eval = value

    @property
    def keeps_all_logits(self) -> bool:
        return self._logits_all


# llama_cpp.server: its packages are not always installed, so it is imported where it is used

def server_model() -> tuple[Optional[str], Any]:
    """Alias and model of the running server; no model after one that was asked for could not be loaded."""
    from llama_cpp.server import app

    proxy = app._llama_proxy
    return (proxy._current_model_alias, proxy._current_model) if proxy else (None, None)


def server_lock() -> Any:
    """Held while a model computes. The inner of two: who waits at the outer one cuts a running stream (interrupt_requests)."""
    from llama_cpp.server import app

    return app.llama_inner_lock


@contextlib.contextmanager
def server_makes(proxy: type) -> Iterator[None]:
    """In its with block llama_cpp.server's create_app() makes models with this subclass of LlamaProxy."""
    from llama_cpp.server import app

    with replaced(app, "LlamaProxy", proxy):
        yield


def answer_errors(answer: Callable[[Exception], Optional[tuple[int, dict[str, Any]]]]) -> None:
    """From now on llama_cpp.server asks this first what to answer to an error: status and content, or None."""
    from llama_cpp.server.errors import RouteErrorHandler

    others = RouteErrorHandler.error_message_wrapper

    def wrapper(self: Any, error: Exception, body: Any = None) -> Any:
        return answer(error) or others(self, error, body)

    setattr(RouteErrorHandler, "error_message_wrapper", wrapper)  # noqa: B010  a method: a plain assignment is no valid type


def answer_to(error: Exception, body: Any) -> tuple[int, Any]:
    """Status and content with which llama_cpp.server answers an error of a request."""
    from llama_cpp.server import app, errors

    handler = next(route for route in app.router.routes if isinstance(route, errors.RouteErrorHandler))
    return handler.error_message_wrapper(error, body)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module with another value, for the length of a with block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


PRIVATE = (
    Private("llama_cpp.llama_cpp:_lib", "which library was loaded, and is it ours", "a public handle or path"),
    Private("llama_cpp._utils:suppress_stdout_stderr", "what a context says when it is freed breaks a progress bar", "a public log level"),
    Private("llama_cpp:Llama._stack", "close() needs it where our __init__ refuses first", "a close() that can be called at any time"),
    Private("llama_cpp:Llama._init_sampler", "grammar and penalties where an answer is sampled anew", "a sampler that can be passed in"),
    Private("llama_cpp:Llama._seed", "to sample anew with other draws, and give the seed back", "a public seed that can be read"),
    Private("llama_cpp:Llama._requires_eval", "a state refused or tokens taken back leave other logits", "a public way to take tokens back"),
    Private("llama_cpp:Llama._logits_all", "whether a state holds logits, and logprobs can be had", "a public flag"),
    Private("llama_cpp.server.app:_llama_proxy", "the figures of the model that is loaded", "a public accessor of the proxy"),
    Private("llama_cpp.server.app:llama_inner_lock", "not to read figures while a step runs", "a public lock, or a request's dependency"),
    Private("llama_cpp.server.app:LlamaProxy", "create_app() makes models with it: ours", "a proxy or a model that can be passed in"),
    Private("llama_cpp.server.model:LlamaProxy._current_model", "the figures of the model that is loaded", "a public accessor"),
    Private("llama_cpp.server.model:LlamaProxy._current_model_alias", "its name", "a public accessor"),
    Private("llama_cpp.server.errors:RouteErrorHandler.error_message_wrapper", "refusals are the request's fault", "a handler by exception type"),
)
