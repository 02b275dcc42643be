"""Runs whose checkpoints are copied to S3: the folder is lost, or a process or the server, and the run goes on."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.checkpoint.format.marker import committed
from disttrain.system.reading import read_run
from tests.support.ranks import Outcome, run_ranks
from tests.support.servers import S3, S3Server, s3_server
from tests.support.weights import differing, final_weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.skipif(not S3, reason="moto[server] and s3fs are not installed"),
]
URL = "s3://models/runs/digits"


@pytest.fixture
def s3() -> Iterator[S3Server]:
    """S3 with an empty bucket."""
    with s3_server() as server:
        server.make("models")
        yield server


def fit(run_dir: Path, data: Path, ranks: int, s3: S3Server | None, *more: str, url: str = URL) -> Outcome:
    """Train a small network on digits for 12 steps, the same bits in all layouts; a checkpoint every 4."""
    arguments = [
        *("fit", "--model", "tests.support.tasks.PlainDigits", "--data.fields", "{image: image.npy, label: cls}"),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val")),
        *("--data.global_batch_size", "32", "--data.micro_batch_size", "8", "--trainer.run_dir", str(run_dir)),
        *("--trainer.max_steps", "12", "--trainer.validate_every_steps", "6", "--checkpoint.every_steps", "4"),
        *("--checkpoint.monitor", "val/loss", "--trainer.progress_bar", "false"),
        *("--trainer.parallel.reduction", "tree"),
        *more,
    ]
    environment = {}
    if s3 is not None:
        arguments += ["--checkpoint.mirror.url", url, "--checkpoint.mirror.retry.attempts", "4"]
        environment["AWS_ENDPOINT_URL"] = s3.url
    return run_ranks(ranks, train, arguments, environment, folder=run_dir.parent / f"{run_dir.name}-logs")


def train(arguments: list[str], environment: dict[str, str]) -> None:
    """A rank that has no patience."""
    keys = dict.fromkeys(("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), "testing")
    os.environ |= {**keys, "AWS_DEFAULT_REGION": "us-east-1", **environment}
    from disttrain.cli import main
    from disttrain.data.remote.ranges import RetryConfig

    RetryConfig.wait_seconds = lambda self, failed, chance: 0.01 * chance  # type: ignore[method-assign]
    sys.exit(main(arguments))


def steps_of(s3: S3Server) -> set[int]:
    """Steps of the copies that have a marker."""
    return {int(name.split("/")[2][5:13]) for name in s3.names("models") if name.endswith("COMMITTED")}


LAYOUTS = [
    pytest.param(2, "ddp", marks=pytest.mark.slow),
    pytest.param(1, "ddp", marks=pytest.mark.slow),
    (2, "fsdp"),
    pytest.param(1, "fsdp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("ranks", "strategy"), LAYOUTS)
def test_the_folder_is_lost_and_the_run_goes_on(
    digits: Path, tmp_path: Path, s3: S3Server, ranks: int, strategy: str
) -> None:
    """Two ranks are preempted at step 10; the end has the same bits as that of a run that nothing happened to."""
    fit(tmp_path / "whole", digits, 1, None).ok()
    run_dir = tmp_path / "run"
    stop = ("--trainer.callbacks+=tests.support.callbacks.SignalAt", "--trainer.callbacks.phase=train")
    outcome = fit(run_dir, digits, 2, s3, *stop, "--trainer.callbacks.step=10")
    assert outcome.codes == [75, 75], outcome.text
    step = max(steps_of(s3))
    assert step == committed(run_dir / "checkpoints")[0][-1].global_step >= 10, "it ended before its last copy"
    shutil.rmtree(run_dir)

    outcome = fit(run_dir, digits, ranks, s3, "--trainer.parallel.strategy", strategy).ok()
    assert f"disttrain: fetched {URL}/step-{step:08d}.a1-" in outcome.text
    assert f"disttrain: resuming from {run_dir}/checkpoints/step-{step:08d}\n" in outcome.text
    assert read_run(run_dir)["attempts"][0]["from_step"] == step
    assert not differing(final_weights(tmp_path / "whole"), final_weights(run_dir))
    assert committed(run_dir / "checkpoints")[0][-1].about.attempt == 2
    assert steps_of(s3) - {6} == {12}, "the last and the best are kept, as in the folder"


@pytest.mark.slow
@pytest.mark.parametrize("place", ["committing", "uploading"])
def test_killed_before_the_marker(digits: Path, tmp_path: Path, s3: S3Server, place: str) -> None:
    run_dir = tmp_path / "run"
    trap = ("--trainer.callbacks+=tests.support.callbacks.KillInCopy", f"--trainer.callbacks.place={place}")
    codes = fit(run_dir, digits, 2, s3, *trap, "--trainer.callbacks.step=8").codes
    assert codes[0] == -9, f"not killed while {place}: {codes}"
    copied = steps_of(s3)
    assert copied <= {4, 6}
    assert copied
    shutil.rmtree(run_dir)
    if place == "committing":
        torn = {name.split("/")[2] for name in s3.names("models") if "/step-" in name and int(name[17:25]) >= 8}
        assert len(torn) == 1
    else:
        torn = set()

    outcome = fit(run_dir, digits, 2, s3).ok()
    for name in torn:
        assert f"disttrain: skipped: checkpoint {URL}/{name} was never committed" in outcome.text
    assert f"disttrain: resuming from {run_dir}/checkpoints/step-{max(copied):08d}\n" in outcome.text
    assert not [name for name in s3.names("models") if "/step-00000008.a1" in name], "left lying"


@pytest.mark.parametrize("on_error", ["continue", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_server_that_is_gone_stops_training_if_it_is_to(
    digits: Path, tmp_path: Path, s3: S3Server, on_error: str
) -> None:
    s3.fail("PUT", "__1_0.distcp")  # rank 1's
    outcome = fit(tmp_path / "run", digits, 2, s3, "--checkpoint.mirror.on_error", on_error)
    what = f"the checkpoint folder {URL} cannot be written: {URL}/step-000000"
    assert "Traceback" not in outcome.text
    assert steps_of(s3) == set()
    events = [event["text"] for event in read_run(tmp_path / "run")["events"] if event["kind"] == "save"]
    if on_error == "continue":
        outcome.ok()
        assert events
        assert outcome.text.count(what) == outcome.text.count("training goes on") == len(events)
        assert all("no copy of the checkpoint of step" in text and "HTTP 503" in text for text in events), events
        assert [entry.global_step for entry in committed(tmp_path / "run" / "checkpoints")[0]][-1] == 12
        assert read_run(tmp_path / "run")["status"] == "completed"
    else:
        assert outcome.codes == [2, 2], outcome.text
        assert committed(tmp_path / "run" / "checkpoints")[0], "a local checkpoint was lost"


WRONG = [
    ("bucket", "The specified bucket does not exist", "create the bucket, or correct the URL"),
    pytest.param(
        "keys",
        "HTTP 403: the server refused the request",
        "give credentials that can read, write, list and delete there",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("what", "message", "hint"), WRONG)
def test_what_cannot_work_ends_the_run_before_its_first_step(
    digits: Path, tmp_path: Path, s3: S3Server, what: str, message: str, hint: str
) -> None:
    s3.check_credentials(what == "keys")
    outcome = fit(tmp_path / "run", digits, 2, s3, url="s3://modles/run" if what == "bucket" else URL)
    assert outcome.codes == [2, 2], outcome.text
    assert outcome.text.count(message) == 1
    assert outcome.text.count(f"hint: {hint}") == 1
    assert "Traceback" not in outcome.text
    assert "attempts" not in read_run(tmp_path / "run"), "training has begun"
