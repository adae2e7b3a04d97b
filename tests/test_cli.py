"""The command line as a whole: errors are one line, and --debug shows where they come from."""

from __future__ import annotations

import importlib

import pytest

from asrkf_gguf.cli import COMMANDS, main, make_parser


def test_every_command_has_its_module_with_help(capsys):
    for command in COMMANDS:
        if command.name == "serve":
            pytest.importorskip("fastapi", reason="the server's packages are missing: pip install '.[test]'")
        with pytest.raises(SystemExit) as ended:
            make_parser(command.name).parse_args([command.name, "--help"])
        assert ended.value.code == 0 and "--debug" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["info", "plan", "calibrate", "calibrations", "run"])
def test_an_error_is_one_line_and_with_debug_a_traceback(command, capsys):
    argv = [command, "nothing.gguf", *(["-p", "x"] if command == "run" else [])]
    assert main(argv) == 1
    assert capsys.readouterr().err.startswith(f"asrkf {argv[0]}: nothing.gguf does not exist: pass the path of a GGUF")
    for with_debug in (["--debug", *argv], [*argv, "--debug"]):
        with pytest.raises(FileNotFoundError):
            main(with_debug)


def test_a_fault_of_the_program_is_one_line_that_says_so(monkeypatch, capsys):
    def fail(_):
        raise KeyError("x")

    monkeypatch.setattr(importlib.import_module("asrkf_gguf.cli.info"), "main", fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "asrkf info: KeyError: 'x' (a fault of this program: --debug shows where)\n"


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("asrkf 0.")
