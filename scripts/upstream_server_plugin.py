"""pytest plugin for llama.cpp's server suite: one local model, no downloads. Started by scripts/upstream_tests.

The suite's presets name models on a hub. Its first one (a story model of 260,000 weights, the model of most cases)
becomes the file ASRKF_SUITE_MODEL; a case that starts a server with any other is skipped, and so is one that downloads,
or asserts what the story model says or how it counts tokens (ANOTHER_MODEL). Every skip has its reason.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

import pytest
import requests
import utils  # the suite's

MODEL = os.environ["ASRKF_SUITE_MODEL"]

# case, or file, or function of a file -> reason
ANOTHER_MODEL: dict[str, str] = {}

story_model = utils.ServerPreset.tinyllama2


def local_model() -> utils.ServerProcess:
    server = story_model()
    server.model_hf_repo = server.model_hf_file = None
    server.model_file = MODEL
    return server


plain_start, plain_get = utils.ServerProcess.start, requests.get


def start(self: utils.ServerProcess, *arguments: object, **keywords: object) -> None:
    wanted = self.model_hf_repo or self.model_url or self.mmproj_url
    if wanted:
        pytest.skip(f"needs the model {wanted}")
    plain_start(self, *arguments, **keywords)


def get(url: str, *arguments: object, **keywords: object) -> requests.Response:
    if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
        pytest.skip(f"needs {url}", allow_module_level=True)
    return plain_get(url, *arguments, **keywords)


def download_file(url: str, output_file_path: str | None = None) -> str:
    pytest.skip(f"needs {url}", allow_module_level=True)


utils.ServerPreset.load_all = staticmethod(lambda: None)
utils.ServerPreset.tinyllama2 = staticmethod(local_model)
utils.ServerProcess.start = start
utils.download_file = download_file
requests.get = get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        case = item.nodeid.removeprefix("unit/")
        names = (case, case.split("[")[0], case.split("::")[0])
        for reason in (ANOTHER_MODEL[name] for name in names if name in ANOTHER_MODEL):
            item.add_marker(pytest.mark.skip(reason=reason))
