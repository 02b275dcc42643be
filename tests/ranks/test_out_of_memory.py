"""``micro_batch_size: auto``: after a lack of memory a run is the one that began with the smaller size, to the bit."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from disttrain import EMA, Checkpointing, ParallelConfig, SampleLedger, ShardedDataModule, Trainer
from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.checkpoint.format.reader import committed
from disttrain.errors import OUT_OF_MEMORY_CODE
from disttrain.system.reading import read_run
from tests.support.features import write_features
from tests.support.launching import launched
from tests.support.memory import NormedTask, Shortage
from tests.support.ranks import Outcome, run_cli, run_ranks
from tests.support.weights import differing, final_weights

GLOBAL, STEPS = 16, 6


def fit(runs: dict[str, tuple[Any, Shortage | None]], parallel: dict[str, Any], folder: str, **more: Any) -> None:
    """Train in this process, or on this rank, each with its micro batch size and its lack of memory."""
    shards = {name: write_features(Path(folder) / "data", name, size) for name, size in (("train", 70), ("val", 21))}
    for name, (size, shortage) in runs.items():
        data = ShardedDataModule(
            **shards,  # type: ignore[arg-type]
            fields={"features": "features.npy", "label": "cls"},
            global_batch_size=GLOBAL,
            micro_batch_size=size,
        )
        trainer = Trainer(
            run_dir=f"{folder}/{name}",
            max_steps=STEPS,
            log_every_steps=1,
            validate_every_steps=2,
            gradient_clip_norm=1.0,
            parallel=ParallelConfig(**parallel),
            callbacks=[
                SampleLedger(),
                EMA(),
                Checkpointing(every_steps=2, keep_last=9),
                *([shortage] if shortage else []),
            ],
            progress_bar=False,
            **more,
        )
        trainer.fit(NormedTask(), datamodule=data, resume="auto")
        assert trainer.global_step == STEPS


def losses(run_dir: Path) -> list[dict[str, str]]:
    """What a run has logged, without what depends on the clock."""
    with open(run_dir / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    return [{n: v for n, v in row.items() if n not in ("time", "samples_per_second", "data_wait")} for row in rows]


def events(run_dir: Path) -> list[str]:
    """What a run has said of memory."""
    return [event["text"] for event in read_run(run_dir)["events"] if event["kind"] == "memory"]


def assert_same(one: Path, other: Path) -> None:
    """Two runs have the same weights, running statistics, losses and samples, to the bit."""
    assert not differing(final_weights(one), final_weights(other)), f"{one.name} and {other.name}"
    assert losses(one) == losses(other)
    assert read_ledger(one / "ledger") == read_ledger(other / "ledger")


@pytest.mark.parametrize("parallel", [{"reduction": "tree"}, {"strategy": "fsdp"}], ids=str)
def test_a_lone_rank_starts_over_in_its_process(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """In every phase of the first step, where the weights of the start are needed, down twice, and in a validation."""
    phases = ("copy", "forward", "backward", "optimizer")
    runs: dict[str, tuple[Any, Shortage | None]] = {"8": (8, None), "4": (4, None)}
    runs |= {phase: ("auto", Shortage(phase, 8)) for phase in phases}
    runs |= {"twice": ("auto", Shortage("backward", 4, step=1)), "validation": ("auto", Shortage("validation", 4))}
    run_ranks(1, fit, runs, parallel, str(tmp_path), folder=tmp_path / "logs", timeout=240).ok()
    for phase in phases:
        assert_same(tmp_path / "8", tmp_path / phase)
        assert len(events(tmp_path / phase)) == 1
    assert_same(tmp_path / "4", tmp_path / "twice")
    assert_same(tmp_path / "4", tmp_path / "validation")
    told = "step 1: out of memory on rank 0 in the backward pass with micro_batch_size"
    assert events(tmp_path / "twice") == [
        f"{told} {size}; the next attempt takes at most {size // 2}" for size in (16, 8)
    ]
    attempts = read_run(tmp_path / "twice")["attempts"]
    assert [attempt["micro_batch_size"] for attempt in attempts] == [4]
    assert [entry.global_step for entry in committed(tmp_path / "twice" / "checkpoints")[0]] == [0, 2, 4, 6]


def test_a_lone_rank_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    """The steps before it stay those of the larger size; the next start takes what was found, also on other ranks."""
    late: dict[str, tuple[Any, Shortage | None]] = {"late": ("auto", Shortage("forward", 8, step=5))}
    run_ranks(1, fit, late, {}, str(tmp_path), folder=tmp_path / "logs").ok()
    lines = (tmp_path / "late" / "ledger" / "rank-00000.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["keys"]) for line in lines] == [16] * 5 + [8] * 4, "from step 4 on"
    assert events(tmp_path / "late")[0].startswith("step 5: out of memory on rank 0 in the forward pass")


def command(run_dir: Path, data: Path, *more: str) -> list[str]:
    """A training whose ranks 1 run out of memory."""
    write_features(data, "train", 70, classes=2)
    flag = "--trainer.callbacks"
    return [
        *("fit", "--model", "tests.support.tasks.PlainFeatures", "--data.train", f"{data}/train.tar"),
        *("--data.fields", "{features: features.npy, label: cls}", "--data.global_batch_size", str(GLOBAL)),
        *("--data.micro_batch_size", "auto", "--trainer.max_steps", str(STEPS), "--trainer.run_dir", str(run_dir)),
        *("--trainer.progress_bar", "false", "--checkpoint.every_steps", "2", "--report", "false"),
        *(f"{flag}+=tests.support.memory.Shortage", f"{flag}.phase=backward", f"{flag}.limit=2", f"{flag}.rank=1"),
        *more,
    ]


def reference(tmp_path: Path, *more: str) -> Path:
    """The run that began with the size that is found."""
    arguments = command(tmp_path / "wanted", tmp_path / "data", "--data.micro_batch_size", "2", *more)
    run_cli(2, arguments, folder=tmp_path / "wanted-logs").ok()
    return tmp_path / "wanted"


def test_several_ranks_end_and_the_same_command_takes_less(tmp_path: Path) -> None:
    """Any module, and before the first checkpoint: nothing of the first attempts is left."""
    wanted = reference(tmp_path)
    arguments = command(tmp_path / "run", tmp_path / "data")

    def start() -> Outcome:
        return run_cli(2, arguments, folder=tmp_path / "logs")

    first = start()
    assert first.codes[1] == OUT_OF_MEMORY_CODE, first.text
    assert first.codes[0] == 2, "a peer was not ended by the lost connection"
    text = " ".join(first.text.split())
    assert "step 0: out of memory on rank 1 in the backward pass with micro_batch_size 8 hint: start the same" in text
    assert "start the same command again: it takes at most half of that by itself" in text
    assert "Traceback" not in text
    assert start().codes[1] == OUT_OF_MEMORY_CODE
    start().ok()
    assert not differing(final_weights(wanted), final_weights(tmp_path / "run"))
    assert [attempt["micro_batch_size"] for attempt in read_run(tmp_path / "run")["attempts"]] == [8, 4, 2]
    assert len(events(tmp_path / "run")) == 2


@pytest.mark.slow
def test_launch_starts_the_ranks_again(tmp_path: Path) -> None:
    """From the last checkpoint, whatever --resume says, under FSDP, without any restart allowed."""
    fsdp = ("--trainer.parallel.strategy", "fsdp")
    run_dir, flag = tmp_path / "run", "--trainer.callbacks"
    arguments = command(run_dir, tmp_path / "data", *fsdp, "--resume", "never", f"{flag}.step=3")
    with launched(["--nproc", "2", *arguments], tmp_path / "log") as launch:
        assert launch.process.wait(300) == 0, launch.log.read_text()
        text = launch.log.read_text()
    assert text.count("restarting all ranks") == 2
    attempts = read_run(run_dir)["attempts"]
    assert [(attempt["from_step"], attempt["micro_batch_size"]) for attempt in attempts] == [(0, 8), (2, 4), (2, 2)]
    assert not list(tmp_path.glob("run.*")), "the run was begun anew"


def test_nothing_smaller_is_left(tmp_path: Path) -> None:
    data = ("--data.micro_batch_size", "auto", "--data.global_batch_size", "2", "--trainer.callbacks.limit=0")
    outcome = run_cli(2, command(tmp_path / "run", tmp_path / "data", *data), folder=tmp_path / "logs")
    assert outcome.codes == [2, 2], outcome.text
    text = " ".join(outcome.text.split())
    assert "step 0: out of memory on rank 1 in the backward pass with micro_batch_size 1 hint: use" in text
    assert not (tmp_path / "run" / "memory").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_memory_of_a_device(tmp_path: Path, strategy: str) -> None:
    """Real activations that do not fit, with a loss scale."""
    os.environ["DISTTRAIN_TEST_DEVICE_MIB"] = "640"
    runs: dict[str, tuple[Any, Shortage | None]] = {"found": ("auto", None), "wanted": (8, None)}
    more = {"precision": "16-mixed", "accelerator": "cuda"}
    run_ranks(1, _on_device, runs, strategy, str(tmp_path), more, folder=tmp_path / "logs", timeout=300).ok()
    assert read_run(tmp_path / "found")["attempts"][0]["micro_batch_size"] == 8
    assert_same(tmp_path / "wanted", tmp_path / "found")


def _on_device(runs: dict[str, Any], strategy: str, folder: str, more: dict[str, Any]) -> None:
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(640 * 2**20 / total)
    NormedTask.ballast = 2**21  # 48 MiB a sample: eight fit, sixteen do not
    fit(runs, {"strategy": strategy}, folder, **more)
