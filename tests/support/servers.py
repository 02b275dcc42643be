"""Servers on the loopback interface: a small one over HTTP that can be told to fail, nginx with any configuration,
a small one that speaks Google Cloud Storage's JSON, and moto's S3."""

from __future__ import annotations

import base64
import hashlib
import importlib
import importlib.util
import json
import re
import shutil
import socket
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from disttrain.distributed.rendezvous import reserve_port

Fault = str
"""``status:500`` (any), ``cut`` (half the body), ``short`` (a whole answer of half the bytes), ``wrong range``,
``no range`` (200 and the whole file), ``stall`` (no answer until the server is closed), ``other version``, or
nothing: a right answer."""


class RangeServer(ThreadingHTTPServer):
    """Serves a folder by ranges, counts what it serves, and fails as it is told."""

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or _Handler)
        self.folder = folder
        self.faults: dict[str, deque[Fault]] = {}
        self.bytes_served: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.targets: list[str] = []
        """What stood in the request lines."""
        self.authorizations: list[str | None] = []
        self.headers: dict[str, str] = {}
        """Of answers, in place of the usual ones."""
        self.pieces: dict[str, bytearray] = {}
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
        self.server.targets.append(self.path)
        self.server.authorizations.append(self.headers.get("Authorization"))
        self.server.on_request(name, range_)
        fault = self.server.next_fault(name)
        path = self.server.folder / name
        if fault == "stall":
            self.server.released.wait()
            self.close_connection = True
        elif fault.startswith("status:"):
            self._answer(int(fault.removeprefix("status:")), b"")
        elif fault.startswith("redirect:"):
            self._answer(302, b"", **{"Location": place} if (place := fault.removeprefix("redirect:")) else {})
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
        self._answer(206, body, length, **{"Content-Range": told, "ETag": f'"{version}"', **self.server.headers})
        if fault == "cut":
            self.close_connection = True

    def _answer(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Accept-Ranges", "bytes")
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


class _GcsHandler(_Handler):
    """Google Cloud Storage's JSON: an object's metadata, its bytes by ranges, listings, uploads and deletions.

    A bucket is a folder; objects have their MD5 and a generation that changes with the contents.
    """

    def do_GET(self) -> None:
        """Answer one request; the name that faults go by is that of the object."""
        parts = urlsplit(self.path)
        place = re.fullmatch(r"/(?:download/)?storage/v1/b/([^/]+)/o(?:/(.+))?", parts.path)
        assert place, f"unknown request {self.path}"
        bucket, name = self.server.folder / unquote(place[1]), unquote(place[2] or "")
        query = parse_qs(parts.query)
        media = query.get("alt") == ["media"]
        if not media:
            self.server.requests.append((name, "metadata"))
        fault = self.server.next_fault(name or query.get("prefix", [""])[0])
        path = bucket / name
        if fault.startswith("status:"):
            self._error(int(fault.removeprefix("status:")), "Invalid Credentials" if fault.endswith("401") else "no")
        elif not bucket.is_dir():
            self._error(404, "The specified bucket does not exist.")
        elif not name:
            prefix = query.get("prefix", [""])[0]
            found = [_gcs_object(bucket, p) for p in sorted(bucket.rglob("*")) if p.is_file()]
            self._json({"items": [item for item in found if item["name"].startswith(prefix)]})
        elif not path.is_file():
            self._error(404, f"No such object: {place[1]}/{name}")
        elif media:
            self._range(name, path.read_bytes(), self.headers.get("Range", ""), fault)
        else:
            self._json(_gcs_object(bucket, path))

    def do_POST(self) -> None:
        """Make an object of a multipart request, or begin one that comes in pieces; ``put NAME`` may fail."""
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if parts.path.startswith("/pieces/"):
            self._piece(body)
            return
        place = re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", parts.path)
        assert place, f"unknown request {self.path}"
        if "uploadType=resumable" in parts.query:
            name = json.loads(body)["name"]
            where = f"{self.server.url}/pieces/{place[1]}/{quote(name, safe='')}"
            self._answer(200, b"", Location=where)
            return
        about, _, rest = body.removeprefix(b"--==0==").partition(b"--==0==\nContent-Type: ")
        name = json.loads(about.partition(b"\n\n")[2])["name"]
        self._put(unquote(place[1]), name, rest.partition(b"\n\n")[2].removesuffix(b"\n--==0==--"))

    def _piece(self, body: bytes) -> None:
        _, _, bucket, name = self.path.split("/")
        first, last, total = map(int, re.findall(r"\d+", self.headers["Content-Range"]))
        held = self.server.pieces.setdefault(name, bytearray())
        assert (len(held), len(body)) == (first, last - first + 1), "a piece in the wrong place"
        held += body
        if len(held) < total:
            self._answer(308, b"", Range=f"bytes=0-{last}")
        else:
            self._put(bucket, unquote(name), bytes(self.server.pieces.pop(name)))

    def do_DELETE(self) -> None:
        """Delete an object, or one that has begun to come in pieces."""
        if self.path.startswith("/pieces/"):
            self.server.pieces.pop(self.path.rpartition("/")[2], None)
            self._answer(204, b"")
            return
        place = re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", urlsplit(self.path).path)
        assert place, f"unknown request {self.path}"
        path = self.server.folder / unquote(place[1]) / unquote(place[2])
        if path.is_file():
            path.unlink()
            self._answer(204, b"")
        else:
            self._error(404, "No such object")

    def _put(self, bucket: str, name: str, content: bytes) -> None:
        fault = self.server.next_fault(f"put {name}")
        if fault:
            self._error(int(fault.removeprefix("status:")), "no")
            return
        if not (self.server.folder / bucket).is_dir():
            self._error(404, "The specified bucket does not exist.")
            return
        path = self.server.folder / bucket / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self._json(_gcs_object(self.server.folder / bucket, path))

    def _error(self, status: int, message: str) -> None:
        self._json({"error": {"code": status, "message": message}}, status)

    def _json(self, content: Any, status: int = 200) -> None:
        self._answer(status, json.dumps(content).encode(), **{"Content-Type": "application/json"})


def _gcs_object(bucket: Path, path: Path) -> dict[str, str]:
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False)
    return {
        "kind": "storage#object",
        "name": str(path.relative_to(bucket)),
        "size": str(path.stat().st_size),
        "md5Hash": base64.b64encode(digest.digest()).decode(),
        "generation": str(int(digest.hexdigest()[:12], 16)),
        "etag": f"etag-{digest.hexdigest()[:8]}",
    }


@contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """The small server over a folder."""
    with _served(RangeServer(folder)) as server:
        yield server


@contextmanager
def gcs_server(folder: Path) -> Iterator[RangeServer]:
    """Google Cloud Storage as its emulators speak it, over a folder of buckets; for ``STORAGE_EMULATOR_HOST``."""
    with _served(RangeServer(folder, _GcsHandler)) as server:
        yield server


@contextmanager
def _served(server: RangeServer) -> Iterator[RangeServer]:
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


S3 = all(importlib.util.find_spec(name) for name in ("moto", "flask", "s3fs"))
"""Whether there is a server that speaks S3, and a client."""


@dataclass
class S3Server:
    """moto's S3 server, and what it was asked for."""

    url: str
    requests: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path and range of each request."""
    faults: list[tuple[str, str, int, int]] = field(default_factory=list)
    """Method, part of a path, status, and how many more such requests are answered with it."""
    _known: Any = None

    def fail(self, method: str, part: str, status: int = 503, times: int = 10**9) -> None:
        """Answer the next requests of a method and path with an error."""
        self.faults.append((method, part, status, times))

    def fault_of(self, method: str, path: str) -> int:
        """The status that a request is to fail with, or 0."""
        for number, (for_method, part, status, times) in enumerate(self.faults):
            if times and method == for_method and part in path:
                self.faults[number] = (for_method, part, status, times - 1)
                return status
        return 0

    def make(self, bucket: str) -> None:
        """A new, empty bucket."""
        self._client().create_bucket(Bucket=bucket)
        self.requests.clear()

    def names(self, bucket: str) -> dict[str, bytes]:
        """All objects of a bucket."""
        client = self._client()
        found = [item["Key"] for item in client.list_objects_v2(Bucket=bucket).get("Contents", [])]
        return {name: client.get_object(Bucket=bucket, Key=name)["Body"].read() for name in found}

    def delete(self, bucket: str, name: str) -> None:
        """Delete an object."""
        self._client().delete_object(Bucket=bucket, Key=name)

    def write(self, bucket: str, name: str, content: bytes) -> None:
        """Make an object, or replace it."""
        self._client().put_object(Bucket=bucket, Key=name, Body=content)

    def upload(self, folder: Path, bucket: str) -> None:
        """Put all files of a folder into a new bucket."""
        client = self._client()
        client.create_bucket(Bucket=bucket)
        for path in sorted(folder.iterdir()):
            client.upload_file(str(path), bucket, path.name)
        self.requests.clear()

    def check_credentials(self, check: bool) -> None:
        """Whether to refuse unknown credentials from now on."""
        requests = importlib.import_module("requests")
        requests.post(f"{self.url}/moto-api/reset-auth", data=b"0" if check else b"inf").close()

    def close(self) -> None:
        """Let go of the connections."""
        if self._known is not None:
            self._known.close()

    def _client(self) -> Any:
        if self._known is None:  # it takes long to make
            keys = dict.fromkeys(("aws_access_key_id", "aws_secret_access_key"), "testing")
            self._known = importlib.import_module("boto3").client(
                "s3", endpoint_url=self.url, region_name="us-east-1", verify=False, **keys
            )
        return self._known


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """moto's S3 server; for ``AWS_ENDPOINT_URL``."""
    moto = importlib.import_module("moto.moto_server.werkzeug_app")
    application = moto.DomainDispatcherApplication(moto.create_backend_app)

    def counted(environ: dict[str, Any], start_response: Any) -> Any:
        server.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE", "")))
        if status := server.fault_of(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} Fault", [("Content-Length", "0")])
            return [b""]
        return application(environ, start_response)

    silent = type("Silent", (moto.MotoRequestHandler,), {"log": lambda *_: None})
    serving = importlib.import_module("werkzeug.serving")
    running = serving.make_server("127.0.0.1", 0, counted, threaded=True, request_handler=silent)
    server = S3Server(f"http://127.0.0.1:{running.server_port}")
    thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.check_credentials(False)
        importlib.import_module("requests").post(f"{server.url}/moto-api/reset").close()  # all servers hold the same
        server.close()
        running.shutdown()
        running.server_close()
        thread.join()


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
OPENSSL = shutil.which("openssl")
_SETPRIV = shutil.which("setpriv")
_WITH_ME = [_SETPRIV, "--pdeathsig", "TERM", "--"] if _SETPRIV else []
"""Ends what follows when these tests are killed."""


@contextmanager
def nginx_server(
    folder: Path, scratch: Path, *, http: str = "", server: str = "", certificate: Path | None = None
) -> Iterator[str]:
    """A real nginx over a folder; gives its address.

    Args:
        folder: what it serves where ``server`` says nothing else.
        scratch: for its files.
        http: directives for its ``http`` block.
        server: directives for its ``server`` block.
        certificate: a PEM file of key and certificate; without one it speaks plain HTTP.
    """
    assert NGINX is not None
    with reserve_port() as port:
        scratch.mkdir(parents=True, exist_ok=True)
        config = scratch / "nginx.conf"
        temporary = "\n".join(
            f"{kind}_temp_path {scratch}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        tls = f"ssl_certificate {certificate}; ssl_certificate_key {certificate};" if certificate else ""
        config.write_text(
            f"daemon off; master_process off; pid {scratch}/pid; error_log {scratch}/error.log;\n"
            f"events {{}}\nhttp {{ access_log {scratch}/access.log; {temporary}\n{http}\n"
            f"server {{ listen 127.0.0.1:{port}{' ssl' if tls else ''}; root {folder}; {tls}\n{server}\n}} }}\n"
        )
        command = [*_WITH_ME, NGINX, "-c", str(config), "-p", str(scratch), "-e", str(scratch / "error.log")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _await_listening(port, process, scratch / "error.log")
            yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


def make_certificate(place: Path, name: str = "IP:127.0.0.1", days: int = 2) -> Path:
    """A PEM file of a key and a certificate that it signed itself, made out to a name such as ``DNS:example.org``."""
    assert OPENSSL is not None
    certificate = place.with_suffix(".crt")
    kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", str(days)]
    told = ["-subj", "/CN=disttrain tests", "-addext", f"subjectAltName={name}"]
    command = [OPENSSL, "req", "-x509", *kind, *told, "-keyout", str(place), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    with open(place, "a") as file:
        file.write(certificate.read_text())
    return place


def _await_listening(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            assert process.poll() is None, f"the server ended with {process.returncode}: {log.read_text()}"
            assert time.monotonic() < deadline, f"nobody listens on port {port}"
            time.sleep(0.02)
