"""Object stores: the same samples as from a folder, and errors that name where the credentials come from.

Google Cloud Storage is a small server that speaks its JSON, asked by gcsfs itself; S3 is moto's server, asked by s3fs.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.data.cache import shard_cache as cache_module
from disttrain.data.cache.shard_cache import CacheConfig, ShardCache
from disttrain.data.index.shard_index import ShardIndex, describe_shard
from disttrain.data.remote import requests
from disttrain.data.remote.ranges import RemoteError, RemoteFile
from disttrain.errors import DataError
from tests.support.servers import (
    NGINX,
    OPENSSL,
    S3,
    RangeServer,
    S3Server,
    gcs_server,
    make_certificate,
    nginx_server,
    s3_server,
)
from tests.support.shards import write_numbered
from tests.support.streams import QUICK, assert_same, names

pytestmark = pytest.mark.usefixtures("without_waits")
needs_gcs = pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="gcsfs is not installed")
needs_openssl = pytest.mark.skipif(NGINX is None or OPENSSL is None, reason="nginx or openssl is not installed")
needs_s3 = pytest.mark.skipif(not S3, reason="moto[server] and s3fs are not installed")


@pytest.fixture
def gcs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    """Google Cloud Storage, anonymously; the bucket ``shards`` holds the data."""
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "FSSPEC_GCS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    fsspec = pytest.importorskip("fsspec.config")
    monkeypatch.setitem(fsspec.conf, "gs", {"token": "anon"})  # it reads the variable when it is imported
    (tmp_path / "buckets").mkdir()
    shutil.copytree(folder, tmp_path / "buckets" / "shards")
    shutil.copytree(folder, tmp_path / "buckets" / "shards" / "more")
    with gcs_server(tmp_path / "buckets") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


@needs_gcs
def test_gcs(gcs: RangeServer, folder: Path, tmp_path: Path) -> None:
    assert_same(folder, "gs://shards", tmp_path / "c")
    asked = len([range_ for _, range_ in gcs.requests if range_ == "metadata"])
    gcs.requests.clear()
    ShardIndex.open(names("gs://shards"))
    assert {range_ for _, range_ in gcs.requests} == {"metadata"}, "an unchanged shard was read again"
    assert asked


@needs_gcs
@pytest.mark.parametrize("fault", ["status:503", "status:429", "cut", "short"])
def test_passing_faults_of_gcs(gcs: RangeServer, folder: Path, tmp_path: Path, fault: str) -> None:
    file = RemoteFile("gs://shards/train-000.tar", QUICK)
    gcs.fail("train-000.tar", *[fault] * 5)
    assert file.read(100, 2000) == (folder / "train-000.tar").read_bytes()[100:2100]
    assert not gcs.faults["train-000.tar"], "a fault was not met"


@needs_gcs
@pytest.mark.parametrize(
    ("url", "fault", "words"),
    [
        (
            "gs://shards/train-000.tar",
            "status:401",
            "HTTP 401: the server refused the request: Invalid Credentials, 401 (1 ",
        ),
        ("gs://shards/train-000.tar", "status:403", "HTTP 403: the server refused the request: Forbidden: b/"),
        ("gs://shards/train-000.tar", "status:503", "HTTP 503: the server refused the request: no, 503 (8 attempts in"),
        ("gs://shards/train-004.tar", "", "HTTP 404: not found (1 attempt;"),
        ("gs://nowhere/train-000.tar", "", "HTTP 404: not found (1 attempt;"),
        ("gs://shards/more", "", "HTTP 404: it is a folder (1 attempt;"),
    ],
)
def test_lasting_faults_of_gcs(gcs: RangeServer, url: str, fault: str, words: str) -> None:
    gcs.fail(url.rpartition("/")[2], *[fault] * 99)
    with pytest.raises(RemoteError) as error:
        RemoteFile(url, QUICK)
    assert error.value.what.startswith(f"{url}: {words}")
    assert error.value.what.endswith("credentials: anonymous (FSSPEC_GS_TOKEN))")
    assert error.value.hint


@needs_gcs
def test_an_object_that_is_replaced_while_it_is_fetched(
    gcs: RangeServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sizes are equal, and answers of object stores do not tell what they are of: it is asked at the end."""
    shard = describe_shard("gs://shards/train-000.tar")
    monkeypatch.setattr(cache_module, "_CHUNK_BYTES", 4000)
    read = RemoteFile.read

    def replaced(self: RemoteFile, offset: int, length: int) -> bytes:
        if offset == 8000:
            write_numbered(folder, [12], name="other")
            shutil.copy(folder / "other-000.tar", tmp_path / "buckets" / "shards" / "train-000.tar")
        return read(self, offset, length)

    monkeypatch.setattr(RemoteFile, "read", replaced)
    cache = ShardCache(CacheConfig(str(tmp_path / "c"), retry=QUICK))
    with pytest.raises(
        RemoteError, match=r"gs://shards/train-000.tar: the file was replaced: it is a different file of the same size"
    ):
        cache.open(shard)
    assert not list((tmp_path / "c").glob("*.tar"))


@pytest.fixture
def s3(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """S3; the bucket ``shards`` holds the data. There are no credentials yet."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "FSSPEC_S3_KEY", "FSSPEC_S3_ANON"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with s3_server() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        server.upload(folder, "shards")
        yield server


def give_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")


@needs_s3
def test_s3(s3: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_keys(monkeypatch)
    assert_same(folder, "s3://shards", tmp_path / "c")


@needs_s3
def test_what_is_not_there_on_s3(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    give_keys(monkeypatch)
    for url, why in (
        ("s3://shards/x.tar", "not found"),
        ("s3://nowhere/x.tar", "the server refused the request: The specified bucket does not exist"),
    ):
        with pytest.raises(RemoteError) as error:
            RemoteFile(url, QUICK)
        assert error.value.what == f"{url}: HTTP 404: {why} (1 attempt; credentials: environment AWS_ACCESS_KEY_ID)"


@needs_s3
@pytest.mark.parametrize("source", ["environment", "profile", "anonymous"])
def test_credentials_that_s3_refuses(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    told = "environment AWS_ACCESS_KEY_ID"
    if source == "environment":
        give_keys(monkeypatch)
    elif source == "profile":
        keys = "aws_access_key_id = testing\naws_secret_access_key = testing\n"
        (tmp_path / "credentials").write_text(f"[other]\n{keys}")
        monkeypatch.setenv("AWS_PROFILE", "other")
        told = f"{tmp_path}/credentials, profile other"
    else:
        monkeypatch.setenv("FSSPEC_S3_ANON", "true")
        fsspec = pytest.importorskip("fsspec.config")
        monkeypatch.setitem(fsspec.conf, "s3", {"anon": True})  # it reads the variable when it is imported
        told = "anonymous (FSSPEC_S3_ANON)"
    s3.check_credentials(True)
    with pytest.raises(DataError) as error:
        ShardIndex.open(names("s3://shards"), name="data.train")
    assert error.value.what == (
        "data.train: a shard cannot be read: s3://shards/train-000.tar: HTTP 403: the server refused the request:"
        f" Forbidden (1 attempt; credentials: {told})"
    )
    assert error.value.hint.startswith("use credentials with read access")


@needs_openssl
@needs_s3
def test_s3_over_tls(s3: S3Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    give_keys(monkeypatch)
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    certificate = make_certificate(tmp_path / "server.pem")
    pass_on = f"location / {{ proxy_pass {s3.url}; proxy_set_header Host $http_host; }}"
    with nginx_server(folder, tmp_path / "nginx", server=pass_on, certificate=certificate) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        with pytest.raises(
            RemoteError, match=r"certificate is not trusted: self-signed certificate \(1 attempt"
        ) as error:
            RemoteFile("s3://shards/train-000.tar", QUICK)
        assert "AWS_CA_BUNDLE" in error.value.hint
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate.with_suffix(".crt")))
        monkeypatch.setattr(requests, "_FILESYSTEMS", {})
        whole = (folder / "train-000.tar").read_bytes()
        assert RemoteFile("s3://shards/train-000.tar", QUICK).read(0, len(whole)) == whole


@needs_openssl
@needs_gcs
def test_gcs_over_tls_that_is_not_trusted(
    gcs: RangeServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path / "server.pem")
    with nginx_server(folder, tmp_path / "nginx", certificate=certificate) as url:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        with pytest.raises(
            RemoteError, match=r"certificate is not trusted: self-signed certificate \(1 attempt"
        ) as error:
            RemoteFile("gs://shards/train-000.tar", QUICK)
    assert "SSL_CERT_FILE" in error.value.hint
