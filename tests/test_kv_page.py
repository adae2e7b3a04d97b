"""The page at /kv of `asrkf serve`, in a browser without a window: it shows what the cache does while an answer is generated."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server's packages are missing: pip install '.[test]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install '.[test]'")
from test_serve import serving  # noqa: E402  it needs the client of the server

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]  # fmt: skip
POLICY = "asrkf,layers=0-9@512/10-29@768,pinned=64-128"
COLOURS = {"active": (76, 159, 112), "frozen": (91, 143, 214), "pinned": (217, 130, 43)}

# The colour of a strip's pixel in the middle of positions [begin, end) of so many
PIXEL = """([group, begin, end, tokens]) => {
    const canvas = document.querySelectorAll("canvas.strip")[group];
    const x = Math.floor((begin + end) / 2 / tokens * canvas.width);
    return Array.from(canvas.getContext("2d").getImageData(x, 5, 1, 1).data).slice(0, 3);
}"""


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    log = tmp_path_factory.mktemp("page") / "log"
    with serving(log, "smollm2", "-c", "2048", "-t", "1", "--kv-policy", POLICY) as running:
        yield running


@pytest.fixture(scope="module")
def page():
    if BROWSER is None:
        pytest.skip("no browser: apt install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=BROWSER, args=QUIET)
        yield browser.new_page(viewport={"width": 1000, "height": 900})
        browser.close()


def live(server) -> dict:
    with urllib.request.urlopen(f"{server.address}/v1/kv_live", timeout=60) as answer:
        return json.load(answer)


def test_the_figures_are_there_while_an_answer_is_generated_and_hold_every_token_once(server, text):
    assert live(server) == {} or live(server)["tokens"] == 0
    seen, stream = [], server.complete(text[:3600], 96, stream=True)  # long enough to be asked a few times
    for _ in stream:
        seen.append(live(server))
    seen = [picture for picture in seen if picture["tokens"] >= 128]  # on a slow machine the first may be from before it was read
    newest = seen[-1]
    assert [(group["n_layers"], group["pool_cells"]) for group in newest["groups"]] == [(10, 512), (20, 768)] and newest["model"] == "smollm2"
    for picture in seen:
        for group in picture["groups"]:
            ends = [0, *(end for _, end, _ in group["runs"])]
            assert ends[:-1] == [begin for begin, _, _ in group["runs"]] and ends[-1] == picture["tokens"]
            states = {state for _, _, state in group["runs"]}
            assert states <= {"active", "frozen", "pinned"}
            assert "frozen" in states or picture["tokens"] <= group["pool_cells"]  # a picture may be of a prompt that is read still
            assert any(begin == 64 and end == 128 for begin, end, state in group["runs"] if state == "pinned")
    whole = [picture for picture in seen if picture["tokens"] > 768]  # no group can hold these
    assert len({picture["tokens"] for picture in whole}) > 3  # it is live
    frozen = [sum(end - begin for begin, end, state in group["runs"] if state == "frozen") * group["n_layers"] for group in newest["groups"]]
    layers = sum(group["n_layers"] for group in newest["groups"])
    assert sum(frozen) / layers == pytest.approx(newest["samples"][-1]["frozen_cells"], abs=1)
    assert len(newest["samples"]) > 3 and newest["samples"][-1]["entropy"] > 0 and 0 <= newest["samples"][-1]["missed_attention_ratio"] < 1
    assert newest["bytes"]["device_kv_bytes"] == server.kv_stats()["kv"]["device_kv_bytes"]


def test_the_page_shows_them(server, page, text, tmp_path):
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"{server.address}/kv")
    reader = threading.Thread(target=lambda: server.complete(text[5000:9500], 40))
    reader.start()
    page.wait_for_function("document.getElementById('missed').textContent.startsWith('now')", timeout=90_000)
    page.wait_for_function("document.getElementById('entropy').textContent.startsWith('now')")
    assert page.locator("#model").inner_text() == "smollm2"
    reader.join(120)
    page.wait_for_timeout(3000)  # what it ended with is drawn
    newest = live(server)
    assert f" of 2048 cells: {newest['tokens']} tokens" in page.locator("#said").inner_text()
    n_checked = 0
    for index, group in enumerate(newest["groups"]):
        for begin, end, state in group["runs"]:
            if end - begin >= 8:  # some pixels wide
                assert tuple(page.evaluate(PIXEL, [index, begin, end, newest["tokens"]])) == COLOURS[state], (index, begin, end, state)
                n_checked += 1
    assert n_checked > 6
    (shown,) = re.findall(r"K and V of the pool\s+([\d.]+) MiB", page.locator("#bytes").inner_text())
    assert float(shown) == pytest.approx(newest["bytes"]["device_kv_bytes"] / (1 << 20), abs=0.06)
    picture = Path(os.environ.get("ASRKF_TEST_PICTURES", tmp_path)) / "kv.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000 and not problems
    assert all(url.startswith(server.address) for url in asked)  # nothing from elsewhere


def test_a_server_that_wants_a_key_shows_the_page_and_gives_its_figures_to_who_has_it(smollm2, page, tmp_path):
    with serving(tmp_path / "log", "smollm2", "-c", "512", "-t", "1", "--api-key", "secret", ready="/kv") as running:
        page.goto(f"{running.address}/kv")
        page.get_by_text("the server wants its key: open /kv#KEY").wait_for(timeout=20_000)
        page.goto(f"{running.address}/kv#secret")
        page.reload()
        page.get_by_text("512 of 512 cells").wait_for(timeout=20_000)
