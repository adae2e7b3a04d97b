"""`Llama`: llama_cpp.Llama with a KV pool."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import logging
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, Union, cast

import llama_cpp
import numpy as np

from . import _native, family
from ._compat import LlamaBase
from ._native import KVError, KVStatus, last_status
from .calibration import calibrating
from .chat_prompts import Messages, chat_span, chat_tokens
from .config import FreezeConfig, PoolSize
from .logs import log
from .models import find_side_file
from .progress import Progress, PromptBar
from .states import NAMES, read_pinned, read_runs, read_states
from .stats import KVStats, OutputEntropy, read_output_entropy, read_stats


def with_calibration(config: FreezeConfig, model_path: str) -> FreezeConfig:
    """The configuration with the side file that lies beside the model or in the package, if there is one and tokens are scored by
    attention. (The cache folder is the engine's to look into: programs have no Python.)"""
    if config.policy == "full" or config.calibration is not None or config.resolved()["score"] != "attention":
        return config
    found = find_side_file(Path(model_path))
    return dataclasses.replace(config, calibration=str(found)) if found else config


class Llama(LlamaBase):
    """A drop-in for llama_cpp.Llama whose KV cache may be smaller than its context.

    All arguments are llama_cpp.Llama's; `flash_attn` defaults to True, since a policy needs it. More:

    kv_policy: None (what LLAMA_KV_POLICY says, else upstream's cache), "full" (upstream's cache), a preset ("asrkf",
        "paper", "refreekv", "kvzip", "window", "random", "flag-all"; "quality", "default", "aggressive": asrkf with a half, a third, an
        eighth of the F16 cache's bytes), a string "name,key=value,..." or a FreezeConfig.
    kv_pool: "auto" (what fits the device; the default), cells of the pool (2048; a mean over the layers, see docs/policy.md), part of n_ctx
        (0.25), bytes of K, V and index on the device ("512MiB", rounded down: a bound), or a part of a full F16 cache's ("33%").
    type_k, type_v: the cache's types. If neither is named, a pool of bytes has the best that it has room for: all tokens in F16,
        else all in Q8_0, else (on a GPU) all with K in Q8_0 and V in Q5_0, else a pool of the last.
    kv_regenerate: with recovery=full, how many of the newest tokens a full reset in the middle of an answer takes back and
        samples anew, now that what was frozen is there (the paper's rewalk regeneration). So many are held back from the
        caller. None: 8 for answers that are returned whole, 0 where the caller sees tokens as they come (stream, generate()).
    calibrate: if the policy scores by attention and the model has no calibration yet, measure one now and keep it in the cache
        folder: seconds for a small model, once. False: without one, budgets and scoring layers are a guess by depth.
    progress: called with (tokens done, tokens in all) while a prompt is read: at its beginning, with 0, and after each batch. True:
        a bar on stderr, where that is a terminal. It may raise: the batches before are kept. It can be set later, too. (With a
        draft model, whose guesses look like short prompts, only prompts of several batches are told.)

    Raises ValueError, with the number that would work, if model, pool or policy do not fit together; KVError when a
    running cache refuses a step (host_limit reached, context full). The object then still holds all it had decoded.
    """

    def __init__(
        self,
        model_path: str,
        *,
        kv_policy: Union[str, FreezeConfig, None] = None,
        kv_pool: Optional[PoolSize] = None,
        kv_regenerate: Optional[int] = None,
        calibrate: bool = True,
        progress: Union[Progress, bool, None] = None,
        flash_attn: bool = True,
        **kwargs: Any,
    ) -> None:
        if kv_regenerate is not None and kv_regenerate < 0:
            raise ValueError(f"kv_regenerate={kv_regenerate}: 0 (never) or more tokens")
        self._kv_regenerate = kv_regenerate
        self._calibrate = calibrate
        self._answers_whole = False
        self._looks_up_cache = False
        self._sampled_before: list[int] = []
        self._running: Optional[object] = None
        self.kv_regenerations = 0
        """Times that sampled tokens were taken back (kv_regenerate)."""
        if kv_policy is None:
            if kv_pool is not None:
                raise ValueError(f'kv_pool={kv_pool!r} needs a kv_policy: pass kv_policy="asrkf"')
            config = None
        else:
            config = kv_policy if isinstance(kv_policy, FreezeConfig) else FreezeConfig.from_string(kv_policy)
            config = with_calibration(config.with_pool(kv_pool), model_path)
            config = config.with_types(are_named=kwargs.get("type_k") is not None or kwargs.get("type_v") is not None)
        self._kv_policy = config
        if kwargs.get("draft_model") is not None:
            kwargs["logits_all"] = True  # llama_cpp.Llama keeps all logits then, but without this has room for n_batch rows only
        self._tracing = False
        self.progress = progress
        settings = _native.parse_config(config.to_string()) if config else _native.ffi.NULL
        _native.lib.asrkf_clear_error()
        _native.check(_native.lib.asrkf_next_context(settings))
        try:
            with calibrating(kwargs.get("n_threads_batch")) if calibrate else contextlib.nullcontext():
                super().__init__(model_path, flash_attn=flash_attn, **kwargs)
        except ValueError as error:
            reason = _native.last_error()
            if reason:
                raise ValueError(reason) from error
            if os.path.exists(model_path) and "load model" in str(error):
                family.refuse(Path(model_path))
                size = os.path.getsize(model_path)
                raise ValueError(
                    f"{model_path} ({size} bytes) cannot be loaded as a GGUF model: truncated, damaged or another "
                    "format; fetch it again (verbose=True shows llama.cpp's reason)"
                ) from error
            raise
        finally:
            _native.lib.asrkf_next_context(_native.ffi.NULL)  # a model that fails to load never asks for it
        if self.chat_format == "llama-2" and not kwargs.get("chat_format"):  # llama_cpp's choice for a model that brings no template
            self.chat_format = family.chat_format(self.model) or self.chat_format
        self._say_what_is()

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: Optional[str] = None,
        additional_files: Optional[list[str]] = None,
        local_dir: Union[str, os.PathLike[str], None] = None,
        local_dir_use_symlinks: Any = "auto",
        cache_dir: Union[str, os.PathLike[str], None] = None,
        *,
        quant: Optional[str] = None,
        revision: Optional[str] = None,
        **kwargs: Any,
    ) -> Llama:
        """A model of the Hugging Face hub: Llama.from_pretrained("owner/repo", quant="Q4_K_M", n_gpu_layers=-1), with Llama's arguments.

        The file is named by its quantisation, or by `filename`, a path or pattern; a split model comes with all its parts. It is fetched
        once, into the hub's cache; a download that was cut goes on. revision: a branch, tag or commit. `local_dir` and
        `additional_files` are llama_cpp.Llama's, which fetches those by itself; they need a filename. Raises what hub.fetch() raises.
        """
        if local_dir is not None or additional_files:
            if quant is not None or revision is not None or filename is None:
                raise ValueError("local_dir and additional_files need a filename, and go with neither quant nor revision")
            return cast(
                Llama, super().from_pretrained(repo_id, filename, additional_files, local_dir, local_dir_use_symlinks, cache_dir, **kwargs)
            )
        from . import hub  # half a second, which only this needs

        return cls(str(hub.fetch(hub.Name(repo_id, revision or "main", quant or "", filename or ""), cache_dir)), **kwargs)

    def _say_what_is(self) -> None:
        """What was chosen for the pool (a warning if it is less than all tokens in F16), and a context that the model never saw."""
        stats, n_trained = self.kv_stats(), llama_cpp.llama_model_n_ctx_train(self.model)
        if stats.pool_choice and not self.verbose:  # else llama.cpp's log has it
            is_all = stats.pool_cells == self.n_ctx() and stats.type_k == stats.type_v == "f16"
            log.log(logging.INFO if is_all else logging.WARNING, "%s", stats.pool_choice)
        for fault in family.faults(self.model, Path(self.model_path)):
            log.warning("%s: %s", Path(self.model_path).name, fault)
        is_stretched = self.context_params.rope_scaling_type > 0 or self.context_params.rope_freq_scale not in (0, 1)
        if self.n_ctx() > n_trained > 0 and not is_stretched:
            log.warning("n_ctx=%d is more than the %d tokens that the model was trained for: expect nonsense past them", self.n_ctx(), n_trained)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle is made from again: llama_cpp.Llama's arguments and ours."""
        flash_attn = self.context_params.flash_attn_type != llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        ours = {"kv_policy": self._kv_policy, "kv_regenerate": self._kv_regenerate, "calibrate": self._calibrate}
        return {**super().__getstate__(), "flash_attn": flash_attn, **ours}

    # decoding

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens (llama_cpp.Llama.eval); the cache's reason is in the KVError if it refuses."""
        _native.lib.asrkf_clear_error()
        freezes = len(tokens) > self.n_batch and self.kv_stats().policy != "full"
        tell = self.progress if len(tokens) > (1 if self.draft_model is None else self.n_batch) else None
        try:
            begin = 0
            if tell:
                tell(0, len(tokens))
            if not len(tokens):
                super().eval(tokens)  # no step, but what lies behind n_tokens leaves the cache
            while begin < len(tokens):
                end = min(begin + self.n_batch, len(tokens))
                end -= end == len(tokens) - 1 and end - begin > 1  # an end of one token would look like a generated one
                if freezes:  # every one of these batches looks like the end of a prompt: say which is
                    _native.lib.asrkf_prompt_follows(self._pointer, end < len(tokens))
                super().eval(tokens[begin:end])
                if tell:
                    tell(end, len(tokens))
                begin = end
        except RuntimeError as error:
            reason = _native.last_error()
            if reason:
                raise KVError(reason, last_status()) from error
            raise
        finally:
            if freezes:
                _native.lib.asrkf_prompt_follows(self._pointer, False)

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        """Complete a prompt (llama_cpp.Llama.create_completion); chat completions and calls come here, too."""
        streams = inspect.signature(super().create_completion).bind(*args, **kwargs).arguments.get("stream", False)

        if streams:
            return self._stream(cast(Iterator[Any], super().create_completion(*args, **kwargs)))
        with self._completing(whole=True):
            return super().create_completion(*args, **kwargs)

    def _stream(self, chunks: Iterator[Any]) -> Iterator[Any]:
        with self._completing(whole=False):
            yield from chunks

    @contextlib.contextmanager
    def _completing(self, whole: bool) -> Iterator[None]:
        self._answers_whole, self._looks_up_cache = whole, True
        try:
            yield
        finally:
            self._answers_whole = self._looks_up_cache = False

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Optional[Sequence[int]], None]:
        """Sample tokens after a prompt (llama_cpp.Llama.generate); see kv_regenerate."""
        whole, self._answers_whole = self._answers_whole, False
        self._looks_up_cache = False
        mine = self._running = object()  # an answer that was left unread must not touch a later one
        n_held = (8 if whole else 0) if self._kv_regenerate is None else self._kv_regenerate
        config = self.kv_config() if n_held else None
        if config is None or config.recovery != "full" or self.draft_model is not None:
            return (yield from super().generate(tokens, *args, **kwargs))
        call = inspect.signature(super().generate).bind(tokens, *args, **kwargs).arguments
        before = self.input_ids[: self.n_tokens].tolist() if not call.get("reset", True) else []
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        given, held, seed = [*before, *tokens], deque[int](), self.current_seed
        n_prompt, n_free = len(given), len(given)  # no second time before so many are given: there must be an end
        answer = super().generate(**call)
        try:
            while True:
                n_resets = self.kv_stats().recoveries_total["full"]
                token = next(answer, None)
                if held and len(given) >= n_free and self.kv_stats().recoveries_total["full"] > n_resets:
                    answer.close()
                    held.clear()
                    self.kv_regenerations += 1
                    n_free = len(given) + n_held
                    self._sampled_before = given[n_prompt:]
                    self.set_seed((seed + self.kv_regenerations) % (1 << 32))  # the same draws would mostly say the same
                    answer = super().generate(**{**call, "tokens": list(given), "reset": True})
                    continue
                if token is not None:
                    held.append(token)
                is_end = token is None or self.n_tokens >= self.n_ctx() or llama_cpp.llama_vocab_is_eog(vocab, token)
                while len(held) > (0 if is_end else n_held):
                    given.append(held.popleft())
                    if (yield given[-1]) is not None:
                        raise ValueError("tokens cannot be sent into an answer whose newest tokens are held back: kv_regenerate=0")
                if token is None:
                    return
        finally:
            answer.close()
            if self._running is mine:
                self.set_seed(seed)
                if self.n_tokens > len(given):  # what the caller never saw
                    self.n_tokens = len(given)
                    self.must_eval = True

    def tokens_before_sampling(self) -> list[int]:
        """Of an answer that goes on: grammar and penalties stand where it stands."""
        before, self._sampled_before = self._sampled_before, []
        return before

    def chat_tokens(self, messages: Messages) -> list[int]:
        """The prompt that create_chat_completion() makes of these messages; ValueError if the model's template refuses them."""
        return chat_tokens(self, messages)

    def chat_span(self, messages: Messages, index: int = 0) -> tuple[int, int]:
        """Positions [begin, end) of a message in that prompt, counted like a list's: pin(*chat_span(messages)) pins the first."""
        return chat_span(self, messages, index)

    def save_state(self) -> llama_cpp.LlamaState:
        """Save the state: the whole sequence, frozen or not, with scores and timers (see the key `state`).

        KVError with the reason if it cannot be saved.
        """
        _native.lib.asrkf_clear_error()
        if llama_cpp.llama_state_get_size(self.ctx) == 0:
            raise KVError(_native.last_error() or "llama.cpp gave no state", last_status())
        scores = self.scores
        if not self.keeps_all_logits:  # nothing is in them: n_batch rows of the vocabulary (100 MiB) in each state of a prompt cache
            self.scores = np.zeros((1, self.n_vocab()), dtype=np.single)
        try:
            return super().save_state()
        finally:
            self.scores = scores

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """Load a state, of any context and pool or of the full cache; KVError with the reason if it does not fit: the sequence is
        then as before (upstream's cache is empty then)."""
        _native.lib.asrkf_clear_error()
        before = (self.input_ids.copy(), self.n_tokens, self.must_eval)
        seed = self.current_seed
        fitted = copy.copy(state)  # llama_cpp wants arrays of this model's n_ctx and n_batch
        fitted.input_ids = np.resize(state.input_ids, self.input_ids.shape)
        if len(state.scores) != min(state.n_tokens, len(self.scores)):
            fitted.scores = np.zeros((1, self.n_vocab()), dtype=np.single)
        try:
            super().load_state(fitted)
        except RuntimeError as error:
            self.input_ids, self.n_tokens, self.must_eval = before
            self.set_seed(seed)
            if self.kv_stats().tokens < self.n_tokens:
                self.n_tokens, self.must_eval = 0, True
            if self._looks_up_cache:  # a state of set_cache(), wanted by a completion: a miss, the prompt is read instead
                return
            raise KVError(_native.last_error() or str(error), last_status()) from error

    def embed(self, *args: Any, **kwargs: Any) -> Any:
        """llama_cpp.Llama.embed, of upstream's cache only: KVError with a policy."""
        if self.kv_stats().policy != "full":
            raise KVError(
                'a KV pool serves no embeddings: use a second Llama(..., kv_policy="full", embedding=True)', KVStatus.UNSUPPORTED
            )
        return super().embed(*args, **kwargs)

    # the cache

    @property
    def progress(self) -> Optional[Progress]:
        """Who is told how far a prompt is read; set it to True for a bar, to None for nobody."""
        return self._progress

    @progress.setter
    def progress(self, told: Union[Progress, bool, None]) -> None:
        self._progress: Optional[Progress] = PromptBar() if told is True else told or None

    @property
    def _pointer(self) -> Any:
        return _native.context_pointer(self.ctx)

    def kv_stats(self) -> KVStats:
        """Measured bytes, cells and moves; also for upstream's cache (policy "full")."""
        return read_stats(self.ctx)

    def output_entropy(self, row: int = -1) -> OutputEntropy:
        """Entropy of an output of the last eval(), the newest by default: the number that recovery acts on. ValueError if there is no
        such row; KVError if a logit is NaN."""
        return read_output_entropy(self.ctx, row)

    def kv_config(self) -> Optional[FreezeConfig]:
        """The configuration that runs, with every key set; None for upstream's cache."""
        config = _native.struct("asrkf_config")
        status = _native.lib.asrkf_get_config(self._pointer, config)
        if status == KVStatus.NO_POLICY:
            return None
        _native.check(status)
        return FreezeConfig.from_string(_native.format_config(config))

    def freeze(self, begin: int, end: int) -> int:
        """Freeze positions [begin, end) until restore(); returns tokens moved, summed over layer groups.

        KVError if the range touches window, sinks or pinned positions, or the host limit; then nothing has changed.
        """
        moved = _native.ffi.new("uint64_t *")
        _native.check(_native.lib.asrkf_freeze(self._pointer, 0, begin, end, moved))
        return moved[0]

    def restore(self, begin: int, end: int) -> int:
        """Restore the frozen tokens of [begin, end); KVError if the pool has no room for all of them."""
        moved = _native.ffi.new("uint64_t *")
        _native.check(_native.lib.asrkf_restore(self._pointer, 0, begin, end, moved))
        return moved[0]

    def set_host_limit(self, limit_bytes: Union[int, str]) -> None:
        """Another host_limit from now on ("8GiB", or a number), 0 for none: what it refused may be tried again. KVError if more is in use."""
        limit = _native.parse_config(f"asrkf,host_limit={limit_bytes}").host_limit
        _native.check(_native.lib.asrkf_set_host_limit(self._pointer, limit))

    def pin(self, begin: int, end: int) -> None:
        """Never freeze positions [begin, end), also those still to come; KVError if the pool would be too small."""
        _native.check(_native.lib.asrkf_pin(self._pointer, 0, begin, end))

    def unpin(self, begin: int, end: int) -> None:
        """Take pin() back for [begin, end)."""
        _native.check(_native.lib.asrkf_unpin(self._pointer, 0, begin, end))

    def pinned(self) -> list[tuple[int, int]]:
        """Positions [begin, end) that are pinned, by pin() or the configuration."""
        return read_pinned(self._pointer)

    def kv_tokens(self, group: int = 0) -> list[tuple[int, str]]:
        """(position, state) of every token in one layer group: "active", "active-copied" (host copy valid), "frozen"."""
        positions, states = read_states(self._pointer, group, self.n_ctx())
        return [(int(position), NAMES[state]) for position, state in zip(positions, states, strict=True)]

    def kv_runs(self, group: int = 0) -> list[tuple[int, int, str]]:
        """The same run-length encoded: (begin, end, "active", "frozen" or "pinned") of positions [begin, end)."""
        return read_runs(self._pointer, group, self.n_ctx())

    def kv_rows(self, position: int, group: int = 0) -> bytes:
        """Raw cache bytes of one token (K then V, layer by layer of the group), from wherever they are."""
        raw = _native.struct("asrkf_group_stats")
        _native.check(_native.lib.asrkf_get_group_stats(self._pointer, group, raw))
        size = raw.token_bytes
        out = _native.ffi.new("uint8_t[]", size)
        _native.check(_native.lib.asrkf_get_rows(self._pointer, 0, group, position, out, size))
        return bytes(_native.ffi.buffer(out, size))

    def kv_trace(self, capacity: int = 65536) -> KVTrace:
        """Record every step from now on; `with llm.kv_trace() as trace: ...`."""
        return KVTrace(self, capacity)


class KVTrace:
    """Per-step records (struct asrkf_step) of a context, as dicts; stops at the end of the with block."""

    def __init__(self, llm: Llama, capacity: int) -> None:
        self._llm = llm
        self._capacity = capacity
        self._buffer = _native.ffi.new("struct asrkf_step[]", capacity)
        self.steps: list[dict[str, Any]] = []

    def __enter__(self) -> KVTrace:
        if self._llm._tracing:
            raise RuntimeError("a trace of this model is running: end its with block first")
        _native.check(_native.lib.asrkf_trace(self._llm._pointer, self._buffer, self._capacity))
        self._llm._tracing = True
        return self

    def __exit__(self, *_: object) -> None:
        self._llm._tracing = False
        if self._llm.ctx is None:  # closed inside the block: the engine is gone, and its records with it
            return
        n = _native.ffi.new("uint64_t *")
        _native.check(_native.lib.asrkf_trace_count(self._llm._pointer, n))
        _native.check(_native.lib.asrkf_trace(self._llm._pointer, _native.ffi.NULL, 0))
        names = [name for name, _ in _native.ffi.typeof("struct asrkf_step").fields]
        rows = (self._buffer[i % self._capacity] for i in range(max(0, n[0] - self._capacity), n[0]))
        self.steps = [{name: getattr(row, name) for name in names} for row in rows]
