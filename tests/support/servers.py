"""Servers on the loopback interface: a small one over HTTP that can be told to fail, and nginx."""

from __future__ import annotations

import hashlib
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread

Fault = str
"""``status:500`` (any), ``cut`` (half the body), ``short`` (a whole answer of half the bytes), ``wrong range``,
``no range`` (200 and the whole file), ``stall`` (no answer until the server is closed), ``other version``."""


class RangeServer(ThreadingHTTPServer):
    """Serves a folder by ranges, counts what it serves, and fails as it is told."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: dict[str, deque[Fault]] = {}
        self.bytes_served: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.released = Event()
        self.on_request: Callable[[str, str], None] = lambda name, range_: None
        self._lock = Lock()

    @property
    def url(self) -> str:
        """The address of the folder."""
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, name: str, *faults: Fault) -> None:
        """Answer the next requests for a file with these faults; ``*`` is any file."""
        self.faults[name] = deque(faults)

    def next_fault(self, name: str) -> Fault:
        """The fault of a request, if it has one."""
        with self._lock:
            for key in (name, "*"):
                if self.faults.get(key):
                    return self.faults[key].popleft()
        return ""

    def count(self, name: str, range_: str, size: int) -> None:
        """Note a request and what it was given."""
        with self._lock:
            self.requests.append((name, range_))
            self.bytes_served[name] += size

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets
    server: RangeServer

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:  # the name that http.server calls
        """Answer one request."""
        name, range_ = self.path.lstrip("/").partition("?")[0], self.headers.get("Range", "")
        self.server.on_request(name, range_)
        fault = self.server.next_fault(name)
        path = self.server.folder / name
        if fault == "stall":
            self.server.released.wait()
            self.close_connection = True
        elif fault.startswith("status:"):
            self._answer(int(fault.removeprefix("status:")), b"")
        elif not path.is_file():
            self._answer(404, b"")
        else:
            self._range(name, path.read_bytes(), range_, fault)

    def _range(self, name: str, content: bytes, range_: str, fault: Fault) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", range_)
        version = hashlib.sha1(content, usedforsecurity=False).hexdigest() + ("x" if fault == "other version" else "")
        if found is None or fault == "no range":
            self.server.count(name, range_, len(content))
            self._answer(200, content, ETag=f'"{version}"')
            return
        first, last = int(found[1]), min(int(found[2]), len(content) - 1)
        if first >= len(content):
            self._answer(416, b"", **{"Content-Range": f"bytes */{len(content)}"})
            return
        body = content[first : last + 1]
        self.server.count(name, range_, len(body))
        told = f"bytes {first}-{last}/{len(content)}"
        if fault == "wrong range":
            told = f"bytes {first + 1}-{last + 1}/{len(content) + 1}"
        length = len(body)
        if fault in ("short", "cut"):
            body = body[: length // 2]
            length = len(body) if fault == "short" else length
        self._answer(206, body, length, **{"Content-Range": told, "ETag": f'"{version}"'})
        if fault == "cut":
            self.close_connection = True

    def _answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """The small server over a folder."""
    server = RangeServer(folder)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@contextmanager
def nginx_server(folder: Path, scratch: Path) -> Iterator[str]:
    """A real nginx over a folder; gives its address."""
    assert NGINX is not None
    port = _free_port()
    scratch.mkdir(parents=True, exist_ok=True)
    config = scratch / "nginx.conf"
    temporary = "\n".join(
        f"{kind}_temp_path {scratch}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"daemon off; master_process off; pid {scratch}/pid; error_log {scratch}/error.log;\n"
        f"events {{}}\nhttp {{ access_log {scratch}/access.log; {temporary}\n"
        f"server {{ listen 127.0.0.1:{port}; root {folder}; }} }}\n"
    )
    command = [NGINX, "-c", str(config), "-p", str(scratch), "-e", str(scratch / "error.log")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await_answer(f"http://127.0.0.1:{port}/", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def _await_answer(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except urllib.error.HTTPError as error:
            error.close()
            return
        except OSError:
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < deadline, f"no answer from {url}"
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
