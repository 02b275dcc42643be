"""Every bad input, and what is printed: the table behind docs/faults.md, where the expected messages are.

Each case spoils a folder of sound data and runs a command in it. To write the page anew after a message has
changed, run ``python -m tests.commands.test_faults --write`` and read what differs.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support import checkpoint_faults
from tests.support.faults import (
    SMALL_DISK,
    Case,
    Scene,
    all_cases,
    blocks,
    can_mount,
    page_of,
    printed,
)
from tests.support.servers import NGINX, OPENSSL, S3, make_certificate, nginx_server, s3_server
from tests.support.shards import npy

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = """\
# Faults

This page answers: what does disttrain print for a bad input?

Each section shows a bad input, a command that reads it, and the complete error output. The folder `data` holds two
training shards of 16 samples and one validation shard of 8; `run.yaml` trains on them for one epoch. The folder `run`,
if present, belongs to a run that was interrupted after its checkpoint. The exit code is 2 unless noted otherwise, there
is no traceback, and with several ranks the message is printed once. `python -m tests.commands.test_faults --write`
generates this page, and a test compares it with the real output.
"""
INDEX = "shards index 'data/train-{000..001}.tar'"
MANIFEST = "shards ls data/train.json"
VERIFY = "shards verify data/train.json"
FIT = "fit --config run.yaml"
FIT_MANIFEST = f"{FIT} --data.train data/train.json"
URL = "http://127.0.0.1:8000"
RESUME = f"{FIT} --resume run --trainer.max_steps 8"
STREAM = f"{FIT} --data.train '{URL}/train-{{000..001}}.tar'"

Prepare = Callable[[Scene], object]


def cut(size: int) -> Prepare:
    """The second shard ends early."""
    return lambda scene: os.truncate(scene.path("train-001.tar"), size)


def content(data: bytes) -> Prepare:
    """The second shard holds something else."""
    return lambda scene: scene.path("train-001.tar").write_bytes(data)


def members(*names: str) -> Prepare:
    """The second shard holds these files."""

    def write(scene: Scene) -> None:
        with tarfile.open(scene.path("train-001.tar"), "w") as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))

    return write


def compress(scene: Scene) -> None:
    path = scene.path("train-001.tar")
    path.write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def manifest(scene: Scene) -> Path:
    scene.run("shards", "index", "data/train-{000..001}.tar", "--manifest", "data/train.json", "--md5")
    return scene.path("train.json")


def edited_manifest(**entry: object) -> Prepare:
    """What the manifest says of the second shard is wrong."""

    def edit(scene: Scene) -> None:
        path = manifest(scene)
        told = json.loads(path.read_text())
        told["shardlist"][1].update(entry)
        path.write_text(json.dumps(told))

    return edit


def spoiled_sidecar(change: Callable[[Path], object]) -> Prepare:
    def spoil(scene: Scene) -> None:
        manifest(scene)
        change(scene.path("train-001.idx"))

    return spoil


def flip(scene: Scene) -> None:
    """A byte of the second shard changes on the disk, unseen by its time."""
    manifest(scene)
    path = scene.path("train-001.tar")
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[512 + 130] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def bad_value(extension: str, good: bytes, bad: bytes) -> Prepare:
    """One sample's field does not decode."""
    return lambda scene: scene.write_all({extension: good}, {extension: bad})


def declared(extension: str, more: str = "") -> str:
    """The command that reads a third field."""
    what = f"{{ext: {extension}, {more}}}" if more else extension
    return f"{FIT} --data.fields '{{image: image.npy, label: cls, extra: {what}}}'"


def objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    return stream.getvalue()


def jpeg() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "jpeg")
    return stream.getvalue()


def serve(*faults: str, name: str = "train-001.tar") -> Prepare:
    """A web server that answers requests for the second shard with these faults."""
    return lambda scene: scene.serve().fail(name, *faults)


def serve_manifest(**entry: object) -> Prepare:
    def prepare(scene: Scene) -> None:
        edited_manifest(**entry)(scene)
        scene.serve()

    return prepare


def indexed(fault: str) -> Prepare:
    """A server that fails once the shards' tables are known, and whoever asks knows their sizes."""

    def prepare(scene: Scene) -> None:
        server = scene.serve()
        scene.run("shards", "ls", f"{URL}/train-{{000..001}}.tar")
        server.on_request = lambda name, range_: server.fail(name, fault if range_ != "bytes=0-0" else "")

    return prepare


def served_tls(scene: Scene) -> None:
    certificate = make_certificate(scene.folder / "server.pem")
    server = nginx_server(scene.folder / "data", scene.folder / "nginx", certificate=certificate)
    scene.show(scene.stack.enter_context(server), "https://127.0.0.1:8443")


def s3(**environment: str) -> Prepare:
    def prepare(scene: Scene) -> None:
        server = scene.stack.enter_context(s3_server())
        server.upload(scene.folder / "data", "shards")
        scene.environment |= {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_SHARED_CREDENTIALS_FILE": "none",
            "AWS_CONFIG_FILE": "none",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_DEFAULT_REGION": "us-east-1",
            **environment,
        }
        server.check_credentials("AWS_ACCESS_KEY_ID" in environment)

    return prepare


def small_disk(scene: Scene) -> None:
    """The cache lies on a file system of 32 KiB."""
    scene.serve()
    (scene.folder / "disk").mkdir()
    scene.environment[SMALL_DISK] = str(scene.folder / "disk")


def trained(scene: Scene) -> None:
    scene.run("fit", "--config", "run.yaml")


TLS = NGINX is not None and OPENSSL is not None
GROUPS = {
    "Tars": [
        Case("A shard is missing", f"{FIT} --data.train 'data/train-{{000..003}}.tar'"),
        Case("A shard was cut off in a header", INDEX, cut(24 * 512 + 100)),
        Case("A shard was cut off in a file", INDEX, cut(25 * 512 + 10)),
        Case("A shard lacks the end block", INDEX, cut(16 * 4 * 512)),
        Case("A file is empty", INDEX, content(b"")),
        Case("A shard holds no samples", INDEX, members("README")),
        Case("A file is not a tar", INDEX, content(b"not a tar at all " * 100)),
        Case("A tar is compressed", INDEX, compress),
        Case("A key occurs twice, with other samples in between", INDEX, members("a.cls", "b.cls", "a.npy")),
        Case("A sample has a field twice", INDEX, members("a.cls", "a.cls")),
        Case("A byte of a shard has changed", VERIFY, flip, code=1),
    ],
    "Sidecars and manifests": [
        Case(
            "A sidecar is older than its shard (a run reads the headers instead)",
            VERIFY,
            spoiled_sidecar(lambda path: os.utime(path, (10**9, 10**9))),
            code=1,
        ),
        Case("A sidecar is damaged", VERIFY, spoiled_sidecar(lambda path: path.write_text("v1.2 16\ncls")), code=1),
        Case(
            "A sidecar belongs to another shard",
            VERIFY,
            spoiled_sidecar(lambda path: path.write_text(path.read_text().replace(" 512 ", " 513 ", 1))),
            code=1,
        ),
        Case("A manifest is missing", MANIFEST),
        Case(
            "A manifest is not valid",
            MANIFEST,
            lambda scene: scene.path("train.json").write_text("[]"),
        ),
        Case(
            "A manifest lists a shard that is missing",
            MANIFEST,
            edited_manifest(url="train-007.tar"),
        ),
        Case("A manifest has a wrong size", MANIFEST, edited_manifest(filesize=512)),
        Case("A manifest has a wrong number of samples", FIT_MANIFEST, edited_manifest(nsamples=17)),
        Case("A manifest has a wrong MD5", VERIFY, edited_manifest(md5sum="0" * 32), code=1),
    ],
    "Samples and fields": [
        Case(
            "A sample lacks a field",
            FIT,
            lambda scene: scene.write_all(bad={"cls": b"none"}),
        ),
        Case("A field does not exist", f"{FIT} --data.fields '{{image: imag.npy, label: cls}}'"),
        Case("A class is not a number", FIT, lambda scene: scene.write_all(bad={"cls": b"seven"})),
        Case("An array is damaged", FIT, lambda scene: scene.write_all(bad={"image.npy": b"\x93NUMPY"})),
        Case(
            "An array ends early",
            FIT,
            lambda scene: scene.write_all(bad={"image.npy": npy(np.zeros((1, 8, 8), dtype=np.uint8))[:-4]}),
        ),
        Case("An array holds Python objects", FIT, lambda scene: scene.write_all(bad={"image.npy": objects()})),
        Case("A JSON field is not valid JSON", declared("json"), bad_value("json", b"{}", b"{'a': 1}")),
        Case("A text is not UTF-8", declared("txt"), bad_value("txt", b"fine", b"caf\xe9")),
        Case("An image is damaged", declared("jpg"), bad_value("jpg", jpeg(), jpeg()[:300])),
        Case(
            "A raw tensor has the wrong size",
            declared("bin", "decoder: tensor, dtype: float32, shape: [3]"),
            bad_value("bin", bytes(12), bytes(8)),
        ),
        Case("A field has to be unpickled", f"{FIT} --data.fields '{{image: image.pkl, label: cls}}'"),
        Case("A decoder is unknown", declared("json", "decoder: jsn")),
    ],
    "Patterns and sizes": [
        Case("A glob matches nothing", "shards ls 'data/trian-*.tar'"),
        Case("A brace is not closed", "shards ls 'data/train-{000..001.tar'"),
        Case("A glob in a URL", f"shards ls '{URL}/train-*.tar'"),
        Case("A pattern is empty", f"{FIT} --data.train ''"),
        Case("The micro batch does not divide the global batch", f"{FIT} --data.micro_batch_size 3"),
        Case("There are fewer samples than a global batch", f"{FIT} --data.global_batch_size 64"),
        Case(
            "A run resumes with other shards and another seed",
            f"{RESUME} --seed_everything 2 --data.train data/train-000.tar",
            trained,
        ),
    ],
    "Servers": [
        Case("A URL does not exist", f"shards ls '{URL}/train-{{000..002}}.tar'", serve()),
        Case("A server denies access", f"shards ls '{URL}/train-{{000..001}}.tar'", serve(*["status:403"] * 9)),
        Case("A server keeps failing", f"shards ls '{URL}/train-{{000..001}}.tar'", serve(*["status:500"] * 9)),
        Case("A server does not support ranges", f"shards ls '{URL}/train-{{000..001}}.tar'", serve("no range")),
        Case("Nothing listens on the port", "shards ls http://127.0.0.1:9/train-000.tar"),
        Case("A host does not exist", "shards ls http://host.invalid/train-000.tar"),
        Case(
            "A signed URL has expired", f"shards ls '{URL}/train-001.tar?X-Amz-Signature=secret'", serve("status:403")
        ),
        Case("A certificate is not trusted", "shards ls https://127.0.0.1:8443/train-000.tar", served_tls, needs=TLS),
        Case("A URL has an unknown scheme", "shards ls ftq://host/train-000.tar"),
        Case("S3 has no credentials", "shards ls s3://shards/train-000.tar", s3(), needs=S3),
        Case(
            "S3 refuses the credentials",
            "shards ls s3://shards/train-000.tar",
            s3(AWS_ACCESS_KEY_ID="mistyped", AWS_SECRET_ACCESS_KEY="mistyped"),
            needs=S3,
        ),
    ],
    "Fetching": [
        Case("Connections are cut", STREAM, indexed("cut")),
        Case("Bodies are short", STREAM, indexed("short")),
        Case(
            "A shard was replaced since its manifest was written",
            f"{FIT} --data.train {URL}/train.json",
            serve_manifest(filesize=1024),
        ),
        Case(
            "A shard's MD5 differs from its manifest",
            f"{FIT} --data.train {URL}/train.json",
            serve_manifest(md5sum="0" * 32),
        ),
        Case("The cache is smaller than a shard", f"{STREAM} --data.cache.max_gib 1e-6", serve()),
        Case("The cache cannot be written", f"{STREAM} --data.cache.directory /dev/null/shards", serve()),
        Case("The cache's disk is full", f"{STREAM} --data.cache.directory disk", small_disk, needs=can_mount()),
    ],
    **checkpoint_faults.GROUPS,
}
CASES = all_cases(GROUPS)


PARAMETERS = [
    pytest.param(case, id=case.what, marks=[pytest.mark.slow] if case.slow else []) for case in all_cases(GROUPS)
]


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_fault_is_one_clear_message(case: Case) -> None:
    if not case.needs:
        pytest.skip("a requirement is not installed or not permitted here")
    code, text = printed(case)
    assert code == case.code, text
    assert "Traceback" not in text
    if code == 2:
        assert text.startswith("disttrain: error: ")
        assert text.count("disttrain: error") == 1
        assert text.count("\n  hint: ") == 1, "no hint"
        assert len(text.splitlines()) == 2
    assert blocks(PAGE.read_text())[case.what] == case.block(text), "regenerate the page"


def test_the_page_holds_every_case_and_no_other() -> None:
    assert page_of(HEAD, GROUPS, blocks(PAGE.read_text())) == PAGE.read_text()


def main(only: str = "") -> None:
    """Run all cases that can be run here, or those of some groups, and write the page."""
    texts = blocks(PAGE.read_text()) if PAGE.exists() else {}
    for case in CASES if not only else [case for group in only.split(",") for case in GROUPS[group]]:
        if case.needs:
            texts[case.what] = case.block(printed(case)[1])
    known = {group: [case for case in cases if case.what in texts] for group, cases in GROUPS.items()}
    PAGE.write_text(page_of(HEAD, known, texts))


if __name__ == "__main__" and "--write" in sys.argv:
    main(*sys.argv[2:])
