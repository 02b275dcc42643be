"""Runs that are asked to stop, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.checkpoint.format.reader import committed
from disttrain.system.reading import read_run
from tests.support.ranks import Outcome, run_cli
from tests.support.weights import differing, final_weights

STEPS = 24  # an epoch of 19 steps, and a bit; validations at 10 and 20, checkpoints at 4, 8, ...


@dataclass(frozen=True)
class Stop:
    """How a run is asked to stop.

    Attributes:
        phase: where, as :class:`tests.support.callbacks.SignalAt` names it.
        step: optimizer steps done before.
        signal: which signal.
        ranks: who gets it.
        skew: seconds between the ranks.
    """

    phase: str
    step: int = 0
    signal: str = "SIGTERM"
    ranks: tuple[int, ...] = (0, 1)
    skew: float = 0.0

    def arguments(self) -> list[str]:
        """Of the command line."""
        name = "--trainer.callbacks"
        return [
            f"{name}+=tests.support.callbacks.SignalAt",
            *(f"{name}.{key}={getattr(self, key)}" for key in ("phase", "step", "signal", "skew")),
            f"{name}.ranks={list(self.ranks)}",
        ]


@dataclass(frozen=True)
class Stopped:
    """What a stopped run left, and how it went on.

    Attributes:
        outcome: of the stopped attempt.
        saved_at: step of the newest checkpoint then, None without one.
        resumed_at: step at which the next attempt began.
        different: tensors whose bits are not those of the run that was never stopped.
        ledger_equal: whether every step had the same samples.
    """

    outcome: Outcome
    saved_at: int | None
    resumed_at: int
    different: list[str]
    ledger_equal: bool


def fit(run_dir: Path, data: Path, strategy: str, more: Sequence[str] = (), *, ranks: int = 2) -> Outcome:
    """Train digits."""
    return run_cli(ranks, fit_arguments(run_dir, data, strategy, more), folder=run_dir.parent / f"{run_dir.name}-logs")


def fit_arguments(run_dir: Path, data: Path, strategy: str, more: Sequence[str] = ()) -> list[str]:
    """The command line of :func:`fit`."""
    return [
        *("fit", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(run_dir)),
        *(f"--data.{split}={data}/{split}.json" for split in ("train", "val", "test")),
        *("--data.global_batch_size", "64", "--data.micro_batch_size", "16"),
        *("--trainer.max_steps", str(STEPS), "--trainer.parallel.strategy", strategy),
        *("--trainer.validate_every_steps", "10", "--checkpoint.every_steps", "4"),
        "--trainer.callbacks+=disttrain.callbacks.SampleLedger",
        *more,
    ]


def stop_and_resume(run_dir: Path, whole: Path, data: Path, strategy: str, stop: Stop) -> Stopped:
    """Stop a run, start it again, and compare it with the whole one."""
    outcome = fit(run_dir, data, strategy, stop.arguments())
    there = committed(run_dir / "checkpoints")[0]
    fit(run_dir, data, strategy).ok()
    return Stopped(
        outcome,
        there[-1].global_step if there else None,
        read_run(run_dir)["attempts"][-1]["from_step"],
        differing(final_weights(whole), final_weights(run_dir)),
        read_ledger(whole / "ledger") == read_ledger(run_dir / "ledger"),
    )
