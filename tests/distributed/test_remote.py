"""Ranks that stream shards from a server through a small cache see what ranks with local shards see."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.callbacks.ledger import read_ledger
from tests.support.ranks import Outcome, run_ranks
from tests.support.servers import NGINX, nginx_server, range_server

STEPS = 30  # one and a half epochs of 19 steps


@pytest.fixture
def url(digits: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the digits, of a real nginx where that is installed."""
    if NGINX is not None:
        with nginx_server(digits, tmp_path / "nginx") as address:
            yield address
    else:
        with range_server(digits) as server:
            yield server.url


def fit(run_dir: Path, data: str, ranks: int, cache: Path, *more: str) -> Outcome:
    """Train digits from a folder or a server; a checkpoint every 4 steps."""
    arguments = [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.train={data}/train-{{000000..000003}}.tar", f"--data.val={data}/val.json"),
        *(f"--data.test={data}/test.json", "--data.cache.directory", str(cache / "shards")),
        *("--data.global_batch_size", "64", "--data.micro_batch_size", "16"),
        *("--trainer.max_steps", str(STEPS), "--checkpoint.every_steps", "4"),
        *("--early_stopping.restore_best", "false"),
        "--trainer.callbacks+=disttrain.callbacks.SampleLedger",
        *more,
    ]
    return run_ranks(ranks, train, arguments, str(cache), folder=run_dir.parent / f"{run_dir.name}-logs")


def train(arguments: list[str], home: str) -> None:
    """A rank with a cache of its own."""
    os.environ["DISTTRAIN_CACHE"] = home  # the server that ranks are forked from has an older environment
    from disttrain.cli import main

    sys.exit(main(arguments))


def small(digits: Path) -> list[str]:
    """A cache that holds two and a half of the four training shards."""
    largest = max(path.stat().st_size for path in digits.glob("*.tar"))
    return ["--data.cache.max_gib", f"{2.5 * largest / 2**30:.9f}"]


def test_killed_and_resumed_with_a_cold_cache(digits: Path, url: str, tmp_path: Path) -> None:
    fit(tmp_path / "local", str(digits), 4, tmp_path / "unused").ok()
    kill = ["--trainer.callbacks+=tests.support.callbacks.KillAt", "--trainer.callbacks.step=22"]
    streamed = tmp_path / "streamed"
    outcome = fit(streamed, url, 4, tmp_path / "cache", *small(digits), *kill)
    assert outcome.codes == [-9] * 4, outcome.text
    fit(streamed, url, 2, tmp_path / "cold", *small(digits)).ok()

    local, remote = read_ledger(tmp_path / "local" / "ledger"), read_ledger(streamed / "ledger")
    assert list(local) == list(remote) == list(range(STEPS))
    different = [step for step in local if local[step] != remote[step]]
    assert not different, f"global batches differ at steps {different[:5]}"

    assert not (tmp_path / "unused").exists(), "local shards went through a cache"
    left = [path for path in (tmp_path / "cold" / "shards").iterdir() if path.suffix == ".tar"]
    assert 0 < len(left) < len(list(digits.glob("*.tar")))
    assert not list((tmp_path / "cold" / "shards").glob("*.plan")), "a plan outlived its run"


def test_a_missing_shard_is_one_message(digits: Path, tmp_path: Path) -> None:
    with range_server(digits) as server:
        outcome = fit(
            tmp_path / "run",
            server.url,
            2,
            tmp_path / "cache",
            f"--data.train={server.url}/train-{{000003..000004}}.tar",
        )
    assert outcome.codes == [2, 2], outcome.text
    assert f"data.train: a shard does not exist: {server.url}/train-000004.tar: HTTP 404" in outcome.text
    assert outcome.text.count("mend:") == 1
    assert "Traceback" not in outcome.text
