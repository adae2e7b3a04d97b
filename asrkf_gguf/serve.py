"""`asrkf serve`: llama-cpp-python's OpenAI-compatible server with our `Llama`, GET /v1/kv_stats, and the page /kv.

The server is llama_cpp.server as it is installed. It reads settings, makes a LlamaProxy of them, and that makes models. Here
the settings have two fields more, the proxy makes our `Llama`, and the app gets a route and a middleware. Import this module
only where the server's packages are installed (pip install "asrkf-gguf[serve]"); without them it raises ImportError.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import llama_cpp

from . import _compat
from ._native import KVError, KVStatus
from .config import FreezeConfig
from .live import Live
from .llama import Llama
from .models import MODEL_FORMS, resolve_model
from .opening import opening_line
from .stats import KVStats, counted_since

try:
    import uvicorn
    from fastapi import APIRouter, Depends, FastAPI
    from fastapi.responses import HTMLResponse, JSONResponse
    from llama_cpp.server import app as server_app
    from llama_cpp.server import cli as server_cli
    from llama_cpp.server import model as server_model
    from llama_cpp.server import settings as server_settings
    from llama_cpp.server import types as server_types
    from pydantic import Field, ValidationError
    from starlette.middleware import Middleware
except ImportError as error:
    raise ImportError(f'the package {error.name} is missing: pip install "asrkf-gguf[serve]"', name=error.name) from error


# settings: CLI, environment and config file carry them, as those of llama_cpp.server

class ModelSettings(server_settings.ModelSettings):
    """llama_cpp.server's settings of a model with our policy. Where a default differs, the field is repeated here."""

    kv_policy: str = Field(default="asrkf", description='"full", a preset, or "name,key=value,..." (asrkf info lists the keys).')
    kv_pool: Optional[str] = Field(
        default=None, coerce_numbers_to_str=True,
        description="The pool: auto, cells, part of n_ctx, or bytes. (default: what the policy says, else what fits the device)",
    )  # fmt: skip
    n_ctx: int = Field(default=8192, ge=0, description="The context size, tokens; 0: the model's own.")
    n_gpu_layers: int = Field(default=-1, ge=-1, description="Layers on the GPU, -1 for all.")
    flash_attn: bool = Field(default=True, description="Flash attention, which a policy needs. (default: True)")
    logits_all: bool = Field(
        default=False,
        description="Keep the logits of every token: for logprobs. Takes n_ctx rows of the vocabulary in host memory, and leaves "
        "the end of a prompt unknown, so there is no rewalk. (default: False)",
    )
    verbose: bool = Field(default=False, description="llama.cpp's log. (default: False)")

    def policy(self) -> dict[str, Optional[str]]:
        """kv_policy and kv_pool for Llama(); ValueError for an unknown policy or key, and for a setting that llama-cpp-python drops."""
        FreezeConfig.from_string(self.kv_policy)
        if self.rpc_servers:
            raise ValueError("rpc_servers: llama-cpp-python's Llama ignores it; llama-server --rpc does not (docs/more-than-one-machine.md)")
        return {"kv_policy": self.kv_policy, "kv_pool": self.kv_pool}


class Settings(server_settings.ServerSettings, ModelSettings):
    """What the command line takes."""


class ConfigFile(server_settings.ServerSettings):
    """What a config file holds: the server's settings, and those of each model."""

    models: list[ModelSettings] = Field(min_length=1, description="The first is loaded at once, the others when asked for.")


# the model

class ServedLlama(Llama):
    """A Llama that remembers what the cache counted during its newest finished completion, and shows what it does meanwhile."""

    last_completion: Optional[dict[str, Any]] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.live = Live(self)
        self.progress = lambda *_: self.live.take()  # between the batches of a prompt

    def eval(self, tokens: Sequence[int]) -> None:
        super().eval(tokens)
        self.live.take()

    def create_completion(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("logprobs") is not None and not self.keeps_all_logits:
            raise KVError("logprobs is not supported for models created with logits_all=False", KVStatus.UNSUPPORTED)
        before = self.kv_stats()
        answer = super().create_completion(*args, **kwargs)
        if isinstance(answer, dict):
            self._finished(answer, before)
            return answer

        def run() -> Iterator[Any]:
            before = self.kv_stats()
            for chunk in answer:
                if chunk["choices"][0]["finish_reason"]:  # the last; an answer that is left unread has none
                    self._finished(chunk, before)
                yield chunk

        return run()

    def _finished(self, answer: dict[str, Any], before: KVStats) -> None:
        self.last_completion = {"id": answer["id"], **counted_since(before, self.kv_stats())}


class PolicyProxy(server_model.LlamaProxy):
    """llama_cpp.server's holder of the one model that is loaded, and maker of it; it makes ours."""

    @staticmethod
    def load_llama_from_model_settings(settings: server_settings.ModelSettings) -> llama_cpp.Llama:
        assert isinstance(settings, ModelSettings)  # create_app() gives no others
        policy: dict[str, Any] = settings.policy()

        class PolicyLlama(ServedLlama):
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **{**kwargs, **policy})

        if settings.hf_model_repo_id is None:  # else the model is a pattern for files of that repository
            settings = settings.model_copy(update={"model": str(resolve_model(settings.model))})
        with _compat.replaced(llama_cpp, "Llama", PolicyLlama):  # the server makes llama_cpp.Llama, or its from_pretrained()
            return server_model.LlamaProxy.load_llama_from_model_settings(settings)


# errors

# What the engine refuses is the request's fault, not the server's: clients repeat a request that ended in a status of 500.
REFUSALS = frozenset((KVStatus.INVALID_ARGUMENT, KVStatus.PROTECTED, KVStatus.POOL_FULL, KVStatus.HOST_LIMIT, KVStatus.UNSUPPORTED))


def refusal(error: Exception) -> Optional[tuple[int, dict[str, Any]]]:
    """Status and content for what the engine refuses; None for any other error."""
    if isinstance(error, KVError) and error.status in REFUSALS:
        return 400, {"message": str(error), "type": "invalid_request_error", "param": None, "code": error.status.name.lower()}
    return None


_compat.answer_errors(refusal)


class StreamErrors:
    """Middleware: an error that ends a streamed answer reaches the client with its text.

    llama_cpp.server sends the head of a stream before it reads the prompt, and lets the connection break if that fails. Here
    the head waits for the first bytes behind it: an error before them is an HTTP error, one after them the stream's last event.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        held: list[Any] = []
        is_stream = has_begun = False
        request = bytearray()

        async def listen() -> Any:
            message = await receive()
            if message["type"] == "http.request":
                request.extend(message.get("body", b""))
            return message

        async def hold(message: Any) -> None:
            nonlocal is_stream, has_begun
            if message["type"] == "http.response.start":
                is_stream = any(key == b"content-type" and value.startswith(b"text/event-stream") for key, value in message["headers"])
            if is_stream and not message.get("body"):  # the head; or the end, which comes just before the error does
                held.append(message)
                return
            has_begun = True
            while held:
                await send(held.pop(0))
            await send(message)

        try:
            await self.app(scope, listen, hold)
        except Exception as error:
            if not is_stream:
                raise
            status, content = stream_error(error, bytes(request))
            if has_begun:
                await send({"type": "http.response.body", "body": f"data: {json.dumps({'error': content})}\n\n".encode()})
            else:
                await JSONResponse({"error": content}, status)(scope, receive, send)
            return
        for message in held:
            await send(message)


def stream_error(error: Exception, request: bytes) -> tuple[int, Any]:
    """Status and content, as llama_cpp.server answers the same error of the same request without streaming."""
    while nested := getattr(error, "exceptions", None):  # of task groups
        error = nested[0]
    fields = json.loads(request)
    kind = server_types.CreateChatCompletionRequest if "messages" in fields else server_types.CreateCompletionRequest
    return _compat.answer_to(error, kind.model_validate(fields))


# the app

router = APIRouter()
PAGE = Path(__file__).with_name("kv_page.html")


@router.get("/v1/kv_stats", summary="KV cache", dependencies=[Depends(server_app.authenticate)], tags=["KV cache"])
async def get_kv_stats() -> JSONResponse:
    """`kv`: kv_stats() of the loaded model: bytes and cells as they are now, counters since it was loaded. `last_completion`:
    what the counters gained in the newest completion that was read to its end, with its id. 503 if no model is loaded."""
    async with _compat.server_lock():
        alias, llm = _compat.server_model()
        if llm is None:
            text = "no model is loaded: the last one that was asked for failed; a request with the name of another loads it"
            return JSONResponse({"error": {"message": text, "type": "no_model", "param": None, "code": None}}, 503)
        return JSONResponse({"model": alias, "kv": dataclasses.asdict(llm.kv_stats()), "last_completion": llm.last_completion})


@router.get("/v1/kv_live", summary="KV cache, live", dependencies=[Depends(server_app.authenticate)], tags=["KV cache"])
async def get_kv_live() -> JSONResponse:
    """What the page at /kv shows, also while an answer is generated: by layer group the positions [begin, end) that are active,
    frozen or pinned, bytes, and figures over time, from the first request on. {} until there is a picture, or without a model."""
    alias, llm = _compat.server_model()
    if llm is None:
        return JSONResponse({})
    picture = llm.live.look()
    if not _compat.server_lock().locked():  # it computes nothing: the picture is as old as its last answer
        async with _compat.server_lock():
            llm.live.take(1.0)
            picture = llm.live.look()
    return JSONResponse({"model": alias, **picture} if picture else {})


@router.get("/kv", summary="The KV cache, live, as a page", tags=["KV cache"])
async def get_kv_page() -> HTMLResponse:
    return HTMLResponse(PAGE.read_text())


def create_app(server: server_settings.ServerSettings, models: list[ModelSettings]) -> FastAPI:
    """llama_cpp.server's app with our model, loaded, and our route; ValueError or OSError with the reason if it cannot be."""
    os.environ.pop("CONFIG_FILE", None)  # read already; the server would read it anew, without our fields
    with _compat.server_makes(PolicyProxy):
        app = server_app.create_app(server_settings=server, model_settings=list[server_settings.ModelSettings](models))
    app.include_router(router)
    app.user_middleware.append(Middleware(StreamErrors))  # innermost: CORS serves its answers, too
    return app


# the command

def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Every option can be written with - for _, and comes from the environment if it is not given (N_CTX=4096)."
    parser.add_argument("path", nargs="?", metavar="MODEL", help=MODEL_FORMS)
    parser.add_argument("-c", dest="n_ctx", type=int, help="--n_ctx")
    parser.add_argument("-t", "--threads", type=int, help="--n_threads and --n_threads_batch")
    parser.add_argument("--config_file", help="JSON or YAML: the server's settings, and under models those of each model")
    server_cli.add_args_from_model(parser, Settings)


def read_settings(arguments: argparse.Namespace) -> tuple[server_settings.ServerSettings, list[ModelSettings]]:
    """The settings of the server and of its models; ValueError, in one line, for a value that does not fit."""
    file = arguments.config_file or os.environ.get("CONFIG_FILE")
    try:
        if file:
            ours = ("command", "function", "config_file", "debug")
            others = [name for name, value in vars(arguments).items() if value is not None and name not in ours]
            if others:
                raise ValueError(f"{file} holds all settings, and {', '.join(others)} would be ignored: put them there")
            text = Path(file).read_text()
            if file.endswith((".yaml", ".yml")):
                import yaml

                text = json.dumps(yaml.safe_load(text))
            config = ConfigFile.model_validate_json(text)
            return config, config.models
        arguments.model = arguments.path or arguments.model or os.environ.get("MODEL")
        if not arguments.model:
            raise ValueError(f"give MODEL: {MODEL_FORMS}")
        if arguments.threads:
            arguments.n_threads = arguments.n_threads_batch = arguments.threads
        parse: Any = server_cli.parse_model_from_args  # it says that it returns the class
        return parse(server_settings.ServerSettings, arguments), [parse(ModelSettings, arguments)]
    except ValidationError as error:
        found = "; ".join(f"{'.'.join(map(str, line['loc']))}: {line['msg']}" for line in error.errors())
        raise ValueError(f"{file + ': ' if file else ''}{found}") from error


def main(arguments: argparse.Namespace) -> int:
    server, models = read_settings(arguments)
    app = create_app(server, models)
    _, llm = _compat.server_model()
    print(f"{opening_line(llm)}; figures at /v1/kv_stats, a picture at /kv", file=sys.stderr)
    uvicorn.run(app, host=server.host, port=server.port, ssl_keyfile=server.ssl_keyfile, ssl_certfile=server.ssl_certfile)
    return 0
