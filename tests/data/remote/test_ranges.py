"""Remote files and shards: what is read is what was asked for, or an error that says what went wrong."""

from __future__ import annotations

import base64
import builtins
import gc
import importlib
import importlib.util
import json
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from disttrain.commands import shards as shards_command
from disttrain.data.decode.fields import Field
from disttrain.data.index.build import md5_of
from disttrain.data.index.remote_index import describe_remote
from disttrain.data.index.shard_index import ShardIndex, describe_shard, parse_manifest, write_manifest
from disttrain.data.index.sidecar import build_table, write_sidecar_file
from disttrain.data.reader.sample_reader import Reader
from disttrain.data.remote import requests
from disttrain.data.remote.ranges import RemoteError, RemoteFile, RetryConfig, credential_source, is_remote, shown
from disttrain.errors import ConfigError, DataError, ShardError
from disttrain.system.terminal import redacted
from tests.support.servers import NGINX, RangeServer, nginx_server, range_server
from tests.support.shards import write_numbered, write_shard

QUICK = RetryConfig(attempts=4, base_seconds=0.0, timeout_seconds=20)
CONTENT = bytes(range(256)) * 40
pytestmark = pytest.mark.usefixtures("cache_home")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RangeServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "x.bin").write_bytes(CONTENT)
    with range_server(folder) as running:
        yield running


def test_any_range(server: RangeServer) -> None:
    file = RemoteFile(f"{server.url}/x.bin")
    assert file.size == len(CONTENT)
    chance = random.Random(0)
    for _ in range(20):
        offset, length = chance.randrange(len(CONTENT)), chance.randrange(3000)
        assert file.read(offset, length) == CONTENT[offset : offset + length]
    assert file.read(len(CONTENT), 5) == b""
    assert len(server.requests) <= 21, "more than one request a range"


def test_an_empty_file(server: RangeServer) -> None:
    (server.folder / "empty").write_bytes(b"")
    file = RemoteFile(f"{server.url}/empty")
    assert (file.size, file.read(0, 10)) == (0, b"")


@pytest.mark.parametrize("fault", ["status:500", "status:503", "status:429", "cut", "short", "wrong range"])
def test_passing_faults_are_tried_again(server: RangeServer, fault: str) -> None:
    file = RemoteFile(f"{server.url}/x.bin", QUICK)
    server.fail("x.bin", fault, fault, fault)
    assert file.read(100, 1000) == CONTENT[100:1100]
    assert len(server.faults["x.bin"]) == 0, "a fault was not met"


@pytest.mark.parametrize("fault", ["status:500", "cut", "short"])
def test_a_fault_that_passed_keeps_nothing_alive(server: RangeServer, fault: str) -> None:
    """Callers hold locked files in their variables, and others wait for these."""

    class Held:
        pass

    def read() -> weakref.ref[Held]:
        held = Held()
        assert file.read(100, 1000) == CONTENT[100:1100]
        return weakref.ref(held)

    file = RemoteFile(f"{server.url}/x.bin", QUICK)
    server.fail("x.bin", fault)
    gc.disable()
    try:
        assert read()() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("fault", "words", "status"),
    [
        ("status:500", "HTTP 500: the server refused the request", 500),
        ("cut", "the connection was lost during the response", None),
        ("short", "received 500 bytes for the range 100-1099", 206),
        ("wrong range", "received bytes 101-1100 instead of bytes 100-1099", 206),
    ],
)
def test_lasting_faults_are_errors(server: RangeServer, fault: str, words: str, status: int | None) -> None:
    file = RemoteFile(f"{server.url}/x.bin", QUICK)
    server.fail("x.bin", *[fault] * 9)
    with pytest.raises(RemoteError) as error:
        file.read(100, 1000)
    text = str(error.value)
    assert words in text
    assert f"{server.url}/x.bin" in text
    assert "4 attempts in" in text
    assert "credentials: anonymous" in text
    assert error.value.hint
    assert error.value.status == status
    assert len(server.faults["x.bin"]) == 5


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("status:404", "HTTP 404"),
        ("status:403", "HTTP 403"),
        ("status:501", "HTTP 501"),
        ("redirect:", "HTTP 302: the server redirects without a location"),
        ("redirect:ftp://h/x.bin", "redirects to ftp://..., which is not http"),
        ("no range", "ignores range requests"),
        ("other version", "the file was replaced: it is a different file of the same size"),
    ],
)
def test_what_waiting_does_not_fix_is_tried_once(server: RangeServer, fault: str, words: str) -> None:
    file = RemoteFile(f"{server.url}/x.bin", QUICK)
    server.fail("x.bin", fault)
    with pytest.raises(RemoteError, match=words) as error:
        file.read(0, 10)
    assert "(1 attempt;" in str(error.value)
    assert file.read(0, 10) == CONTENT[:10]


def test_what_is_compressed_unasked_is_refused_at_once(server: RangeServer) -> None:
    server.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(RemoteError, match=r"the server compressed the response \(gzip\).*1 attempt;") as error:
        RemoteFile(f"{server.url}/x.bin", QUICK)
    assert "disable compression" in error.value.hint


@pytest.mark.parametrize("query", ["?sig=a%2Fb%2B%3d&x=%7e+%20", "?k=a:b@c,d;e!$'()*", "?p=%C3%BC&q="])
def test_urls_are_sent_to_the_letter(server: RangeServer, query: str) -> None:
    RemoteFile(f"{server.url}/x.bin{query}", QUICK)
    assert server.targets == [f"/x.bin{query}"]
    server.fail("a", f"redirect:/x.bin{query}", f"redirect:{server.url}/x.bin{query}")
    for _ in range(2):
        RemoteFile(f"{server.url}/a", QUICK)
    assert server.targets[1:] == ["/a", f"/x.bin{query}"] * 2


def test_user_and_password_follow_redirects_to_the_same_origin_alone(server: RangeServer, tmp_path: Path) -> None:
    url = server.url.replace("://", "://me:p%40ss@")
    wanted = f"Basic {base64.b64encode(b'me:p@ss').decode()}"
    server.fail("a", "redirect:x.bin", f"redirect:{server.url}/x.bin", f"redirect:{url.replace('me:', 'you:')}/x.bin")
    for _ in range(3):
        assert RemoteFile(f"{url}/a", QUICK).size == len(CONTENT)
    assert server.authorizations[:5] == [wanted] * 5
    assert server.authorizations[5] not in (None, wanted), "a redirect may name another user"
    with range_server(server.folder) as other:
        server.fail("a", f"redirect:{other.url}/x.bin")
        RemoteFile(f"{url}/a", QUICK)
        assert other.authorizations == [None], "another port is another origin"


def test_a_folder_that_others_may_write_to_does_not_end_what_is_kept(server: RangeServer, cache_home: Path) -> None:
    [path] = write_numbered(server.folder, [3])
    url = f"{server.url}/{Path(path).name}"
    (cache_home / "index").mkdir(parents=True)
    (cache_home / "index").chmod(0o775)
    assert [describe_remote(url).state for _ in range(2)] == ["written", "unchanged"]


def test_what_no_url_may_hold_is_escaped(server: RangeServer) -> None:
    for name in ("a b.bin", "ü.bin", "100%.bin", "a{1}|.bin"):
        (server.folder / quote(name)).write_bytes(CONTENT)
        assert RemoteFile(f"{server.url}/{name}", QUICK).size == len(CONTENT)


def test_redirects_without_end(server: RangeServer) -> None:
    server.fail("x.bin", *["redirect:x.bin"] * 30)
    with pytest.raises(RemoteError, match=r"too many redirects \(1 attempt;"):
        RemoteFile(f"{server.url}/x.bin", QUICK)


def test_a_silent_server_is_a_cut_connection(server: RangeServer) -> None:
    retry = RetryConfig(attempts=2, base_seconds=0.0, timeout_seconds=0.1)
    file = RemoteFile(f"{server.url}/x.bin", retry)
    server.fail("x.bin", "stall")
    assert file.read(0, 10) == CONTENT[:10]
    server.fail("x.bin", "stall", "stall")
    with pytest.raises(RemoteError, match=r"the server sent nothing for 0.1 s \(2 attempts"):
        file.read(0, 10)


def test_a_file_that_shrank_is_an_error(server: RangeServer) -> None:
    file = RemoteFile(f"{server.url}/x.bin", QUICK)
    (server.folder / "x.bin").write_bytes(CONTENT[:5000])
    with pytest.raises(RemoteError, match="replaced"):
        file.read(0, 10)


def test_waits_grow_are_jittered_and_keep_to_the_budget(server: RangeServer) -> None:
    waits: list[float] = []
    retry = RetryConfig(attempts=50, base_seconds=1, max_seconds=8, budget_seconds=1000)
    file = RemoteFile(f"{server.url}/x.bin", retry, sleep=waits.append)
    server.fail("x.bin", *["status:500"] * 8)
    state = random.getstate()
    assert file.read(0, 10) == CONTENT[:10]
    assert random.getstate() == state, "the global random state was used"
    assert [most / 2 <= wait <= most for wait, most in zip(waits, [1, 2, 4, 8, 8, 8, 8, 8], strict=True)] == [True] * 8
    assert len(set(waits)) == 8

    waits.clear()
    file = RemoteFile(
        f"{server.url}/x.bin", RetryConfig(base_seconds=60, max_seconds=60, budget_seconds=20), sleep=waits.append
    )
    server.fail("x.bin", "status:500")
    with pytest.raises(RemoteError, match="1 attempt"):
        file.read(0, 10)
    assert waits == [], "a wait that ends past the budget was begun"


@pytest.mark.parametrize(
    ("field", "value"),
    [("attempts", 0), ("base_seconds", -1), ("max_seconds", -1), ("budget_seconds", -1), ("timeout_seconds", 0)],
)
def test_settings_that_cannot_work(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"retry.{field} is {value}") as error:
        RetryConfig(**{field: value})
    assert error.value.hint


def test_no_server_is_an_error() -> None:
    with pytest.raises(RemoteError, match=r"the connection was refused \(4 attempts"):
        RemoteFile("http://127.0.0.1:9/x.tar", QUICK)


def test_urls_and_what_messages_show_of_them() -> None:
    assert is_remote("s3://b/x")
    assert is_remote("http://h/x")
    assert not is_remote("/data/x.tar")
    assert not is_remote("data:x.tar")
    assert shown("https://me:secret@h:8/a/x.tar?X-Amz-Signature=secret") == "https://h:8/a/x.tar?..."
    assert shown("a/b?.tar") == "a/b?.tar"
    assert shown("http://me:secret@[::1/x.tar?secret") == "http://..."


def test_where_credentials_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "FSSPEC_S3_KEY", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    assert credential_source("s3://b/x").startswith("none found")
    (tmp_path / "credentials").write_text("[default]\n")
    assert credential_source("s3://b/x") == str(tmp_path / "credentials")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "secret")
    assert credential_source("s3://b/x") == "environment AWS_ACCESS_KEY_ID"
    assert credential_source("http://me:secret@h/x") == "user name in the URL"
    assert credential_source("http://h/x") == "anonymous"


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = builtins.__import__

    def without_fsspec(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "fsspec":
            raise ImportError("no module fsspec")
        return usual(name, *arguments, **options)

    monkeypatch.setattr(requests, "_FILESYSTEMS", {})
    monkeypatch.setattr(builtins, "__import__", without_fsspec)
    with pytest.raises(ConfigError, match=r"pip install 'disttrain\[cloud\]'"):
        RemoteFile("gs://bucket/x.tar")


def test_an_unknown_scheme_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="use http, https, s3 or gs"):
        RemoteFile("nonsense://x/y.tar")


def test_no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setattr(requests, "_FILESYSTEMS", {})
    with pytest.raises(
        RemoteError, match=r"no credentials: Unable to locate.*1 attempt; credentials: none found"
    ) as error:
        RemoteFile("s3://bucket/x.tar", QUICK)
    assert "AWS_ACCESS_KEY_ID" in error.value.hint


def same_index(one: ShardIndex, other: ShardIndex) -> None:
    assert [shard.num_samples for shard in one.shards] == [shard.num_samples for shard in other.shards]
    for number in range(len(one.shards)):
        assert one.table(number).spans() == other.table(number).spans()


def test_an_index_by_headers_is_the_local_one(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_numbered(server.folder, [30, 7, 12])
    local = ShardIndex.open(str(server.folder / "train-{000..002}.tar"), write_sidecars=False)
    monkeypatch.setattr(RemoteFile, "window_bytes", 4096)
    pattern = f"{server.url}/train-{{000..002}}.tar"
    same_index(ShardIndex.open(pattern), local)

    server.requests.clear()
    same_index(ShardIndex.open(pattern), local)
    assert len(server.requests) == 3, "one request a shard that has not changed"


def test_members_are_skipped_over(server: RangeServer) -> None:
    big = [{"__key__": f"{n}", "bin": bytes(3 * 2**20)} for n in range(4)]
    write_shard(server.folder / "big.tar", big)
    shard = describe_shard(f"{server.url}/big.tar")
    assert shard.num_samples == 4
    assert server.bytes_served["big.tar"] < 6 * 2**20


def test_a_changed_shard_is_read_again(server: RangeServer) -> None:
    write_shard(server.folder / "a.tar", [{"__key__": "one", "txt": b"1"}])
    url = f"{server.url}/a.tar"
    assert ShardIndex.open(url).key(0) == "one"
    write_shard(server.folder / "a.tar", [{"__key__": "two", "txt": b"1"}])  # of the same size
    assert ShardIndex.open(url).key(0) == "two"


def test_a_sidecar_beside_the_shard_serves(server: RangeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = write_numbered(server.folder, [50])
    write_sidecar_file(path, build_table(path))
    index = ShardIndex.open(f"{server.url}/train-000.tar")
    same_index(index, ShardIndex.open(path))
    assert server.bytes_served["train-000.tar"] < 10 * 512 + 10_240, "its size, a few headers and what follows the last"


@pytest.mark.parametrize("fault", ["stale", "of a larger shard", "damaged", "status:403"])
def test_a_sidecar_that_does_not_fit_is_not_trusted(server: RangeServer, fault: str) -> None:
    [path] = write_numbered(server.folder, [50])
    sidecar = server.folder / "train-000.idx"
    if fault == "stale":
        write_shard(server.folder / "other.tar", [{"__key__": f"{n}", "txt": bytes(600)} for n in range(9)])
        write_sidecar_file(path, build_table(str(server.folder / "other.tar")))
    elif fault == "of a larger shard":
        write_sidecar_file(path, build_table(write_numbered(server.folder, [80], "larger")[0]))
    else:
        sidecar.write_text("v1.2 50\ntxt 1\n")
        server.fail("train-000.idx", fault) if fault != "damaged" else None
    index = ShardIndex.open(f"{server.url}/train-000.tar")
    assert index.table(0).spans() == build_table(path).spans()


def test_a_missing_shard_is_named(server: RangeServer) -> None:
    write_numbered(server.folder, [3])
    with pytest.raises(DataError, match=r"data.train: a shard does not exist: .*/train-001.tar: HTTP 404"):
        ShardIndex.open(f"{server.url}/train-{{000..001}}.tar", name="data.train")
    with pytest.raises(DataError, match=r"the manifest does not exist: .*/m.json"):
        ShardIndex.open(f"{server.url}/m.json")
    with pytest.raises(DataError, match="is a glob"):
        ShardIndex.open(f"{server.url}/train-*.tar")


def test_a_damaged_remote_shard_is_named(server: RangeServer) -> None:
    [path] = write_numbered(server.folder, [3])
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:3000])
    with pytest.raises(ShardError, match=r"shard http://.*/train-000.tar at byte 3072: the end block is missing"):
        ShardIndex.open(f"{server.url}/train-000.tar")


def test_manifests_here_and_there(server: RangeServer, tmp_path: Path) -> None:
    paths = write_numbered(server.folder, [5, 6])
    described = [replace(describe_shard(path), md5=md5_of(path)) for path in paths]
    write_manifest(server.folder / "train.json", described, name="train")
    local = ShardIndex.open(paths)
    there = ShardIndex.open(f"{server.url}/train.json")
    assert len(server.requests) == 2, "a manifest's shards are asked for nothing"
    same_index(there, local)

    write_manifest(tmp_path / "here.json", there.shards, name="train")
    assert [shard.path for shard in parse_manifest(tmp_path / "here.json")] == [s.path for s in there.shards]
    same_index(ShardIndex.open(str(tmp_path / "here.json")), local)

    content = json.loads((tmp_path / "here.json").read_text())
    for entry in content["shardlist"]:
        del entry["filesize"]
    (tmp_path / "here.json").write_text(json.dumps(content))
    assert [s.size_bytes for s in ShardIndex.open(str(tmp_path / "here.json")).shards] == [
        Path(path).stat().st_size for path in paths
    ]


def test_the_command_lists_remote_shards(server: RangeServer, capsys: pytest.CaptureFixture[str]) -> None:
    write_numbered(server.folder, [5, 6])
    url = f"{server.url}/train-{{000..001}}.tar"
    assert shards_command.main(["ls", url]) == 0
    assert "2 shards" in capsys.readouterr().out
    assert shards_command.main(["verify", url]) == 0
    assert "2 shards, 11 samples: no faults" in capsys.readouterr().out


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx(tmp_path: Path) -> None:
    folder = tmp_path / "served"
    folder.mkdir()
    write_numbered(folder, [30, 7])
    local = ShardIndex.open(str(folder / "train-{000..001}.tar"), write_sidecars=False)
    with nginx_server(folder, tmp_path / "nginx") as url:
        same_index(ShardIndex.open(f"{url}/train-{{000..001}}.tar"), local)
        with pytest.raises(DataError, match=r"train-002.tar: HTTP 404"):
            ShardIndex.open(f"{url}/train-{{000..002}}.tar")


S3 = all(importlib.util.find_spec(name) for name in ("moto", "flask", "s3fs"))


@pytest.mark.skipif(not S3, reason="moto[server] and s3fs are not installed")
def test_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    paths = write_numbered(folder, [30, 7])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = importlib.import_module("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setattr(requests, "_FILESYSTEMS", {})
        client = importlib.import_module("boto3").client("s3")
        client.create_bucket(Bucket="shards")
        for path in paths:
            client.upload_file(path, "shards", f"data/{Path(path).name}")
        client.close()
        same_index(ShardIndex.open("s3://shards/data/train-{000..001}.tar"), ShardIndex.open(paths))
        with pytest.raises(DataError, match=r"s3://shards/data/x.tar: HTTP 404.*environment AWS_ACCESS_KEY_ID"):
            ShardIndex.open("s3://shards/data/x.tar")
        reader = Reader(ShardIndex.open("s3://shards/data/train-{000..001}.tar"), {"x": Field("x.npy")})
        assert reader.read(np.arange(37))["x"][:, 0].tolist() == list(range(37))
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: https://me:se)c'r@et@h:8/x-{000..003}.tar?X-Sig=a%2Fb&e=1", "a: https://...@h:8/x-{000..003}.tar?..."),
        ("['s3://b/x.tar?versionId=1', 'https://t@h/y']", "['s3://b/x.tar?...', 'https://...@h/y']"),
        ("[http://h/x?sig=1,http://h/y?sig=2], z", "[http://h/x?...,http://h/y?...], z"),
        ("'http://a/x','http://u:p@h/y'", "'http://a/x','http://...@h/y'"),
        ("https://$USER:$TOKEN@h/x?sig=${SIG}&e=$E", "https://$USER:$TOKEN@h/x?sig=${SIG}&e=$E"),
        ("https://u:${TOKEN}@h/x?sig=${SIG}&e=1", "https://u:${TOKEN}@h/x?..."),
        ("no http://h/x.tar?sig=1: refused. See http://h/?a.", "no http://h/x.tar?...: refused. See http://h/?...."),
        ("me@example.org, what? /data/x.tar http://h/a@b/c", "me@example.org, what? /data/x.tar http://h/a@b/c"),
    ],
)
def test_texts_without_the_secrets_of_urls(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert redacted(expected) == expected


def test_a_redacted_url_is_refused_with_a_hint() -> None:
    for url in ("https://...@h/x.tar", "https://h/x.tar?..."):
        with pytest.raises(ConfigError, match="its password or signature was removed") as error:
            RemoteFile(url)
        assert "$PASSWORD" in error.value.hint
