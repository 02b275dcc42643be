"""What a comparison says of two traces, written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from disttrain.parity.compare import CLOSE, DIFFERENT, SAME, compare
from disttrain.parity.traces import ParityError, Trace
from disttrain.system.files import to_json

Edit = Callable[[dict[str, Any]], None]


def write(folder: Path, name: str, edit: Edit = lambda run: None) -> Trace:
    """A run of three steps; ``edit`` changes what it leaves behind."""
    weights: dict[int, dict[str, Tensor]] = {
        step: {"a": torch.full((2, 2), 1.0 + step), "b": torch.full((3,), 0.5), "buffer count": torch.tensor(step)}
        for step in range(4)
    }
    run: dict[str, Any] = {
        "weights": weights,
        "steps": {step: {"step": step, "loss": 2.0 / step, "grad_norm": 1.0 * step} for step in (1, 2, 3)},
        "samples": {step: [f"s{step}{place}" for place in range(4)] for step in (0, 1, 2)},
        "about": {"batch_norms": [], "is_task": True, "micro_batch_size": 2, "draws": False},
        "drawn": [],
        "result": {"test/accuracy": 0.5},
    }
    edit(run)
    here = folder / name
    (here / "trace").mkdir(parents=True)
    (here / "ledger").mkdir()
    for step, values in run["weights"].items():
        torch.save(values, here / "trace" / f"weights-{step:06d}.pt")
    (here / "trace" / "steps.jsonl").write_text("".join(to_json(line) + "\n" for line in run["steps"].values()))
    (here / "trace" / "about.json").write_text(json.dumps(run["about"]))
    (here / "trace" / "rank-00000.json").write_text(json.dumps(run["drawn"]))
    lines = [
        json.dumps({"epoch": 0, "step": step, "first_position": 0, "keys": keys})
        for step, keys in run["samples"].items()
    ]
    (here / "ledger" / "rank-00000.jsonl").write_text("\n".join(lines))
    (here / "run.json").write_text(to_json({"result": run["result"]}))
    return Trace(name, here)


def shift(step: int, name: str, by: float) -> Edit:
    def edit(run: dict[str, Any]) -> None:
        for later in range(step, 4):
            run["weights"][later][name] = run["weights"][later][name] + by

    return edit


def test_equal_runs_are_the_same_to_the_bit(tmp_path: Path) -> None:
    found = compare(write(tmp_path, "one"), write(tmp_path, "two"), 1e-6)
    assert (found.verdict, found.weights, found.loss, found.first, found.causes) == (SAME, 0.0, 0.0, "", ())
    assert found.distances == {0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}


def test_rounding_is_within_tolerance_and_named(tmp_path: Path) -> None:
    found = compare(write(tmp_path, "one"), write(tmp_path, "two", shift(2, "a", 1e-6)), 1e-5)
    assert found.verdict == CLOSE
    assert found.first.startswith("after step 2, a is off by ")
    assert found.weights == pytest.approx(1e-6 / 4, rel=0.2), "max|w - w'| over max|w| = 4"


def test_the_first_parameter_beyond_the_tolerance_is_named(tmp_path: Path) -> None:
    def edit(run: dict[str, Any]) -> None:
        shift(1, "a", 1e-6)(run)
        shift(2, "b", 0.1)(run)

    found = compare(write(tmp_path, "one"), write(tmp_path, "two", edit), 1e-5)
    assert found.verdict == DIFFERENT
    assert found.first.startswith("after step 2, b is off by 3.3e-02")


def cause_of(tmp_path: Path, edit: Edit, both: Edit = lambda run: None) -> str:
    def change(run: dict[str, Any]) -> None:
        both(run)
        edit(run)

    found = compare(write(tmp_path, "one", both), write(tmp_path, "two", change), 1e-5)
    assert found.verdict == DIFFERENT
    return found.causes[0]


def test_other_samples(tmp_path: Path) -> None:
    def edit(run: dict[str, Any]) -> None:
        run["samples"][1] = ["x"]
        shift(2, "a", 0.1)(run)

    assert cause_of(tmp_path, edit).startswith("a different sample order")


def test_other_initial_weights(tmp_path: Path) -> None:
    assert cause_of(tmp_path, shift(0, "a", 0.1)).startswith("different initial weights")


def test_draws_from_generators_that_are_not_keyed(tmp_path: Path) -> None:
    def edit(run: dict[str, Any]) -> None:
        run["steps"][1]["loss"] = 3.0
        run["drawn"] = ["numpy.random"]

    assert cause_of(tmp_path, edit).startswith("unkeyed randomness: training draws from numpy.random")


def test_another_loss_in_the_first_step(tmp_path: Path) -> None:
    def edit(run: dict[str, Any]) -> None:
        run["steps"][1]["loss"] = 3.0

    assert cause_of(tmp_path, edit).startswith("rank-dependent code or unkeyed randomness")


def test_another_gradient_of_the_same_loss(tmp_path: Path) -> None:
    def edit(run: dict[str, Any]) -> None:
        run["steps"][1]["grad_norm"] = 3.0

    assert cause_of(tmp_path, edit).startswith("rank-dependent code in the backward pass")


def test_no_mean_of_means_where_the_micro_batches_are_the_same(tmp_path: Path) -> None:
    def both(run: dict[str, Any]) -> None:
        run["about"]["is_task"] = False

    assert cause_of(tmp_path, shift(2, "a", 0.1), both).startswith("a nondeterministic kernel")


RESIZED = {
    "a mean of means: ": {"is_task": False},
    "another micro batch size (4 instead of 2): dropout masks depend on it": {"draws": True},
    "another micro batch size (4 instead of 2): batch norms (model.1) depend on it": {"batch_norms": ["model.1"]},
    "another micro batch size (4 instead of 2): the result of a sample depends on the rest": {},
}


@pytest.mark.parametrize("said", RESIZED)
def test_another_micro_batch_size(tmp_path: Path, said: str) -> None:
    def both(run: dict[str, Any]) -> None:
        run["about"] |= RESIZED[said]

    def edit(run: dict[str, Any]) -> None:
        run["about"]["micro_batch_size"] = 4
        run["steps"][1]["loss"] = 3.0

    assert cause_of(tmp_path, edit, both).startswith(said)


def test_running_statistics(tmp_path: Path) -> None:
    def both(run: dict[str, Any]) -> None:
        run["about"]["batch_norms"] = ["model.1"]

    def edit(run: dict[str, Any]) -> None:
        run["weights"][3]["buffer count"] = torch.tensor(9)

    assert cause_of(tmp_path, edit, both).startswith("batch normalization (model.1)")


def test_runs_of_different_lengths(tmp_path: Path) -> None:
    def edit(run: dict[str, Any]) -> None:
        del run["steps"][3]

    found = compare(write(tmp_path, "one"), write(tmp_path, "two", edit), 1e-5)
    assert (found.verdict, found.first) == (DIFFERENT, "two ran 2 steps, one 3")


def test_only_the_metrics(tmp_path: Path) -> None:
    def edit(run: dict[str, Any]) -> None:
        run["result"]["test/accuracy"] = 0.75

    found = compare(write(tmp_path, "one"), write(tmp_path, "two", edit), 1e-5)
    expected = (DIFFERENT, "only the metrics: test/accuracy is off by 2.5e-01", 0.25)
    assert (found.verdict, found.first, found.metrics) == expected


def set_to(run: dict[str, Any], place: str, value: Any) -> None:
    """Set, or with None delete, a weight after step 3, a metric, a step's number or a ledger's step."""
    kind, name = place.split(":")
    where, key = {
        "weight": (run["weights"][3], name),
        "metric": (run["result"], name),
        "step": (run["steps"][3], name),
        "ledger": (run["samples"], int(name) if kind == "ledger" else 0),
    }[kind]
    where.pop(key)
    if value is not None:
        where[key] = value


def test_the_same_nan_is_the_same(tmp_path: Path) -> None:
    def edit(run: dict[str, Any]) -> None:
        for name, value in {"a": torch.tensor([[math.nan, 1.0], [math.inf, 2.0]]), "b": torch.full((3,), 0.5)}.items():
            set_to(run, f"weight:{name}", value)
        set_to(run, "metric:test/accuracy", math.nan)
        set_to(run, "step:loss", math.nan)
        set_to(run, "step:grad_norm", math.inf)

    found = compare(write(tmp_path, "one", edit), write(tmp_path, "two", edit), 0.0, exact=True)
    assert (found.verdict, found.weights, found.loss, found.metrics) == (SAME, 0.0, 0.0, 0.0)


ONE_SIDED = {
    "weight:a": (torch.tensor([[math.nan, 4.0], [4.0, 4.0]]), "after step 3, a is off by nan"),
    "weight:b": (None, "after step 3, b is missing"),
    "metric:test/accuracy": (math.nan, "only the metrics: test/accuracy is off by inf"),
    "step:loss": (math.nan, "in step 3, the loss is off by inf"),
    "ledger:1": (None, "in step 2, the samples: the ledger of"),
}


@pytest.mark.parametrize("place", ONE_SIDED)
@pytest.mark.parametrize("swapped", [False, True])
def test_what_one_run_alone_has_is_a_difference(tmp_path: Path, place: str, swapped: bool) -> None:
    value, said = ONE_SIDED[place]
    one = write(tmp_path, "one")
    two = write(tmp_path, "two", lambda run: set_to(run, place, value))
    found = compare(*((two, one) if swapped else (one, two)), 1e-5)
    assert (found.verdict, found.first[: len(said)]) == (DIFFERENT, said)
    assert found.causes


def test_no_ledger_at_all_is_not_the_same_order(tmp_path: Path) -> None:
    def both(run: dict[str, Any]) -> None:
        run["samples"].clear()

    found = compare(write(tmp_path, "one", both), write(tmp_path, "two", both), 1e-5)
    assert (found.verdict, found.first) == (DIFFERENT, "in step 1, the samples: the ledger of one and two lists none")


def test_where_all_bits_are_to_be_equal_the_last_one_counts(tmp_path: Path) -> None:
    one, two = write(tmp_path, "one"), write(tmp_path, "two", shift(2, "a", 1e-6))
    found = compare(one, two, 1e-5, exact=True)
    assert (found.verdict, found.exact) == (DIFFERENT, True)
    assert found.first.startswith("after step 2, a is off by ")
    assert found.causes[0].startswith("a nondeterministic kernel")


@pytest.mark.parametrize("name", ["grad_norm", "loss"])
def test_where_all_bits_are_to_be_equal_those_of_norm_and_loss_count_too(tmp_path: Path, name: str) -> None:
    """A factor of clipping that rounds otherwise changes the weights some day."""

    def nudge(run: dict[str, Any]) -> None:
        run["steps"][2][name] = math.nextafter(run["steps"][2][name], math.inf)

    one, two = write(tmp_path, "one"), write(tmp_path, "two", nudge)
    assert compare(one, two, 1e-5).verdict == SAME
    found = compare(one, two, 1e-5, exact=True)
    assert (found.verdict, found.weights) == (DIFFERENT, 0.0)
    assert found.first.startswith(f"in step 2, the {name} is off by ")
    assert found.causes


def test_a_step_without_weights_is_told(tmp_path: Path) -> None:
    one, two = write(tmp_path, "one"), write(tmp_path, "two")
    (tmp_path / "two" / "trace" / "weights-000000.pt").unlink()
    with pytest.raises(ParityError, match=r"layout two recorded no weights for step 0"):
        compare(one, two, 1e-5)
    (tmp_path / "one" / "trace" / "steps.jsonl").unlink()
    with pytest.raises(ParityError, match=r"layout one recorded no steps"):
        compare(Trace("one", tmp_path / "one"), two, 1e-5)
