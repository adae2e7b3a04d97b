"""Models from a hub: a server on this machine speaks the hub's protocol, and a child process is told to ask it."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, python
from hub_server import COMMIT, TOKEN, Hub, running
from make_models import split, write_llama3_shape, write_lora, write_tiny

from asrkf_gguf import hub as asrkf_hub

sys.path.insert(0, str(ROOT / "scripts"))
from make_llama3 import Shape, write_llama3

FILE = "tiny.Q4_0.gguf"
MIB = 1 << 20


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "repository").mkdir()
    write_tiny(tmp_path / "repository" / FILE)
    (tmp_path / "repository" / "README.md").write_text("A model.")
    with running(tmp_path / "repository") as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def settings(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    return {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), **quiet, **more}


def ask(hub: Hub, home: Path, code: str, **more: str) -> subprocess.CompletedProcess[str]:
    return python(code, **settings(hub, home, **more))


RESOLVE = """
import logging, sys
from asrkf_gguf import resolve_model
logging.basicConfig()
try:
    print(resolve_model(sys.argv[1]))
except (ValueError, RuntimeError) as error:
    sys.exit(str(error))
"""


def resolve(hub: Hub, home: Path, name: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Its path on stdout, or one line on stderr, and the log there."""
    return ask(hub, home, RESOLVE.replace("sys.argv[1]", repr(name)), **more)


def path_of(result: subprocess.CompletedProcess[str]) -> Path:
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def line_of(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of what was refused."""
    assert result.returncode == 1 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def half_files(home: Path) -> list[Path]:
    return list(home.rglob("*.incomplete"))


# which file

@pytest.mark.parametrize("name", ["", ":Q4_0", ":q4_0", "/tiny.Q4_0.gguf", "/*.gguf", "@v1:Q4_0", f"@{COMMIT}"])
def test_a_name_is_enough_if_one_file_fits_it_and_it_is_fetched_once(hub, home, name):
    first = path_of(resolve(hub, home, f"hf:{hub.repository}{name}"))
    assert first.read_bytes() == (hub.folder / FILE).read_bytes()
    n_contents = hub.contents()
    assert path_of(resolve(hub, home, f"hf:{hub.repository}{name}")) == first
    assert hub.contents() == n_contents >= 1 and not half_files(home)


@pytest.mark.parametrize(("quant", "path", "fits"), [
    ("Q4_K_M", "a-Q4_K_M.gguf", True), ("q4_k_m", "a.Q4_K_M.gguf", True), ("Q4_K_M", "Q4_K_M/a-00001-of-00002.gguf", True),
    ("Q4_K", "a-Q4_K_M.gguf", False), ("Q4_K_M", "a_q4_k_m.gguf", True), ("F16", "a-BF16.gguf", False),
    ("Q4_0", "a-Q4_0_4_4.gguf", False), ("Q4_K_XL", "a-UD-Q4_K_XL.gguf", True),
    ("F16", "mmproj-F16.gguf", False), ("", "a.imatrix.gguf", False), ("", "a.gguf", True),
])  # fmt: skip
def test_a_quantisation_is_a_whole_word_of_the_name(quant, path, fits):
    assert asrkf_hub.Name("a/b", quant=quant).fits(path) == fits


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/", "hf:a/b:", "hf:a/b/", "hf:a/b@", "hf:a b/c", "hf:a/b:Q4/c"])
def test_what_is_not_a_name_is_refused_with_the_form(text):
    with pytest.raises(ValueError, match="is not hf:OWNER/REPO"):
        asrkf_hub.Name.parse(text)


def test_a_choice_that_is_not_clear_lists_what_there_is(hub, home):
    write_tiny(hub.folder / "tiny.Q8_0.gguf")
    for name, n in (("", "2"), (":Q5_K_M", "no"), ("/none.gguf", "no")):
        for command in ("run", "plan"):
            arguments = [command, f"hf:{hub.repository}{name}", *(["-p", "x"] if command == "run" else [])]
            line = line_of(ask(hub, home, f"from asrkf_gguf.cli import main; raise SystemExit(main({arguments!r}))"))
            assert f"{n} files fit" in line and "tiny.Q4_0.gguf (1.6 MiB), tiny.Q8_0.gguf (1.6 MiB)" in line
    assert hub.contents() == 0


def test_a_repository_without_a_gguf_says_where_they_are(hub, home):
    (hub.folder / FILE).rename(hub.folder / "model.safetensors")
    assert "names end in -GGUF" in line_of(resolve(hub, home, f"hf:{hub.repository}"))


def test_a_split_model_comes_with_all_its_parts_and_loads(hub, home):
    parts = split(hub.folder / FILE, 3)
    assert len(parts) == 3
    code = (f"from asrkf_gguf import Llama\nllm = Llama.from_pretrained({hub.repository!r}, quant='Q4_0', n_ctx=512, verbose=False)\n"
            "llm.eval(range(9))\nprint(llm.model_path)")  # fmt: skip
    path = path_of(ask(hub, home, code))
    assert path.name == parts[0].name and sorted(other.name for other in path.parent.iterdir()) == [part.name for part in parts]


def test_a_part_that_the_repository_lacks_is_named_before_the_others_are_fetched(hub, home):
    split(hub.folder / FILE, 3)[1].unlink()
    line = line_of(resolve(hub, home, f"hf:{hub.repository}:Q4_0"))
    assert "lacks 1 of the 3 parts: tiny.Q4_0-00002-of-00003.gguf" in line and hub.contents() == 0


# whole, or not at all

@pytest.fixture
def large(hub) -> str:
    """The name of a file of 48 MiB: the hub's library writes 10 MiB at a time."""
    write_tiny(hub.folder / "large.Q8_0.gguf", n_ff=16384)
    assert (hub.folder / "large.Q8_0.gguf").stat().st_size > 48 * MIB
    return "large.Q8_0.gguf"


def begins(hub: Hub) -> list[str]:
    """Where each request for the content began."""
    asked = (line.split()[2] for line in hub.asked if line.startswith("GET /cdn/"))
    return [begin for begin in asked if begin == "all" or begin.endswith("-")]


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_cut_connection_goes_on_where_it_was_cut(hub, home, large, how):
    hub.cuts = [(25 * MIB, how), (15 * MIB, how)]
    path = path_of(resolve(hub, home, f"hf:{hub.repository}:Q8_0"))
    assert path.read_bytes() == (hub.folder / large).read_bytes()
    first, second, third = begins(hub)
    assert first == "all" and 0 < int(second[6:-1]) < int(third[6:-1])


def test_after_the_program_ended_another_goes_on_and_half_a_file_is_no_file(hub, home, large):
    hub.cuts = [(35 * MIB, "hang")]
    name = f"hf:{hub.repository}:Q8_0"
    code = f"from asrkf_gguf import resolve_model; resolve_model({name!r})"
    child = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **settings(hub, home)}, stderr=subprocess.DEVNULL)
    assert hub.hangs.wait(60)
    while not (half := half_files(home)) or half[0].stat().st_size == 0:
        assert child.poll() is None
    child.kill()
    child.wait()
    kept = half_files(home)[0].stat().st_size
    assert kept >= 10 * MIB
    assert "the cache has no file of it" in line_of(resolve(hub, home, name, HF_HUB_OFFLINE="1"))
    assert path_of(resolve(hub, home, name)).read_bytes() == (hub.folder / large).read_bytes() and not half_files(home)
    assert begins(hub) == ["all", f"bytes={kept}-"]


def test_a_file_with_another_hash_is_deleted(hub, home):
    hub.corrupt = True
    assert "does not have the hub's hash" in line_of(resolve(hub, home, f"hf:{hub.repository}"))
    assert not half_files(home) and not list(home.rglob("*.gguf"))
    hub.corrupt = False
    assert path_of(resolve(hub, home, f"hf:{hub.repository}")).read_bytes() == (hub.folder / FILE).read_bytes()


def test_a_file_of_another_size_in_the_cache_is_fetched_again(hub, home):
    path = path_of(resolve(hub, home, f"hf:{hub.repository}"))
    os.truncate(path, 1000)
    again = resolve(hub, home, f"hf:{hub.repository}")
    assert path_of(again).read_bytes() == (hub.folder / FILE).read_bytes() and "in the cache has 1000 bytes" in again.stderr


def test_a_disk_that_is_too_small_is_an_error_before_the_first_byte(hub, home):
    with (hub.folder / "tiny.F32.gguf").open("wb") as file:
        file.truncate(8 << 40)
    hub.digests["tiny.F32.gguf"] = "0" * 64
    line = line_of(resolve(hub, home, f"hf:{hub.repository}:F32"))
    assert "8192.00 GiB are to be fetched" in line and "HF_HUB_CACHE" in line and hub.contents() == 0


def test_a_server_that_gives_nothing_more_is_an_error_that_says_what_is_kept(hub, home, large):
    hub.cuts = [(25 * MIB, "reset"), (0, "reset")]
    result = resolve(hub, home, f"hf:{hub.repository}:Q8_0")
    assert result.returncode == 1 and "run it again" in result.stderr.splitlines()[-1]
    (half,) = half_files(home)
    assert half.stat().st_size >= 10 * MIB
    path_of(resolve(hub, home, f"hf:{hub.repository}:Q8_0"))


# who may

def test_the_token_is_the_users_and_is_shown_to_the_hub_alone(hub, home):
    hub.is_gated = True
    assert "is gated: ask for access at" in (line := line_of(resolve(hub, home, f"hf:{hub.repository}"))) and "HF_TOKEN" in line
    assert path_of(resolve(hub, home, f"hf:{hub.repository}", HF_TOKEN=TOKEN)).is_file()
    (home / "token").write_text(TOKEN)
    write_tiny(hub.folder / "tiny.Q8_0.gguf", n_layer=1)
    assert path_of(resolve(hub, home, f"hf:{hub.repository}:Q8_0")).is_file()
    assert {line.split()[-1] for line in hub.asked if " /cdn/" in line} == {"anyone"}


@pytest.mark.parametrize(("name", "state", "token", "says"), [
    ("", {"is_gated": True, "lets_in": False}, TOKEN, "is gated: ask for access"),
    ("", {"is_private": True}, "", "or it is private"),
    ("", {}, "hf_expired", "the token is not accepted"),
    ("x", {}, "", "there is no http"),
    ("x", {}, TOKEN, "there is no http"),
    ("@v2", {}, "", "has no revision 'v2'"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(hub, home, name, state, token, says):
    vars(hub).update(state)
    assert says in line_of(resolve(hub, home, f"hf:{hub.repository}{name}", HF_TOKEN=token))


# without a network

def test_offline_the_cache_alone_is_asked(hub, home):
    path = path_of(resolve(hub, home, f"hf:{hub.repository}:Q4_0"))
    n_asked = len(hub.asked)
    assert path_of(resolve(hub, home, f"hf:{hub.repository}:Q4_0", HF_HUB_OFFLINE="1")) == path
    assert path_of(resolve(hub, home, f"hf:{hub.repository}@{COMMIT}", HF_HUB_OFFLINE="1")) == path
    assert "no files fit; there are: tiny.Q4_0.gguf" in line_of(resolve(hub, home, f"hf:{hub.repository}:Q8_0", HF_HUB_OFFLINE="1"))
    planned = ask(hub, home, f"from asrkf_gguf import plan; print(plan('hf:{hub.repository}', 512).n_ctx)", HF_HUB_OFFLINE="1")
    assert planned.stdout == "512\n", planned.stderr
    assert len(hub.asked) == n_asked


def test_a_hub_that_does_not_answer_leaves_the_copy_in_the_cache_and_it_says_so(hub, home):
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:1"}
    assert "the hub does not answer" in line_of(resolve(hub, home, f"hf:{hub.repository}", **nobody))
    path = path_of(resolve(hub, home, f"hf:{hub.repository}"))
    result = resolve(hub, home, f"hf:{hub.repository}", **nobody)
    assert path_of(result) == path and "taking the copy in" in result.stderr


# what it is

def test_what_is_not_a_model_is_refused_after_its_header(hub, home):
    write_lora(hub.folder / "adapter.gguf")
    assert "is a LoRA adapter" in line_of(resolve(hub, home, f"hf:{hub.repository}/adapter.gguf"))
    write_llama3_shape(hub.folder / "other.gguf", arch="sd3")
    hub.digests["other.gguf"] = "0" * 64
    assert "does not know its architecture 'sd3'" in line_of(resolve(hub, home, f"hf:{hub.repository}/other.gguf"))
    (hub.folder / "short.gguf").write_bytes((hub.folder / FILE).read_bytes()[:-1000])
    assert "short.gguf is truncated" in line_of(resolve(hub, home, f"hf:{hub.repository}/short.gguf"))
    assert hub.sent["other.gguf"] < 24 * MIB and not half_files(home)


# Llama

@pytest.mark.parametrize("which", ["quant='Q4_0'", "'*Q4_0.gguf'", "filename='tiny.Q4_0.gguf', revision='v1'", "cache_dir='CACHE'",
                                   "'*.gguf', local_dir='LOCAL'"])  # fmt: skip
def test_from_pretrained_makes_our_llama_with_its_policy(hub, home, which):
    which = which.replace("CACHE", str(home / "mine")).replace("LOCAL", str(home / "local"))
    options = "n_ctx=512, verbose=False, kv_policy='asrkf', kv_pool=512"
    code = (f"from asrkf_gguf import Llama\nllm = Llama.from_pretrained({hub.repository!r}, {which}, {options})\n"
            "llm.eval(list(range(100)))\nprint(type(llm).__module__, llm.kv_stats().policy, llm.kv_stats().tokens, llm.model_path)")  # fmt: skip
    result = ask(hub, home, code)
    assert result.returncode == 0, result.stderr
    *what, path = result.stdout.split()
    assert what == ["asrkf_gguf.llama", "asrkf", "100"]
    assert Path(path).is_relative_to(home / ("mine" if "mine" in which else "local" if "local" in which else "hub"))


def test_from_pretrained_does_not_mix_two_ways_of_naming_a_file(hub, home):
    result = ask(hub, home, f"from asrkf_gguf import Llama\nLlama.from_pretrained({hub.repository!r}, quant='Q4_0', local_dir='x')")
    assert "local_dir and additional_files need a filename" in result.stderr


@pytest.mark.parametrize("first_bytes", [16 * MIB, MIB])
def test_a_plan_reads_the_header_of_one_quantisation_and_no_weights(hub, home, first_bytes):
    """A header of more than two megabytes, also where a first try brings one."""
    big = hub.folder / "big.Q4_K_M.gguf"
    write_llama3(big, Shape(n_layer=1, n_embd=512, n_head=4, n_head_kv=1, n_ff=512))
    code = (f"from asrkf_gguf import hub, plan; import dataclasses, json; hub._HEADER_BYTES = {first_bytes}\n"
            "print(json.dumps(dataclasses.asdict(plan(%r, 8192, vram='8GiB'))['sides']))")  # fmt: skip
    there = ask(hub, home, code % f"hf:{hub.repository}:q4_k_m")
    assert there.returncode == 0, there.stderr
    assert there.stdout == ask(hub, home, code % str(big)).stdout
    assert 2 * MIB < hub.sent[big.name] < 24 * MIB < big.stat().st_size / 3
    told = ask(hub, home, f"from asrkf_gguf.cli import main; main(['info', 'hf:{hub.repository}:q4_k_m'])")
    assert "big.Q4_K_M.gguf: bytes of K and V by pool" in told.stdout and hub.sent[big.name] < 48 * MIB < big.stat().st_size, told.stderr


def test_a_bar_is_shown_on_a_terminal(hub, home):
    """In a pseudo-terminal: where stderr is none, there is no bar."""
    import fcntl
    import pty
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    code = f"from asrkf_gguf import resolve_model; resolve_model('hf:{hub.repository}')"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **settings(hub, home)}, stderr=theirs, check=True, cwd=ROOT)
    os.close(theirs)
    shown = ""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while piece := os.read(ours, 1 << 16):
            shown += piece.decode()
    os.close(ours)
    assert FILE in shown and "%|" in shown
