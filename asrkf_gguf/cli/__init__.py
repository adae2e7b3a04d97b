"""The command `asrkf`: run or serve a model with a KV pool, or show what this build can do.

A subcommand is a row of COMMANDS and a module with two functions: add_arguments(parser), and main(arguments), which returns the
exit status. Only the module of the chosen subcommand is imported: some need packages that nothing else does.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import sys
from dataclasses import dataclass
from typing import Optional

from .. import __version__


@dataclass(frozen=True)
class Command:
    name: str
    module: str
    """In this package, with its add_arguments() and main()."""
    help: str


COMMANDS = (
    Command("run", "cli.run", "chat, or answer a prompt, with the cache's figures in a line at the end"),
    Command("info", "cli.info", "what this build can do, and what a model's cache needs"),
    Command("plan", "plan", "does a model fit the device, or a card of a given size, and with which cache"),
    Command("calibrate", "calibrate", "measure a model's layers, for layers=two and layers=each"),
    Command("calibrations", "cli.calibrations", "which models have a calibration, and where it is"),
    Command("gates", "gates.command", "make or convert the gates of kv_policy=kvzip"),
    Command("compare", "compare", "what a pool gains and costs here, with your model and text, beside upstream's caches"),
    Command("bench", "bench", "quality and needles of any GGUF against the full cache"),
    Command("plot", "cli.plot", "a picture of a run that was recorded with asrkf run --trace"),
    Command("serve", "serve", 'an OpenAI-compatible server; pip install "asrkf-gguf[serve]"'),
)


def make_parser(chosen: str) -> argparse.ArgumentParser:
    """The command line, with the options of the chosen subcommand only."""
    parser = argparse.ArgumentParser(prog="asrkf", description="Run or serve a model with a KV pool, or show what this build can do.")
    parser.add_argument("--version", action="version", version=f"asrkf {__version__}")
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(command.name, help=command.help)
        if command.name == chosen:
            module = importlib.import_module(f"asrkf_gguf.{command.module}")
            module.add_arguments(subparser)
            subparser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from")
            subparser.set_defaults(function=module.main)
    return parser


def line_of(error: Exception) -> str:
    """One line, whoever wrote it; of a kind that nobody meant for a user, with how to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, RuntimeError, OSError, ImportError)):
        return text
    return f"{type(error).__name__}: {text} (a fault of this program: --debug shows where)"


def main(argv: Optional[list[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command = next((argument for argument in argv if not argument.startswith("-")), "")
    debug = "--debug" in argv
    if command == "serve":  # llama_cpp.server writes its options with _, we with -
        argv = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), argument) for argument in argv]
    logging.basicConfig(format="asrkf: %(message)s")
    logging.getLogger("asrkf_gguf").setLevel(logging.INFO)
    logging.getLogger("asrkf_gguf.llama_cpp").propagate = False  # with --verbose as llama.cpp writes them
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # as verbose=False; else it prints all, until a Llama is made
    try:
        arguments = make_parser(command).parse_args(argv)
        return arguments.function(arguments)
    except Exception as error:
        if debug:
            raise
        print(f"asrkf {command}: {line_of(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
