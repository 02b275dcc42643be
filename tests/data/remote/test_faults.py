"""Faulty servers of every kind: what passes changes no sample, what lasts is one error that names all there is to know.

A real nginx answers, faulty by its own configuration or before an upstream that is; it also serves as a
caching proxy and over TLS. Waits between attempts are switched off, and nothing is measured in seconds.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from disttrain.data.cache.shard_cache import CacheConfig, ShardCache
from disttrain.data.index.build import md5_of
from disttrain.data.index.shard_index import Shard, ShardIndex, describe_shard, write_manifest
from disttrain.data.remote import requests
from disttrain.data.remote.ranges import RemoteError, RemoteFile
from disttrain.errors import DataError, ShardError
from tests.support.caches import kept_in
from tests.support.servers import (
    NGINX,
    OPENSSL,
    RangeServer,
    make_certificate,
    nginx_server,
    range_server,
)
from tests.support.shards import write_numbered
from tests.support.streams import QUICK, assert_same, names, stream

pytestmark = pytest.mark.usefixtures("without_waits")
needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
needs_openssl = pytest.mark.skipif(NGINX is None or OPENSSL is None, reason="nginx or openssl is not installed")


@dataclass(frozen=True)
class Setting:
    """Parts of an nginx configuration; ``{upstream}`` is the port of a server behind it, ``{folder}`` the data."""

    http: str = ""
    server: str = ""

    def texts(self, scratch: Path, folder: Path, upstream: RangeServer) -> dict[str, str]:
        """What :func:`nginx_server` takes."""
        known = {"{upstream}": str(upstream.server_port), "{folder}": str(folder), "{scratch}": str(scratch)}
        parts = {"http": self.http, "server": self.server}
        for name, value in known.items():
            parts = {part: text.replace(name, value) for part, text in parts.items()}
        return parts


def of_requests(*numbers: int) -> str:
    """Sets ``$fault`` for some requests of each connection."""
    return f"map $connection_requests $fault {{ {' '.join(f'{n} 1;' for n in numbers)} default 0; }}"


BEHIND = "location / { proxy_pass http://127.0.0.1:{upstream}; proxy_http_version 1.1; proxy_read_timeout 100ms; }"
PASSING = {
    "503 to the first request of each connection": Setting(of_requests(1), "if ($fault) { return 503; }"),
    "500 and a closed connection": Setting(of_requests(2), "if ($fault) { return 500; }"),
    "too many requests": Setting(
        of_requests(1, 3), "location / { add_header Retry-After 0 always; if ($fault) { return 429; } }"
    ),
    "closed without an answer": Setting(of_requests(2, 5), "if ($fault) { return 444; }"),
    "a proxy whose upstream is down for the first request of each connection": Setting(
        "map $connection_requests $port { 1 9; default {upstream}; }",
        "location / { proxy_pass http://127.0.0.1:$port; }",
    ),
    "one of two upstreams is down": Setting(
        "upstream both { server 127.0.0.1:9; server 127.0.0.1:{upstream}; }", "location / { proxy_pass http://both; }"
    ),
    "slow bodies": Setting(server="limit_rate 200k;"),
    "redirects": Setting(
        server="location / { return 302 /there$uri; } location /there/ { return 308 /here$uri; }"
        " location /here/there/ { alias {folder}/; }"
    ),
    "a server that likes to compress": Setting(server="gzip on; gzip_types *; gzip_min_length 1;"),
    "a caching proxy": Setting(
        "proxy_cache_path {scratch}/kept keys_zone=kept:1m;",
        "location / { proxy_cache kept; proxy_cache_valid 200 1h; proxy_cache_lock on;"
        " proxy_pass http://127.0.0.1:{upstream}; }",
    ),
}


@needs_nginx
@pytest.mark.parametrize("case", PASSING)
def test_what_passes_changes_no_sample(folder: Path, tmp_path: Path, case: str) -> None:
    scratch = tmp_path / "nginx"
    with range_server(folder) as upstream:
        with nginx_server(folder, scratch, **PASSING[case].texts(scratch, folder, upstream)) as url:
            assert_same(folder, url, tmp_path / "shards")
        if case == "a caching proxy":
            assert max(upstream.bytes_served.values()) < 2 * max(p.stat().st_size for p in folder.iterdir())


@needs_nginx
@pytest.mark.parametrize("fault", ["cut", "short", "wrong range", "status:500", "stall"])
def test_an_upstream_that_fails_every_other_time(folder: Path, tmp_path: Path, fault: str) -> None:
    """Half of a body and a closed connection; a whole answer of half the bytes; other bytes; 500; silence (504)."""
    with range_server(folder) as upstream:
        upstream.fail("*", *["", fault] * 20)
        texts = Setting(server=BEHIND).texts(tmp_path, folder, upstream)
        with nginx_server(folder, tmp_path / "nginx", **texts) as url:
            assert_same(folder, url, tmp_path / "shards")
        assert len(upstream.faults["*"]) < 20, "the faults were hardly met"


def shard_two(answer: str) -> Setting:
    """A server that answers so for one of the shards."""
    return Setting(server=f"location = /train-002.tar {{ {answer} }}")


LASTING = {
    "401": (shard_two("return 401;"), "HTTP 401: the server refused the request (1 attempt;", "use credentials"),
    "403": (shard_two("deny all;"), "HTTP 403: the server refused the request (1 attempt;", "use credentials"),
    "404": (shard_two("return 404;"), "does not exist: {url}: HTTP 404: not found (1 attempt;", "upload"),
    "410": (shard_two("return 410;"), "HTTP 410: not found (1 attempt;", "correct the URL"),
    "416": (shard_two("return 416;"), "HTTP 416: the server refused the request (1 attempt;", "check the server"),
    "429": (shard_two("return 429;"), "HTTP 429: the server refused the request (8 attempts in", "check the server"),
    "500": (shard_two("return 500;"), "HTTP 500: the server refused the request (8 attempts in", "check the server"),
    "502": (
        shard_two("proxy_pass http://127.0.0.1:9;"),
        "HTTP 502: the server refused the request (8 attempts in",
        "check",
    ),
    "closed": (shard_two("return 444;"), "{url}: the connection was lost before the response (8 attempts in", "check"),
    "no ranges": (shard_two("max_ranges 0;"), "HTTP 200: the server ignores range requests", "use a server"),
    "a page instead": (shard_two("return 200 welcome;"), "HTTP 200: the server ignores range requests", "serve"),
    "round and round": (shard_two("return 302 $uri;"), "{url}: too many redirects (1 attempt;", "check"),
    "to nowhere": (shard_two("return 301 /x;"), "{url}: HTTP 404: not found (1 attempt;", "correct the URL"),
}


@needs_nginx
@pytest.mark.parametrize("case", LASTING)
def test_what_lasts_is_one_error(folder: Path, tmp_path: Path, case: str) -> None:
    setting, words, hint = LASTING[case]
    with range_server(folder) as upstream:
        texts = setting.texts(tmp_path, folder, upstream)
        with (
            nginx_server(folder, tmp_path / "nginx", **texts) as url,
            pytest.raises(DataError) as error,
        ):
            ShardIndex.open(f"{names(url)}?X-Signature=secret", name="data.train")
    assert words.format(url=f"{url}/train-002.tar?...") in error.value.what
    assert error.value.what.startswith("data.train: a shard ")
    assert f"{url}/train-002.tar?...: " in error.value.what
    assert error.value.what.endswith("credentials: query of the URL)")
    assert hint in error.value.hint
    assert "secret" not in str(error.value)


@needs_nginx
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("cut", "{url}: the connection was lost during the response (8 attempts in"),
        ("short", "{url}: HTTP 206: received {half} bytes for the range 0-{last} (8 attempts in"),
        ("stall", "{url}: HTTP 504: the server refused the request (8 attempts in"),
    ],
)
def test_a_fetch_that_never_succeeds(folder: Path, tmp_path: Path, fault: str, words: str) -> None:
    with range_server(folder) as upstream:
        texts = Setting(server=BEHIND).texts(tmp_path, folder, upstream)
        with nginx_server(folder, tmp_path / "nginx", **texts) as url:
            shard = describe_shard(f"{url}/train-001.tar")
            cache = ShardCache(CacheConfig(str(tmp_path / "c"), retry=QUICK))
            upstream.fail("train-001.tar", "", *[fault] * 8)  # after its size
            with pytest.raises(RemoteError) as error:
                cache.open(shard)
            assert not upstream.faults["train-001.tar"], "fewer attempts than allowed"
    expected = words.format(url=shard.path, half=shard.size_bytes // 2, last=shard.size_bytes - 1)
    assert error.value.what.startswith(expected)
    assert error.value.what.endswith("credentials: anonymous)")
    assert [path.name for path in kept_in(tmp_path / "c").iterdir() if path.suffix != ".TAG"] == ["space.lock"]


@needs_nginx
def test_a_shard_that_is_replaced_after_it_was_indexed(folder: Path, tmp_path: Path) -> None:
    cache = ShardCache(CacheConfig(str(tmp_path / "c"), retry=QUICK))
    with nginx_server(folder, tmp_path / "nginx") as url:
        shard = describe_shard(f"{url}/train-000.tar")
        os.utime(folder / "train-000.tar", (10**9, 10**9))
        with pytest.raises(
            ShardError, match=r"train-000.tar has \d+ bytes, but the index says \d+ and the version differs"
        ):
            cache.open(shard)
        os.truncate(folder / "train-000.tar", 1024)
        with pytest.raises(ShardError, match=r"train-000.tar has 1024 bytes, but the index says") as error:
            cache.open(shard)
    assert "it was replaced" in error.value.hint


@needs_nginx
def test_an_old_copy_from_a_caching_proxy(folder: Path, tmp_path: Path) -> None:
    """The manifest is newer than what the proxy has; the sizes are equal, so only the MD5 tells."""
    scratch = tmp_path / "nginx"
    with range_server(folder) as upstream:
        texts = PASSING["a caching proxy"].texts(scratch, folder, upstream)
        with nginx_server(folder, scratch, **texts) as url:
            old = md5_of(str(folder / "train-000.tar"))
            RemoteFile(f"{url}/train-000.tar").read(0, 10)  # it keeps the whole of it
            write_numbered(folder, [12], name="other")
            content = (folder / "other-000.tar").read_bytes()
            (folder / "train-000.tar").write_bytes(content)
            told = Shard(f"{url}/train-000.tar", 12, len(content), md5=md5_of(str(folder / "other-000.tar")))
            write_manifest(tmp_path / "train.json", [told], name="train")
            with pytest.raises(ShardError, match=f"train-000.tar has MD5 {old}, but its manifest says") as error:
                stream(str(tmp_path / "train.json"), tmp_path / "c")
    assert "a proxy may also be serving an old copy" in error.value.hint


@needs_openssl
def test_https(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path / "server.pem")
    with nginx_server(folder, tmp_path / "nginx", certificate=certificate) as url:
        with pytest.raises(DataError) as error:
            ShardIndex.open(names(url))
        assert "the server's certificate is not trusted: self-signed certificate (1 attempt;" in error.value.what
        assert f"{url}/train-000.tar: " in error.value.what
        assert "SSL_CERT_FILE" in error.value.hint
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_suffix(".crt")))
        assert_same(folder, url, tmp_path / "shards")


@needs_openssl
def test_https_that_cannot_work(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = make_certificate(tmp_path / "server.pem", "DNS:example.org")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with (
        nginx_server(folder, tmp_path / "nginx", certificate=certificate) as url,
        pytest.raises(RemoteError, match=r"not trusted: IP address mismatch.*\(1 attempt;") as error,
    ):
        RemoteFile(f"{url}/train-000.tar", QUICK)
    assert "the host name that the certificate was issued for" in error.value.hint
    with (
        nginx_server(folder, tmp_path / "plain") as url,
        pytest.raises(RemoteError, match=r"does not speak TLS on this port \(1 attempt;") as error,
    ):
        RemoteFile(f"{url}/train-000.tar".replace("http:", "https:"), QUICK)
    assert "http://" in error.value.hint


def test_what_certificates_can_be_faulted_for() -> None:
    expired = ssl.SSLCertVerificationError(
        1, "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: certificate has expired (_ssl.c:1006)"
    )
    failed = requests._failed(expired, 1)
    assert str(failed) == "the server's certificate is not trusted: certificate has expired"
    assert "renew" in failed.hint
    assert not failed.again


def test_errors_show_no_secrets_that_libraries_print(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://me:secret@127.0.0.1:9/x.tar?sig=secret"

    def refused(*_: object, **__: object) -> None:
        raise requests.AttemptError(f"InvalidURL: {url!r} and <{url}>, ({url})", again=False)

    monkeypatch.setattr(requests, "_http_get", refused)
    with pytest.raises(RemoteError) as error:
        RemoteFile(url, QUICK)
    clean = "https://...@127.0.0.1:9/x.tar?..."
    assert error.value.what.startswith(
        f"{clean.replace('...@', '')}: InvalidURL: '{clean}' and <{clean}>, ({clean}) (1 attempt;"
    )


def test_the_server_may_ask_for_a_longer_wait(folder: Path) -> None:
    waits: list[float] = []
    asked = [7.0, 0.0, 0.0]

    with range_server(folder) as server:
        file = RemoteFile(f"{server.url}/train-000.tar", QUICK, sleep=waits.append)
        fetch = requests.fetch

        def refuse(*arguments: Any) -> requests.Answer:
            if asked:
                raise requests.AttemptError("no", again=True, status=429, after_seconds=asked.pop(0))
            return fetch(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("disttrain.data.remote.ranges.fetch", refuse)
            assert len(file.read(0, 512)) == 512
    assert waits == [7, 0, 0]
