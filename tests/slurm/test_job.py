"""What a job asks for, and a site's settings: every mistake is one message that names the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from disttrain.errors import ConfigError
from disttrain.parallel.config import ParallelConfig
from disttrain.slurm.job import Job, check_ranks, slurm_time
from disttrain.slurm.site import Container, Site, find_site, load_site


@pytest.mark.parametrize(
    ("options", "what", "hint"),
    [
        ({}, "the number of ranks per node is not set", "--gpus-per-node K"),
        ({"gpus_per_node": 4, "tasks_per_node": 2}, "--tasks-per-node is 2 and --gpus-per-node is 4", "omit"),
        ({"tasks_per_node": 0}, "--tasks-per-node is 0", "at least 1"),
        ({"tasks_per_node": 1, "nodes": 0}, "--nodes is 0", "at least 1"),
        ({"tasks_per_node": 1, "array": "1-"}, "--array is '1-'", "0-3"),
        ({"tasks_per_node": 1, "time": "soon"}, "--time is 'soon'", "3h50m"),
        ({"tasks_per_node": 1, "time": "0"}, "which is not positive", "positive"),
        ({"tasks_per_node": 1, "time": "2m", "requeue": True}, "a signal 120 s before its end", "--signal-seconds"),
        ({"tasks_per_node": 1, "style": "mpirun"}, "--style is 'mpirun'", "srun or torchrun"),
    ],
)
def test_a_job_that_cannot_be(options: dict[str, Any], what: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Job("a", **options)
    assert what in caught.value.what
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("1:00:00", 3600), ("2-0", 172800), ("1-02:30", 95400), ("3h50m", 13800)],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert Job("a", tasks_per_node=1, time=text).limit_seconds == seconds


def test_time_as_slurm_writes_it() -> None:
    assert slurm_time(86400 + 3600 + 61) == "1-01:01:01"
    assert slurm_time(59) == "00:00:59"


def test_ranks_against_the_configuration() -> None:
    job = Job("a", nodes=2, gpus_per_node=2)
    assert check_ranks(job, ParallelConfig(), 64, 8) == "2 nodes x 2 ranks, 2 x 8 samples per rank and step"
    with pytest.raises(ConfigError, match="does not fit 2 nodes x 2 ranks: micro_batch_size 32 does not divide"):
        check_ranks(job, ParallelConfig(), 64, 32)
    with pytest.raises(ConfigError, match=r"does not fit 2 nodes x 2 ranks: .*parallel\.shard 3"):
        check_ranks(job, ParallelConfig(strategy="fsdp", shard=3), 64, 8)
    assert check_ranks(job, ParallelConfig(), 64, "auto").endswith("16 samples per rank and step")


@pytest.mark.parametrize(
    ("text", "what", "hint"),
    [
        ("acount: x", "there is no field acount", "did you mean 'account'?"),
        ("modules: cuda", "modules is 'cuda'", "a list of strings"),
        ("cpus_per_task: many", "cpus_per_task is 'many'", "an integer"),
        ("cpus_per_task: 0", "cpus_per_task is 0", "at least 1"),
        ("environment: {A B: 1}", "environment has 'A B'", "letters"),
        ("environment: {A: null}", "environment is {'A': None}", "without empty values"),
        ("container: {runtime: pyxis}", "container.image is missing", "set the image"),
        ("container: {image: a, runtime: docker}", "container.runtime is 'docker'", "apptainer, pyxis"),
        ("container: {image: a, mount: [b]}", "there is no field container.mount", "did you mean 'mounts'?"),
        ("- a", "the file is not a mapping", "NAME: VALUE"),
        ("a: [", "is not valid YAML", "or the file"),
    ],
)
def test_a_site_that_cannot_be(tmp_path: Path, text: str, what: str, hint: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_site(file)
    assert str(file) in caught.value.what
    assert what in caught.value.what
    assert hint in caught.value.hint


def test_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("account: 7\nsbatch: {exclusive: null, nice: 3}\ncontainer: {image: a.sif, mounts: [/data]}\n")
    assert load_site(file) == Site(
        account="7", sbatch={"exclusive": None, "nice": "3"}, container=Container("a.sif", mounts=("/data",))
    )
    assert load_site(None) == Site()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_site(None) is None
    monkeypatch.setenv("DISTTRAIN_SITE", str(file))
    assert find_site(None) == file
    with pytest.raises(ConfigError, match="cannot be read"):
        load_site(tmp_path / "absent.yaml")
    file.write_bytes(b"account: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_site(file)
