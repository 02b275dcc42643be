"""Copies of checkpoints on S3, on Google Cloud Storage and in a folder: committed last, fenced, pruned, fetched."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from disttrain.checkpoint.format import verification
from disttrain.checkpoint.format.checksum import Sum
from disttrain.checkpoint.format.fence import Attempt, FencedError
from disttrain.checkpoint.format.marker import MARKER, About, Metric, committed, write_marker
from disttrain.checkpoint.format.retention import Keep
from disttrain.checkpoint.format.writer import write
from disttrain.checkpoint.remote import copies as mirror_module
from disttrain.checkpoint.remote.copies import Mirror, MirrorConfig, begin
from disttrain.checkpoint.remote.uploads import Mirroring, Upload, fetch
from disttrain.commands.checkpoints import main
from disttrain.data.remote import objects, requests
from disttrain.data.remote.objects import ObjectFolder
from disttrain.data.remote.ranges import RemoteError, RetryConfig
from disttrain.errors import CheckpointError, ConfigError
from disttrain.run.folder import find_start
from disttrain.system.files import open_directory
from tests.checkpoint.make_format import META, tensors
from tests.support.servers import S3, S3Server, gcs_server, s3_server

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
GCS = importlib.util.find_spec("gcsfs") is not None
ALL = [
    pytest.param("s3", marks=pytest.mark.skipif(not S3, reason="moto[server] and s3fs are not installed")),
    pytest.param("gs", marks=pytest.mark.skipif(not GCS, reason="gcsfs is not installed")),
    "file",
]
needs_s3 = pytest.mark.skipif(not S3, reason="moto[server] and s3fs are not installed")


@pytest.fixture(autouse=True)
def without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait between attempts, and no memory of what other tests have found sound."""
    monkeypatch.setattr(RetryConfig, "wait_seconds", lambda self, failed, chance: 0.0)
    monkeypatch.setattr(verification, "_sound", set())


@pytest.fixture(scope="module")
def moto() -> Iterator[S3Server]:
    """One server for all tests, and one client, which takes long to make; each test has a bucket of its own."""
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(requests, "_FILESYSTEMS", {})
        yield server


@pytest.fixture
def s3(moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """S3 with a bucket named after the test's folder."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    moto.faults.clear()
    moto.make(bucket_of(tmp_path))
    return moto


def bucket_of(tmp_path: Path) -> str:
    return tmp_path.name.replace("_", "-").lower()[-40:]


@pytest.fixture
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder for checkpoints in each kind of storage."""
    if request.param == "s3":
        request.getfixturevalue("s3")
        yield f"s3://{bucket_of(tmp_path)}/runs/one"
    elif request.param == "gs":
        monkeypatch.setattr(requests, "_FILESYSTEMS", {})
        monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
        monkeypatch.setitem(importlib.import_module("fsspec.config").conf, "gs", {"token": "anon"})
        (tmp_path / "buckets" / "bucket").mkdir(parents=True)
        with gcs_server(tmp_path / "buckets") as server:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
            yield "gs://bucket/runs/one"
    else:
        yield f"file://{tmp_path}/storage/runs/one"


def mirror_at(url: str) -> Mirror:
    return Mirror(MirrorConfig(url, retry=RetryConfig(attempts=8, timeout_seconds=20)))


def save(directory: Path, step: int, attempt: Attempt, loss: float | None = None) -> Path:
    """A checkpoint on disk."""
    metric = None if loss is None else Metric("loss", loss, "min")
    about = About(step, epoch=0, run=attempt.run, attempt=attempt.number, metric=metric)
    name = f"step-{step:08d}"
    return write(directory, name, tensors=tensors(), meta=META, global_step=step, about=about, attempt=attempt)


def upload(path: Path, mirror: Mirror, attempt: Attempt, keep: Keep | None = None) -> None:
    Upload(path, About(int(path.name[5:13])), mirror, attempt, keep or Keep(9)).run()


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("url", ALL, indirect=True)
def test_objects(url: str, tmp_path: Path) -> None:
    folder = ObjectFolder(url)
    assert folder.read("a") is None
    assert folder.sizes() == {}
    folder.remove(["a"])
    folder.write("a", b"1")
    folder.write("a", b"22")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    folder.upload("deep/b", tmp_path / "file")
    ObjectFolder(f"{url}2").write("c", b"3")  # a neighbour whose name begins the same
    assert folder.read("a") == b"22"
    assert folder.sizes() == {"a": 2, "deep/b": 1000}
    folder.remove(["a", "deep/b", "gone"])
    assert folder.sizes() == {}


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs's own way
@pytest.mark.parametrize("url", ALL[:2], indirect=True)
def test_large_objects_come_back_from_their_parts(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than what Google's client sends in one request."""
    monkeypatch.setattr(objects, "_PART_BYTES", 2**20)
    content = bytes(range(256)) * 25_000 + b"end"
    (tmp_path / "file").write_bytes(content)
    folder = ObjectFolder(url)
    folder.upload("large", tmp_path / "file")
    assert b"".join(folder.parts("large", len(content))) == content


@pytest.mark.parametrize("url", ALL, indirect=True)
def test_a_copy_comes_back_bit_by_bit(url: str, tmp_path: Path) -> None:
    directory, mirror = tmp_path / "run" / "checkpoints", mirror_at(url)
    attempt, cleared = begin(directory, mirror)
    assert cleared == []
    path = save(directory, 8, attempt)
    upload(path, mirror, attempt)
    found, passed_over = mirror.committed()
    assert [one.name for one in found] == [f"step-00000008.{attempt.label}"]
    assert passed_over == []

    there, (other, _) = (
        tmp_path / "other" / "checkpoints",
        begin(tmp_path / "other" / "checkpoints", mirror, adopt=True),
    )
    assert (other.run, other.number) == (attempt.run, 2)
    assert fetch(mirror, found[0], there, other) == ""
    assert contents(there / "step-00000008") == contents(path)
    assert [entry.global_step for entry in committed(there)[0]] == [8]


@needs_s3
def test_errors_that_pass_are_tried_again(s3: S3Server, tmp_path: Path) -> None:
    url = f"s3://{bucket_of(tmp_path)}/run"
    directory, mirror = tmp_path / "run", mirror_at(url)
    attempt, _ = begin(directory, mirror)
    path = save(directory, 8, attempt)
    for name, status in (("__0_0.distcp", 500), ("COMMITTED", 503), ("meta.pt", 429)):
        s3.fail("PUT", name, status, 5)
    upload(path, mirror, attempt)
    s3.fail("GET", "__0_0.distcp", 500, 5)
    there, _ = begin(tmp_path / "other", mirror, adopt=True)
    assert fetch(mirror, mirror.committed()[0][0], tmp_path / "other", there) == ""
    assert [times for _, _, _, times in s3.faults] == [0, 0, 0, 0], "a fault was not met"
    assert contents(tmp_path / "other" / path.name) == contents(path)


@needs_s3
def test_a_server_that_fails_for_good_leaves_the_older_copy(s3: S3Server, tmp_path: Path) -> None:
    bucket = bucket_of(tmp_path)
    directory, mirror = tmp_path / "run", mirror_at(f"s3://{bucket}/run")
    attempt, _ = begin(directory, mirror)
    upload(save(directory, 4, attempt), mirror, attempt, Keep(1))
    s3.fail("PUT", "step-00000008", 503)
    path = save(directory, 8, attempt)
    with pytest.raises(CheckpointError, match=r"cannot be written: s3://.*/run/step-0.*HTTP 503.*\(8 attempts in") as e:
        upload(path, mirror, attempt, Keep(1))
    assert e.value.hint
    assert [one.entry.global_step for one in mirror.committed()[0]] == [4]
    s3.faults.clear()
    s3.fail("PUT", "COMMITTED", 403)  # all files are there, the marker is not
    with pytest.raises(CheckpointError, match="HTTP 403"):
        upload(path, mirror, attempt, Keep(1))
    found, passed_over = mirror.committed()
    assert [one.entry.global_step for one in found] == [4]
    assert passed_over == [f"checkpoint s3://{bucket}/run/step-00000008.{attempt.label} was never committed"]

    s3.faults.clear()
    upload(save(directory, 12, attempt), mirror, attempt, Keep(1))
    left = {name.split("/")[1].partition(".")[0] for name in s3.names(bucket)}
    assert left == {"ATTEMPT", "step-00000012"}, "what was never committed still takes room"


DAMAGES: dict[str, tuple[Callable[[S3Server, str, str], object], str]] = {
    "a file is missing": (lambda s3, bucket, name: s3.delete(bucket, f"{name}/meta.pt"), "is torn: meta.pt is missing"),
    "a file is cut": (
        lambda s3, bucket, name: s3.write(bucket, f"{name}/meta.pt", b"short"),
        "is torn: meta.pt has 5 bytes",
    ),
    "a bit has flipped": (
        lambda s3, bucket, name: flip(s3, bucket, f"{name}/__0_0.distcp"),
        "is damaged: __0_0.distcp (",
    ),
    "the marker is damaged": (
        lambda s3, bucket, name: flip(s3, bucket, f"{name}/{MARKER}"),
        f"has a damaged {MARKER}",
    ),
}


def flip(s3: S3Server, bucket: str, name: str) -> None:
    content = bytearray(s3.names(bucket)[name])
    content[len(content) // 2] ^= 1
    s3.write(bucket, name, bytes(content))


@needs_s3
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_passed_over(s3: S3Server, tmp_path: Path, damage: str) -> None:
    bucket = bucket_of(tmp_path)
    url = f"s3://{bucket}/run"
    attempt, _ = begin(tmp_path / "first" / "checkpoints", mirror_at(url))
    for step in (4, 8):
        upload(save(tmp_path / "first" / "checkpoints", step, attempt), mirror_at(url), attempt)
    spoil, words = DAMAGES[damage]
    spoil(s3, bucket, f"run/step-00000008.{attempt.label}")
    start = find_start(tmp_path / "second", "auto", mirror=mirror_at(url))
    assert start.checkpoint == tmp_path / "second" / "checkpoints" / "step-00000004"
    assert len(start.notes) == 3, start.notes
    assert start.notes[0].startswith(f"skipped: checkpoint {url}/step-00000008.{attempt.label} {words}")
    assert start.notes[1] == f"fetched {url}/step-00000004.{attempt.label}"
    assert start.notes[2] == f"resuming from {start.checkpoint}"
    names = {path.name for path in (tmp_path / "second" / "checkpoints").iterdir()}
    assert names == {"ATTEMPT", "step-00000004"}, "a damaged copy was left here"


@pytest.mark.parametrize("url", ALL, indirect=True)
def test_an_older_attempt_publishes_nothing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it was when the newer one began: before its files, before its marker, or past its last look."""
    directory, mirror = tmp_path / "a" / "checkpoints", mirror_at(url)
    old, _ = begin(directory, mirror)
    path = save(directory, 8, old)
    taken_over: list[str] = []
    commit = Mirror.commit

    def too_late(self: Mirror, name: str, marker: bytes) -> None:
        taken_over.extend(begin(tmp_path / "b" / "checkpoints", mirror_at(url), adopt=True)[1])
        commit(self, name, marker)

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "commit", too_late)
        with pytest.raises(FencedError, match="attempt 2"):
            upload(path, mirror, old)
    assert taken_over == [f"checkpoint {mirror.url}/step-00000008.{old.label} was never committed"]
    found, passed_over = mirror.committed()
    assert found == [], "a marker that came too late made a checkpoint"
    assert "is torn: " in passed_over[0]
    assert "is missing" in passed_over[0]

    with pytest.raises(FencedError, match=rf"attempt 1 of run {old.run}, but attempt 2 .* has taken over {url}"):
        upload(path, mirror, old)


@pytest.mark.parametrize("name", ["../planted", "/planted", "deep/file"])
def test_a_marker_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    """A forged marker lists a file elsewhere: nothing is written there."""
    mirror = mirror_at(f"file://{tmp_path}/storage")
    attempt, _ = begin(tmp_path / "run", mirror)
    copy = tmp_path / "storage" / f"step-00000008.{attempt.label}"
    copy.mkdir()
    with open_directory(copy) as opened:
        write_marker(opened, About(8, run=attempt.run), {name: Sum(1, "00000000")})
    assert mirror.committed()[0] == []
    assert "has a damaged COMMITTED" in mirror.committed()[1][0]


def test_a_copy_that_failed_is_made_again_after_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it is to be kept by then; otherwise it is forgotten."""
    url, directory = f"file://{tmp_path}/storage", tmp_path / "checkpoints"
    attempt, _ = begin(directory, mirror_at(url))
    mirroring = Mirroring(mirror_at(url), attempt)
    with monkeypatch.context() as patch:
        patch.setattr(requests, "put", no_put)
        for step in (4, 6):
            keep = Keep(1, best=["step-00000004"])
            mirroring.offer(save(directory, step, attempt), step, keep)
            outcome = mirroring.wait()
            assert outcome is not None
            assert isinstance(outcome.error, CheckpointError)
            assert not outcome.fatal
            assert mirroring.wait() is None, "it was tried again at once"
    mirroring.offer(save(directory, 8, attempt), 8, keep)
    while mirroring.wait() is not None:
        pass
    assert [one.entry.global_step for one in mirror_at(url).committed()[0]] == [4, 8]


def no_put(url: str, data: bytes, timeout: float) -> None:
    raise requests.AttemptError("no", again=False, status=503)


def test_older_copies_stay_where_the_new_one_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store has taken all requests, and yet an object is missing."""
    mirror = mirror_at(f"file://{tmp_path}/storage")
    attempt, _ = begin(tmp_path / "run", mirror)
    upload(save(tmp_path / "run", 4, attempt), mirror, attempt, Keep(1))
    put = Mirror.upload
    lossy = ["meta.pt"]
    monkeypatch.setattr(Mirror, "upload", lambda *given: None if given[2].name in lossy else put(*given))
    with pytest.raises(
        CheckpointError, match=r"meta\.pt is missing, but its marker says \d+, though it was just uploaded"
    ):
        upload(save(tmp_path / "run", 8, attempt), mirror, attempt, Keep(1))
    assert [one.entry.global_step for one in mirror.committed()[0]] == [4]


@pytest.mark.parametrize("place", ["claiming", "pruning"])
def test_an_older_attempt_deletes_nothing_of_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """It is held up after its look at what is there, or before; the newer one has begun to copy by then."""
    mirror = mirror_at(f"file://{tmp_path}/storage")
    old, _ = begin(tmp_path / "a", mirror)
    if place == "pruning":
        for step in (4, 6, 8):
            upload(save(tmp_path / "a", step, old), mirror, old)
    new: list[Attempt] = []
    copies = Mirror._copies

    def held_up(self: Mirror) -> dict[str, dict[str, int]]:
        if not new:
            new.append(begin(tmp_path / "b", mirror_at(mirror.url), adopt=True)[0])
            mirror.upload(f"step-00000008.{new[0].label}", save(tmp_path / "b", 8, new[0]) / "meta.pt")
        return copies(self)

    monkeypatch.setattr(mirror, "_copies", held_up.__get__(mirror))
    with pytest.raises(FencedError):
        mirror.claim(old) if place == "claiming" else mirror.prune(Keep(1), attempt=old)
    left = {path.parent.name.partition(".")[0] for path in (tmp_path / "storage").glob("*/*")}
    assert left == ({"step-00000008"} if place == "claiming" else {f"step-{step:08d}" for step in (4, 6, 8)})
    assert (tmp_path / "storage" / f"step-00000008.{new[0].label}" / "meta.pt").exists()


def test_another_run_is_refused(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/storage"
    attempt, _ = begin(tmp_path / "a" / "checkpoints", mirror_at(url))
    upload(save(tmp_path / "a" / "checkpoints", 8, attempt), mirror_at(url), attempt)
    begin(tmp_path / "b" / "checkpoints", None)
    for resume, run_dir in (("auto", "b"), ("never", "c")):
        with pytest.raises(CheckpointError, match=f"holds the checkpoints of run {attempt.run}, but this"):
            find_start(tmp_path / run_dir, resume, mirror=mirror_at(url))
    assert not (tmp_path / "c").exists()
    with pytest.raises(CheckpointError, match="this is a new run"):
        begin(tmp_path / "c" / "checkpoints", mirror_at(url))
    assert mirror_at(url).owner()["token"] == attempt.token, "the run that was refused has taken over"


def test_a_local_checkpoint_as_new_is_taken_and_the_best_is_fetched_with_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, run_dir = f"file://{tmp_path}/storage", tmp_path / "run"
    directory = run_dir / "checkpoints"
    attempt, _ = begin(directory, mirror_at(url))
    for step, loss in ((4, 0.2), (6, 0.3), (8, 0.4)):
        upload(save(directory, step, attempt, loss), mirror_at(url), attempt)
    start = find_start(run_dir, "auto", mirror=mirror_at(url))
    assert start.notes == [f"resuming from {directory}/step-00000008"]
    data = next((directory / "step-00000008").glob("*.distcp"))
    data.write_bytes(bytes(len(data.read_bytes())))
    monkeypatch.setattr(verification, "_sound", set())  # another process
    start = find_start(run_dir, "auto", mirror=mirror_at(url))
    assert start.checkpoint == directory / "step-00000008.2", "the copy of a damaged one was not fetched"

    start = find_start(tmp_path / "new", "auto", mirror=mirror_at(url))
    assert start.checkpoint == tmp_path / "new" / "checkpoints" / "step-00000008"
    assert [entry.global_step for entry in committed(tmp_path / "new" / "checkpoints")[0]] == [4, 8]


def test_of_checkpoints_that_wait_the_newest_and_the_kept_ones_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, directory = f"file://{tmp_path}/storage", tmp_path / "checkpoints"
    attempt, _ = begin(directory, mirror_at(url))
    mirroring = Mirroring(mirror_at(url), attempt)
    begun: list[str] = []
    run = Upload.run
    monkeypatch.setattr(Upload, "run", lambda self, group=None: (begun.append(self.final.name), run(self, group))[1])
    paths = {step: save(directory, step, attempt) for step in (2, 4, 6, 8, 10)}
    for step, path in paths.items():  # the outcome of the first is not asked for before all have come
        mirroring.offer(path, step, Keep(1, best=["step-00000004"], every_steps=6))
    assert mirroring.needed == ["step-00000004", "step-00000006", "step-00000010", "step-00000002"]
    outcomes = []
    while (outcome := mirroring.wait()) is not None:
        outcomes.append((outcome.global_step, outcome.error))
    assert outcomes == [(2, None), (10, None), (6, None), (4, None)]
    assert begun == [paths[step].name for step in (2, 10, 6, 4)]
    assert [one.entry.global_step for one in mirror_at(url).committed()[0]] == [4, 6, 10]


@needs_s3
def test_what_cannot_be_written_to(s3: S3Server, tmp_path: Path) -> None:
    for place in ("http://host/folder", "folder", "s3://", "/folder"):
        with pytest.raises(ConfigError, match="cannot be copied to"):
            MirrorConfig(place)
    with pytest.raises(CheckpointError, match="The specified bucket does not exist") as error:
        begin(tmp_path / "run", mirror_at("s3://nowhere/run"))
    assert error.value.hint == "create the bucket, or correct the URL"
    s3.check_credentials(True)
    try:
        with pytest.raises(CheckpointError, match="HTTP 403") as error:
            begin(tmp_path / "other", mirror_at(f"s3://{bucket_of(tmp_path)}/run"))
    finally:
        s3.check_credentials(False)
    assert error.value.hint == "give credentials that can read, write, list and delete there"
    with pytest.raises(RemoteError):
        ObjectFolder("s3://nowhere/run").sizes()


@needs_s3
def test_the_commands_take_urls(s3: S3Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = bucket_of(tmp_path)
    url, directory = f"s3://{bucket}/run", tmp_path / "run" / "checkpoints"
    attempt, _ = begin(directory, mirror_at(url))
    for step, loss in ((4, 0.2), (6, 0.3), (8, 0.4)):
        upload(save(directory, step, attempt, loss), mirror_at(url), attempt)
    name = f"{{}}.{attempt.label}"
    flip(s3, bucket, f"run/{name.format('step-00000006')}/meta.pt")

    assert main(["ls", url, "--verify"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows[1:]] == [[name.format(f"step-{s:08d}"), f"{s}"] for s in (4, 6, 8)]
    assert ["DAMAGED" in row for row in rows] == [False, False, True, False]
    assert [row.endswith("(best)") for row in rows] == [False, True, False, False]

    assert main(["verify", url]) == 1
    assert f"fault: checkpoint {url}/{name.format('step-00000006')} is damaged" in capsys.readouterr().out
    assert main(["verify", f"{url}/{name.format('step-00000008')}"]) == 0
    capsys.readouterr()

    for which, step in (("best", 4), ("last", 8)):
        assert main(["export", url, str(tmp_path / f"{which}.safetensors"), "--which", which]) == 0
        assert f"{url}/{name.format(f'step-{step:08d}')} (model)" in capsys.readouterr().out
    main(["export", str(directory / "step-00000008"), str(tmp_path / "local.safetensors")])
    one, other = (json_free(tmp_path / f"{name}.safetensors") for name in ("last", "local"))
    assert one == other
    with pytest.raises(CheckpointError, match="is damaged"):
        main(["export", f"{url}/{name.format('step-00000006')}", str(tmp_path / "no.safetensors")])

    capsys.readouterr()
    assert main(["prune", url, "--keep-best", "0", "--dry-run"]) == 0
    assert len(mirror_at(url).committed()[0]) == 3
    assert main(["prune", url, "--keep-best", "1"]) == 0
    assert "2 of 3 kept" in capsys.readouterr().out
    assert [one.entry.global_step for one in mirror_at(url).committed()[0]] == [4, 8]
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        main(["ls", f"{url}s"])


def json_free(path: Path) -> bytes:
    """A safetensors file without its header, which names the checkpoint."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length])
    return content[8 + length :]


def test_an_attempt_object_that_is_damaged_or_gone(tmp_path: Path) -> None:
    mirror = mirror_at(f"file://{tmp_path}/storage")
    attempt, _ = begin(tmp_path / "run", mirror)
    (tmp_path / "storage" / mirror_module.FENCE).write_text("?")
    with pytest.raises(CheckpointError, match="ATTEMPT is damaged"):
        mirror.guard(attempt)
    (tmp_path / "storage" / mirror_module.FENCE).unlink()
    with pytest.raises(CheckpointError, match="ATTEMPT is gone"):
        mirror.guard(attempt)
