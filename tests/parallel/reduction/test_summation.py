"""``reduction: tree`` on one rank: whose gradient it is, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from disttrain import ParallelConfig, Trainer
from tests.support.ranks import Outcome, run_ranks


class Plain(pl.LightningModule):
    """A LightningModule that is no Task: a mean a micro batch."""

    def __init__(self, *, manual: bool = False, unused: bool = False, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.unused = nn.Linear(4, 2), nn.Linear(1, 1) if unused else None
        if self.unused is not None:
            self.unused.requires_grad_(not frozen)
        self.automatic_optimization = not manual

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        out: Tensor = self.net(batch).square().mean()
        return out

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def micro_batches(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randn(3, 4, generator=draw) for _ in range(count)]


def train(out: str, settings: dict[str, bool], batches: int, accumulation: int, more: dict[str, Any]) -> None:
    """One step on one rank, in a process of its own; writes the weights."""
    trainer = Trainer(
        run_dir=str(Path(out).with_suffix("")),
        max_steps=1,
        parallel=ParallelConfig(reduction="tree"),
        progress_bar=False,
        **more,
    )
    trainer.accumulate_grad_batches = accumulation
    module = Plain(**settings)
    trainer.fit(module, train_dataloaders=DataLoader(micro_batches(batches), batch_size=None))  # type: ignore[arg-type]
    torch.save(module.state_dict(), out)


def outcome_of(
    folder: Path, settings: dict[str, bool], batches: int, accumulation: int, **more: Any
) -> tuple[Outcome, Path]:
    out = folder / "weights.pt"
    return run_ranks(1, train, str(out), settings, batches, accumulation, more, folder=folder / "logs"), out


@pytest.mark.parametrize("accumulation", [1, 2, 3, 7])
def test_the_gradient_is_the_mean_over_the_micro_batches(tmp_path: Path, accumulation: int) -> None:
    expected, batches = Plain(), micro_batches(accumulation)
    torch.stack([expected.training_step(batch, 0) for batch in batches]).mean().backward()
    outcome, out = outcome_of(tmp_path, {}, accumulation, accumulation)
    outcome.ok()
    got = torch.load(out, weights_only=True)
    for name, before in expected.named_parameters():
        assert before.grad is not None
        torch.testing.assert_close(got[name], (before - before.grad).detach())


@pytest.mark.parametrize(
    ("settings", "accumulation", "more", "message"),
    [
        ({"manual": True}, 1, {}, "Plain steps its optimizers by itself"),
        ({}, 2, {"precision": "bf16-true"}, "parallel.reduction is tree, and trainer.precision is bf16-true"),
        ({"unused": True}, 1, {}, "parameter unused.weight got no gradient from a micro batch"),
        ({"unused": True}, 2, {}, "parameter unused.weight got no gradient from a micro batch"),
        ({}, 4, {}, "a step had 2 micro batches of 4: the loader's length is no multiple"),
    ],
)
def test_what_cannot_be_summed_in_a_tree_is_refused(
    tmp_path: Path, settings: dict[str, bool], accumulation: int, more: dict[str, Any], message: str
) -> None:
    outcome, _ = outcome_of(tmp_path, settings, 2, accumulation, **more)
    assert outcome.codes == [1]
    assert message in outcome.text


def test_a_frozen_parameter_needs_no_gradient(tmp_path: Path) -> None:
    outcome, out = outcome_of(tmp_path, {"unused": True, "frozen": True}, 2, 2)
    outcome.ok()
    before = Plain(unused=True).state_dict()
    assert torch.equal(before["unused.weight"], torch.load(out, weights_only=True)["unused.weight"])
