"""Ranks that stream shards from servers through a small cache see what ranks with local shards see."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.commands import shards
from disttrain.data.index.shard_index import ShardIndex
from disttrain.data.order.sample_order import Order, OrderConfig
from tests.support.caches import kept_in
from tests.support.ranks import Outcome, run_ranks
from tests.support.servers import NGINX, S3, S3Server, nginx_server, range_server, s3_server

STEPS = 30  # one and a half epochs of 19 steps
FAULTY = (
    'map "$connection:$connection_requests" $fault { ~[02468]:2$ 500; ~[13579]:2$ 503; ~[13579]:4$ 444; default 0; }'
)
"""Every other connection ends with an error at its second request; the others are told to wait there, and cut later."""
ANSWERS = "if ($fault = 500) { return 500; } if ($fault = 503) { return 503; } if ($fault = 444) { return 444; }"


@pytest.fixture
def url(digits: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the digits, of a real and faulty nginx where that is installed."""
    if NGINX is not None:
        with nginx_server(digits, tmp_path / "nginx", http=FAULTY, server=ANSWERS) as address:
            yield address
    else:
        with range_server(digits) as server:
            yield server.url


def fit(
    run_dir: Path, data: str, ranks: int, cache: Path, *more: str, environment: dict[str, str] | None = None
) -> Outcome:
    """Train digits from a folder or a server; a checkpoint every 4 steps."""
    arguments = [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.train={data}/train-{{000000..000003}}.tar", f"--data.val={data}/val.json"),
        *(f"--data.test={data}/test.json", "--data.cache.directory", str(cache / "shards")),
        *("--data.global_batch_size", "64", "--data.micro_batch_size", "16"),
        *("--trainer.max_steps", str(STEPS), "--checkpoint.every_steps", "4", "--checkpoint.save", "sync"),
        *("--early_stopping.restore_best", "false"),
        "--trainer.callbacks+=disttrain.callbacks.SampleLedger",
        *more,
    ]
    known = {"DISTTRAIN_CACHE": str(cache), **(environment or {})}
    return run_ranks(ranks, train, arguments, known, folder=run_dir.parent / f"{run_dir.name}-logs")


def train(arguments: list[str], environment: dict[str, str]) -> None:
    """A rank with a cache of its own, no patience, and reads as small as batches, as they are of larger samples."""
    os.environ |= environment  # the server that ranks are forked from has an older one
    from disttrain.cli import main
    from disttrain.data.loader import loaders
    from disttrain.data.remote.ranges import RetryConfig

    assert loaders._SAMPLES_A_READ
    loaders._SAMPLES_A_READ = 16  # type: ignore[misc]
    RetryConfig.wait_seconds = lambda self, failed, chance: 0.01 * chance  # type: ignore[method-assign]
    sys.exit(main(arguments))


def small(folder: Path, num_shards: float = 2.5) -> list[str]:
    """A cache that holds two and a half of the four training shards, or as many as are given."""
    largest = max(path.stat().st_size for path in folder.glob("train-*.tar"))
    return ["--data.cache.max_gib", f"{num_shards * largest / 2**30:.9f}"]


def assert_same_samples(local: Path, streamed: Path, steps: int = STEPS) -> None:
    """The same samples in the same steps of two runs."""
    here, there = read_ledger(local / "ledger"), read_ledger(streamed / "ledger")
    assert list(here) == list(there) == list(range(steps))
    different = [step for step in here if here[step] != there[step]]
    assert not different, f"global batches differ at steps {different[:5]}"


@pytest.mark.slow
def test_killed_and_resumed_with_a_cold_cache(digits: Path, url: str, tmp_path: Path) -> None:
    fit(tmp_path / "local", str(digits), 4, tmp_path / "unused").ok()
    kill = ["--trainer.callbacks+=tests.support.callbacks.KillAt", "--trainer.callbacks.step=22"]
    streamed = tmp_path / "streamed"
    outcome = fit(streamed, url, 4, tmp_path / "cache", *small(digits), *kill)
    assert outcome.codes == [-9] * 4, outcome.text
    fit(streamed, url, 2, tmp_path / "cold", *small(digits)).ok()
    assert_same_samples(tmp_path / "local", streamed)

    if NGINX is not None:
        log = (tmp_path / "nginx" / "access.log").read_text()
        assert all(f'HTTP/1.1" {status} ' in log for status in (500, 503, 444)), "a fault was not met"
    assert not (tmp_path / "unused").exists(), "local shards went through a cache"
    left = [path for path in kept_in(tmp_path / "cold" / "shards").iterdir() if path.suffix == ".tar"]
    assert 0 < len(left) < len(list(digits.glob("*.tar")))
    assert not list(kept_in(tmp_path / "cold" / "shards").glob("*.plan")), "a plan outlived its run"


needs_s3 = pytest.mark.skipif(not S3, reason="moto[server] and s3fs are not installed")
KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """The digits in sixteen training shards."""
    folder = tmp_path / "many"
    assert shards.main(["pack", "sklearn:digits", str(folder), "--shards", "16"]) == 0
    return folder


@pytest.fixture
def s3(many: Path) -> Iterator[S3Server]:
    """S3 with the digits in the bucket ``digits``."""
    with s3_server() as server:
        server.upload(many, "digits")
        yield server


def fetches(server: S3Server, index: ShardIndex) -> Counter[str]:
    """How often each shard was fetched as a whole; in one request, as these are small."""
    whole = {(f"/digits/{Path(s.path).name}", f"bytes=0-{s.size_bytes - 1}") for s in index.shards}
    return Counter(path for method, path, range_ in server.requests if method == "GET" and (path, range_) in whole)


@needs_s3
@pytest.mark.slow
def test_four_ranks_share_a_cache_smaller_than_the_data_set(many: Path, s3: S3Server, tmp_path: Path) -> None:
    """Each rank walks its lane through some shards, so that a shard is needed once or twice an epoch."""
    steps, ahead = 24, 12  # an epoch and a quarter; how far the loader reads ahead
    train = "train-{000000..000015}.tar"
    more = ("--data.shuffle.lanes=4", "--data.shuffle.window=16", f"--trainer.max_steps={steps}")
    fit(tmp_path / "local", str(many), 4, tmp_path / "unused", *more, f"--data.train={many}/{train}").ok()

    index = ShardIndex.open(f"{many}/{train}")
    walk = Order(index.sizes, OrderConfig(64, seed=1, lanes=4, window=16))
    needs: Counter[str] = Counter()
    for epoch, rank in itertools.product(range(2), range(4)):
        needed = walk.shard_needs(epoch, (16 * rank, 16 * rank + 16))
        begun = needed.shards[needed.first + epoch * walk.steps_per_epoch < steps + ahead]
        needs.update(f"/digits/train-{shard:06d}.tar" for shard in begun.tolist())
    assert set(needs) == {f"/digits/train-{shard:06d}.tar" for shard in range(16)}

    more = (*more, *small(many, 11), f"--data.train=s3://digits/{train}")
    environment = {**KEYS, "AWS_ENDPOINT_URL": s3.url}
    for prefetch in (0, 2):
        s3.requests.clear()
        run, cache = tmp_path / f"streamed-{prefetch}", tmp_path / f"cache-{prefetch}"
        options = (*more, f"--data.cache.prefetch_threads={prefetch}")
        fit(run, str(many), 4, cache, *options, environment=environment).ok()
        assert_same_samples(tmp_path / "local", run, steps)
        found = fetches(s3, index)
        assert set(found) == set(needs), "every shard is needed in an epoch"
        # With prefetching, what comes first and is evicted again depends on which rank is first to say what it needs.
        assert sum(found.values()) <= sum(needs.values()), f"fetched {found}, needed {needs}"
        assert prefetch or all(found[shard] <= needs[shard] for shard in needs), f"fetched {found}, needed {needs}"
        kept = sum(path.stat().st_size for path in kept_in(cache / "shards").glob("*.tar"))
        assert kept <= 11 * max(shard.size_bytes for shard in index.shards)


@needs_s3
def test_refused_credentials_are_one_message(many: Path, s3: S3Server, tmp_path: Path) -> None:
    s3.check_credentials(True)
    environment = {**KEYS, "AWS_ENDPOINT_URL": s3.url}
    train = "--data.train=s3://digits/train-{000000..000001}.tar"
    outcome = fit(tmp_path / "run", str(many), 2, tmp_path / "cache", train, environment=environment)
    assert outcome.codes == [2, 2], outcome.text
    said = "s3://digits/train-000000.tar: HTTP 403: the server refused the request: Forbidden (1 attempt; credentials: "
    assert said in outcome.text
    assert outcome.text.count("hint: use credentials with read access") == 1
    assert "Traceback" not in outcome.text


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
    assert outcome.text.count("hint:") == 1
    assert "Traceback" not in outcome.text
