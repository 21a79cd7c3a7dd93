"""An OpenAI-compatible server for tests, over real sockets: it does what a function of the request tells it to."""

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DROP = "the connection is cut before a byte of the answer"
DROP_HALFWAY = "the connection is cut in the middle of the answer"
STALL = "nothing is said until the test is over"
DRIP = "a byte of the answer now and then"


@dataclass
class Reply:
    """A status, a body (JSON unless it is bytes) and headers."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Running:
    """A server, and what it was asked."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    tries: dict[str, int] = field(default_factory=dict)
    """Requests by their last message."""
    most_at_once: int = 0


def said(text: str, finish: str | None = "stop", **choice: Any) -> Reply:
    """A good answer, with token counts."""
    message = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 11, "completion_tokens": len(text.split())}
    return Reply({"choices": [{"message": message, "finish_reason": finish, **choice}], "usage": usage})


@contextmanager
def chat_server(behave: Callable[[dict[str, Any], int], Reply | str]) -> Iterator[Running]:
    """Serve until the block ends. `behave` gets a request and the number of earlier ones with its last message."""
    over, lock = threading.Event(), threading.Lock()
    running = Running("")
    at_once = [0]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                at_once[0] += 1
                running.most_at_once = max(running.most_at_once, at_once[0])
                running.requests.append(request)
                running.headers.append(dict(self.headers))
                running.paths.append(self.path)
                content = request["messages"][-1]["content"]
                before = running.tries.get(content, 0)
                running.tries[content] = before + 1
            try:
                reply = behave(request, before)
            finally:
                with lock:
                    at_once[0] -= 1
            self._send(reply)

        def _send(self, reply: Reply | str) -> None:
            if reply == STALL:
                over.wait(20)
            if reply in (DROP, STALL):
                # Reset, not closed in peace.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            whole = said("cut") if isinstance(reply, str) else reply
            body = whole.body if isinstance(whole.body, bytes) else json.dumps(whole.body).encode()
            self.send_response(whole.status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in whole.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if reply == DRIP:
                for place in range(len(body)):
                    self.wfile.write(body[place : place + 1])
                    self.wfile.flush()
                    if over.wait(0.05):
                        return
            self.wfile.write(body[: len(body) // 2] if reply == DROP_HALFWAY else body)

        def finish(self) -> None:
            try:
                super().finish()
            except OSError:
                pass

        def log_message(self, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *args: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    running.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield running
    finally:
        over.set()
        server.shutdown()
        server.server_close()
        thread.join()
