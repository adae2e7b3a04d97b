"""Counts what a client asks of ggml's RPC server: every backend call that reaches the device is a message."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter


class CountingProxy:
    """Listens on `endpoint` and passes everything on to the server; a message is | command (1 byte) | size (8 bytes) | data |."""

    def __init__(self, server: str) -> None:
        host, port = server.split(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.messages: Counter[int] = Counter()  # by command
        self.bytes = 0  # both ways
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._server)
            for end in (client, server):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._ask, args=(client, server), daemon=True).start()
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        source = client.makefile("rb")
        while header := source.read(9):
            command, size = struct.unpack("<BQ", header)
            self.messages[command] += 1
            self.bytes += len(header) + size
            server.sendall(header)
            while size:
                piece = source.read(min(size, 1 << 20))
                server.sendall(piece)
                size -= len(piece)
        server.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        while piece := server.recv(1 << 20):
            self.bytes += len(piece)
            client.sendall(piece)
