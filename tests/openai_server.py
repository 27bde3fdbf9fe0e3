"""A real HTTP server that speaks the OpenAI API and misbehaves on demand.

Each request takes the next act of ``OpenAiServer.play``, or else ``otherwise``.  An act is a
function of the open request, ``act(exchange)``, that writes to the socket whatever it likes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler
from typing import Any


class Exchange(BaseHTTPRequestHandler):
    """One request and the socket to answer on."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes
    server: OpenAiServer

    def do_POST(self) -> None:
        self.text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.body: dict[str, Any] = json.loads(self.text)
        act = self.server.next_act(self)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            act(self)

    def do_GET(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.server.models(self)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def respond(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A complete response."""
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin(self, headers: Mapping[str, str]) -> None:
        """Status 200 and headers, without the body."""
        self.send_response(200)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def hang_up(self) -> None:
        """Ends the connection."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


Act = Callable[[Exchange], None]


class OpenAiServer(socketserver.ThreadingTCPServer):
    """Listens on a loopback port while its ``with`` block runs."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, otherwise: Act | None = None, port: int = 0):
        super().__init__(("127.0.0.1", port), Exchange)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.otherwise = otherwise or answer('{"weaknesses": []}')
        self.models = reply_json({"data": [{"id": "served", "max_model_len": 65536}]})  # to a GET
        self.stopped = threading.Event()
        self.requests: list[dict[str, Any]] = []  # bodies, in order of arrival
        self.headers: list[Message] = []  # their headers; names in any case
        self.at_once = 0  # most requests in hand at the same time
        self._acts: collections.deque[Act] = collections.deque()
        self._lock = threading.Lock()
        self._open = 0
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)

    def play(self, *acts: Act) -> None:
        """What to do with the next requests."""
        self._acts.extend(acts)

    def next_act(self, exchange: Exchange) -> Act:
        with self._lock:
            self.requests.append(exchange.body)
            self.headers.append(exchange.headers)
            act = self._acts.popleft() if self._acts else self.otherwise

        def counted(exchange: Exchange) -> None:
            with self._lock:
                self._open += 1
                self.at_once = max(self.at_once, self._open)
            try:
                act(exchange)
            finally:
                with self._lock:
                    self._open -= 1

        return counted

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that gave up

    def __enter__(self) -> OpenAiServer:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()
        self._thread.join()


def completion(content: Any, **fields: Any) -> dict[str, Any]:
    """The JSON of a completion.

    ``fields`` go to the place that they have in the API: ``finish_reason`` and ``usage`` are not
    the message's, all others are.
    """
    choice = {"index": 0, "finish_reason": fields.pop("finish_reason", "stop")}
    usage = fields.pop("usage", {"prompt_tokens": 100, "completion_tokens": 50})
    model = fields.pop("model", "served")
    message = {"role": "assistant", "content": content, **fields}
    return {
        "id": "x",
        "object": "chat.completion",
        "model": model,
        "choices": [{**choice, "message": message}],
        "usage": usage,
    }


def answer(content: Any, **fields: Any) -> Act:
    """A good completion."""
    return reply_json(completion(content, **fields))


def reply_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Act:
    return reply(json.dumps(value).encode(), status, headers)


def reply(body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Act:
    return lambda exchange: exchange.respond(status, body, headers)


def error(status: int, message: str, headers: Mapping[str, str] | None = None, **more: Any) -> Act:
    """An error in the API's form."""
    return reply_json({"error": {"message": message, "type": "x", **more}}, status, headers)


def after(seconds: float, act: Act) -> Act:
    """``act``, late."""

    def late(exchange: Exchange) -> None:
        exchange.server.stopped.wait(seconds)
        act(exchange)

    return late


def silent(exchange: Exchange) -> None:
    """Takes the request and never says anything."""
    exchange.server.stopped.wait()


def silent_after_headers(exchange: Exchange) -> None:
    exchange.begin({"Content-Length": "1000"})
    exchange.server.stopped.wait()


def trickle(exchange: Exchange) -> None:
    """A byte now and then: each read is quick, the whole never ends."""
    exchange.begin({"Content-Length": "1000000"})
    while not exchange.server.stopped.wait(0.02):
        exchange.wfile.write(b" ")


def trickle_headers(exchange: Exchange) -> None:
    exchange.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not exchange.server.stopped.wait(0.02):
        exchange.wfile.write(b"X-Wait: 1\r\n")


def reset(exchange: Exchange) -> None:
    """Hangs up without a word."""
    exchange.hang_up()


def cut(body: bytes) -> Act:
    """Promises all of ``body`` and hangs up half way."""

    def act(exchange: Exchange) -> None:
        exchange.begin({"Content-Length": str(len(body))})
        exchange.wfile.write(body[: len(body) // 2])
        exchange.hang_up()

    return act


def cut_chunks(body: bytes) -> Act:
    """A chunked body without its end."""

    def act(exchange: Exchange) -> None:
        exchange.begin({"Transfer-Encoding": "chunked"})
        exchange.wfile.write(b"%x\r\n%s\r\n" % (len(body), body))
        exchange.hang_up()

    return act


def bad_chunks(exchange: Exchange) -> None:
    exchange.begin({"Transfer-Encoding": "chunked"})
    exchange.wfile.write(b"zz\r\nnot a chunk\r\n")
    exchange.hang_up()


def endless(status: int = 200) -> Act:
    """A chunked body of blanks, as fast as it goes, without an end."""

    def act(exchange: Exchange) -> None:
        exchange.send_response(status)
        exchange.send_header("Transfer-Encoding", "chunked")
        exchange.end_headers()
        block = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        while not exchange.server.stopped.is_set():
            exchange.wfile.write(block)

    return act


def not_http(exchange: Exchange) -> None:
    exchange.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    exchange.hang_up()


@contextlib.contextmanager
def refused_url() -> Iterator[str]:
    """An address on which nobody listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}/v1"
