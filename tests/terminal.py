"""A program on a terminal of its own: what it shows, and keys typed to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator

SECONDS = 240  # a machine that compiles beside the tests is slow


class Terminal:
    """A process that runs on a pseudo terminal."""

    def __init__(self, command: list[str], cwd: str | os.PathLike[str] | None = None) -> None:
        self.shown = ""
        self._n_expected = 0
        self._status: int | None = None
        self._pid, self._screen = pty.fork()  # the child has the terminal for its own: Control-C reaches it
        if self._pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a test run in the background ignores it, and children inherit that
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # bars fill a line; one of 0 columns holds none
            os.chdir(cwd or os.getcwd())
            os.execvpe(command[0], command, {**os.environ, "TERM": "dumb"})

    def type(self, keys: str) -> None:
        os.write(self._screen, keys.encode())

    def control(self, letter: str) -> None:
        """Control and a letter: "c" interrupts, "d" is the end of the input."""
        self.type(chr(ord(letter) - ord("a") + 1))

    def expect(self, text: str, seconds: float = SECONDS) -> str:
        """Wait until the program shows a text; returns what it has shown since the last one that was waited for, up to this one."""
        until = time.monotonic() + seconds
        while (at := self.shown.find(text, self._n_expected)) < 0:
            if time.monotonic() > until or not self._read(0.1):
                raise AssertionError(f"{text!r} was not shown, but: {self.shown[self._n_expected:]!r}; before: {self.shown[:self._n_expected]!r}")
        begin, self._n_expected = self._n_expected, at + len(text)
        return self.shown[begin : self._n_expected]

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit status, when the program has ended by itself."""
        until = time.monotonic() + seconds
        while self._read(0.1):
            assert time.monotonic() < until, f"it goes on: {self.shown!r}"
        self._status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        return self._status

    def _read(self, seconds: float) -> bool:
        """Add what is shown within so many seconds; False if the program has closed the terminal."""
        if not select.select([self._screen], [], [], seconds)[0]:
            return True
        try:
            piece = os.read(self._screen, 65536)
        except OSError:  # how Linux says that the other side is closed
            return False
        self.shown += piece.decode(errors="replace").replace("\r\n", "\n")
        return bool(piece)

    def close(self) -> None:
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._screen)


@contextlib.contextmanager
def terminal(*command: str, cwd: str | os.PathLike[str] | None = None) -> Iterator[Terminal]:
    program = Terminal(list(command), cwd)
    try:
        yield program
    finally:
        program.close()
