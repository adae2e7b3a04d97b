"""pytest plugin for llama.cpp's server suite: one local model, no downloads. Started by scripts/upstream_tests.

The suite's presets name models on a hub. Its first one (a story model of 260,000 weights, the model of most cases)
becomes the file ASRKF_SUITE_MODEL; a case that starts a server with any other is skipped, and so is one that downloads,
or asserts what the story model says or how it counts tokens (LEFT_OUT). Every skip has its reason.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import pytest
import requests
import utils  # the suite's

MODEL = os.environ["ASRKF_SUITE_MODEL"]

STORY = "asserts the story model's text or its token counts"
HUB = "needs the model ggml-org/tinygemma3-GGUF:Q8_0"
NO_UI = "the build has no web UI"
# a function of a file, or one of its cases -> why it cannot pass on another model, this build, or without a network
LEFT_OUT = {
    "test_basic.py::test_no_ui": NO_UI,
    "test_security.py::test_access_static_assets_without_api_key": NO_UI,
    "test_proxy.py::test_mcp_proxy": "needs http://example.com",
    **dict.fromkeys((
        "test_completion.py::test_completion", "test_completion.py::test_completion_stream",
        "test_completion.py::test_completion_with_openai_library", "test_completion.py::test_completion_stream_with_openai_library",
        "test_completion.py::test_nocache_long_input_prompt", "test_completion.py::test_completion_prompt_cache",
        "test_completion.py::test_completion_response_fields[I believe the meaning of life is-32-response_fields1]",
        "test_ctx_shift.py::test_ctx_shift_enabled", "test_ctx_shift.py::test_ctx_shift_disabled_short_prompt",
        "test_ctx_shift.py::test_ctx_shift_disabled_long_prompt", "test_ctx_shift.py::test_ctx_shift_disabled_stream",
        "test_slot_save.py::test_slot_save_restore", "test_slot_save.py::test_slot_restore_legacy_token_list", "test_slot_save.py::test_slot_erase",
        "test_tokenize.py::test_tokenize_with_bos",
        "test_chat_completion.py::test_chat_completion", "test_chat_completion.py::test_chat_completion_cached_tokens",
        "test_chat_completion.py::test_chat_completion_stream", "test_chat_completion.py::test_chat_completion_with_openai_library",
        "test_chat_completion.py::test_chat_template", "test_chat_completion.py::test_return_progress[64-4-False]",
        "test_chat_completion.py::test_completion_with_json_schema[True-json_schema1-6-\"42\"]",
        "test_compat_anthropic.py::test_anthropic_tool_result",
        "test_compat_oai_responses.py::test_responses_with_openai_library", "test_compat_oai_responses.py::test_responses_stream_with_openai_library",
    ), STORY),
    **dict.fromkeys((
        "test_router.py::test_router_chat_completion_stream[ggml-org/tinygemma3-GGUF:Q8_0-True]", "test_router.py::test_router_unload_model",
        "test_router.py::test_router_models_max_evicts_lru", "test_router.py::test_router_queue_does_not_evict_busy_model",
        "test_router.py::test_router_queue_coalesces_requests_for_same_model", "test_router.py::test_router_queue_client_disconnect_keeps_model",
        "test_router.py::test_router_queue_is_fifo", "test_router.py::test_router_queue_two_waiters_share_one_eviction",
        "test_router.py::test_router_no_models_autoload", "test_router.py::test_router_api_key_required",
        "test_router.py::test_router_dedup_cache_models", "test_router.py::test_router_download_model", "test_stream.py",
    ), HUB),
}  # fmt: skip

story_model = utils.ServerPreset.tinyllama2


def local_model() -> utils.ServerProcess:
    server = story_model()
    server.model_hf_repo = server.model_hf_file = None
    server.model_file = MODEL
    return server


plain_start, plain_get, plain_request = utils.ServerProcess.start, requests.get, utils.ServerProcess.make_request


def start(self: utils.ServerProcess, *arguments: object, **keywords: object) -> None:
    wanted = self.model_hf_repo or self.model_url or self.mmproj_url
    if wanted:
        pytest.skip(f"needs the model {wanted}")
    plain_start(self, *arguments, **keywords)


def make_request(self: utils.ServerProcess, method: str, path: str, data: object = None, *arguments: object, **keywords: object) -> object:
    if path == "/completion" and isinstance(data, dict):
        data = {"ignore_eos": True, **data}  # the story model does not end before n_predict, and cases count on it
    return plain_request(self, method, path, data, *arguments, **keywords)


def get(url: str, *arguments: object, **keywords: object) -> requests.Response:
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        pytest.skip(f"needs {url}", allow_module_level=True)
    return plain_get(url, *arguments, **keywords)


def download_file(url: str, output_file_path: str | None = None) -> str:
    pytest.skip(f"needs {url}", allow_module_level=True)


utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.ServerPreset.tinyllama2 = staticmethod(local_model)
utils.ServerProcess.start = start
utils.ServerProcess.make_request = make_request
utils.download_file = download_file
requests.get = get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = item.nodeid.removeprefix("unit/")
        names = (case, case.split("[")[0], case.split("::")[0])
        for reason in (LEFT_OUT[name] for name in names if name in LEFT_OUT):
            item.add_marker(pytest.mark.skip(reason=reason))
