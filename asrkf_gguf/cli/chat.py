"""`asrkf run` without a prompt: a chat that remembers."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

from .._native import KVError
from ..llama import Llama
from .answers import answer, summary

with contextlib.suppress(ImportError):  # Windows has none
    import readline  # noqa: F401  input() edits lines with it, and keeps what was typed

Message = dict[str, str]
LEAVE = "/quit or Control-D leaves"


def say(text: str) -> None:
    """To stderr: what the program says. stdout has the model's words alone."""
    print(text, file=sys.stderr)


class Chat:
    """The messages so far, and what a user types.

    A line is a question, or with "/" in front a command: a method of COMMANDS. An answer that Control-C ended stays as far as it
    came. What the model or the cache refuses is said in a line, and the messages are as before.
    """

    def __init__(self, llm: Llama, system: Optional[str], options: dict[str, Any]) -> None:
        self._llm = llm
        self._options = options
        self._pinned: list[tuple[int, int]] = []
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def run(self) -> int:
        say(f"Type a question, or /help for commands; Control-C ends an answer, {LEAVE}.")
        while True:
            try:
                line = input("> ").strip()
                if line == "/quit":
                    return 0
                self._command(line) if line.startswith("/") else self.ask(line)
            except KeyboardInterrupt:  # also one that comes just behind an answer
                say(f"\n{LEAVE}")
            except EOFError:
                print()
                return 0
            except (ValueError, KVError, OSError) as error:
                say(" ".join(str(error).split()))

    def ask(self, question: str) -> None:
        """Answer a question; an empty one is none."""
        if not question:
            return
        messages = [*self.messages, {"role": "user", "content": question}]
        try:
            said = answer(self._llm, messages, lambda text: print(text, end="", flush=True), **self._options)
        finally:
            print()
        say(f"[{said.line(self._llm.kv_stats(), self._llm.n_ctx())}]")
        if said.text or said.finish_reason != "interrupted":
            self.messages = [*messages, {"role": "assistant", "content": said.text}]

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"/{name} is no command: {', '.join('/' + known for known in COMMANDS)}, /quit")
        COMMANDS[name](self, rest.strip())

    # commands: the first line of a method's docstring is its help

    def help(self, _: str) -> None:
        """/help: this text"""
        for command in COMMANDS.values():
            say((command.__doc__ or "").split("\n")[0])
        say("/quit: leave; so does Control-D\nControl-C ends an answer.")

    def stats(self, _: str) -> None:
        """/stats: the cache's figures"""
        say(summary(self._llm.kv_stats()))

    def system(self, text: str) -> None:
        """/system [TEXT]: show the system prompt, or set another; the chat so far is read again with it"""
        has_one = bool(self.messages) and self.messages[0]["role"] == "system"
        if not text:
            say(self.messages[0]["content"] if has_one else "there is no system prompt: /system TEXT sets one")
            return
        self._begin_anew([{"role": "system", "content": text}, *self.messages[has_one:]])

    def pin(self, what: str) -> None:
        """/pin [system|all]: never freeze the last question and its answer, the system prompt, or all so far"""
        first = {"": -2, "all": 0, "system": 0}.get(what)
        if first is None:
            raise ValueError("/pin takes nothing (the last question and its answer), system, or all")
        if what == "system" and (not self.messages or self.messages[0]["role"] != "system"):
            raise ValueError("there is no system prompt: /system TEXT sets one")
        if not self.messages or (what == "" and len(self.messages) < 2):
            raise ValueError("there is nothing to pin yet: ask something")
        begin = self._llm.chat_span(self.messages, first)[0]
        end = self._llm.chat_span(self.messages, 0 if what == "system" else -1)[1]
        self._llm.pin(begin, end)
        self._pinned.append((begin, end))
        say(f"positions {begin} to {end - 1} stay active")

    def save(self, name: str) -> None:
        """/save FILE: write the chat as JSON"""
        if not name:
            raise ValueError("/save needs a file: /save chat.json")
        Path(name).write_text(json.dumps({"messages": self.messages}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        say(f"{len(self.messages)} messages in {name}")

    def load(self, name: str) -> None:
        """/load FILE: go on with a chat that was saved; it is read with the next question"""
        if not name:
            raise ValueError("/load needs a file that /save wrote: /load chat.json")
        messages = read_messages(Path(name))
        self._begin_anew(messages)
        say(f"{len(messages)} messages of {name}; they are read with the next question")

    def clear(self, _: str) -> None:
        """/clear: begin a new chat with the same system prompt"""
        self._begin_anew([message for message in self.messages[:1] if message["role"] == "system"])

    def _begin_anew(self, messages: list[Message]) -> None:
        """Other messages, none of them pinned: what was pinned lay elsewhere."""
        for begin, end in self._pinned:
            self._llm.unpin(begin, end)
        self._pinned = []
        self.messages = messages


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": Chat.help, "stats": Chat.stats, "system": Chat.system, "pin": Chat.pin, "save": Chat.save, "load": Chat.load, "clear": Chat.clear,
}  # fmt: skip


def read_messages(path: Path) -> list[Message]:
    """The messages of a file that /save wrote; ValueError if it holds none."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
        if all(set(message) == {"role", "content"} and all(isinstance(text, str) for text in message.values()) for message in messages):
            return messages
    except (KeyError, TypeError, AttributeError, ValueError):
        pass  # said below
    raise ValueError(f'{path} is no chat: /save writes one, {{"messages": [{{"role": "user", "content": "..."}}, ...]}}')
