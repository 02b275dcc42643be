"""Clipping by value and parameter groups are the same in all layouts; groups come from YAML and survive a resume."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel

from disttrain import OptimizerConfig, ParallelConfig, Trainer
from disttrain.checkpoint.format.reader import committed, read_meta
from disttrain.errors import ConfigError
from disttrain.optim import ParameterGroupConfig
from disttrain.parallel.gradients import ordered_gradient_norm
from disttrain.run.metrics_file import read_metrics
from disttrain.strategies.build import strategy_of
from tests.support.checkpoints import commit
from tests.support.ranks import Outcome, run_cli, run_ranks
from tests.support.sameness import MicroBatches, PlainModule, TransformerTask
from tests.support.weights import differing, distance, final_weights, whole_weights

STEPS, MICRO_BATCHES, BOUND = 4, 4, 0.01
GROUPS = (
    ParameterGroupConfig("model.blocks.0.*", lr_scale=0.5),
    ParameterGroupConfig("*.embedding.*", weight_decay=0.0),
)


class Clipped(TransformerTask):
    """Notes the norm that is logged, the norm before clipping, and that no element is above the bound."""

    def __init__(self) -> None:
        super().__init__(OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.05, groups=GROUPS))
        self.norms: list[torch.Tensor] = []

    def configure_gradient_clipping(self, *arguments: Any, **more: Any) -> None:
        before = ordered_gradient_norm(self.parameters())
        super().configure_gradient_clipping(*arguments, **more)
        after = ordered_gradient_norm(self.parameters())
        assert after < before, "nothing was clipped: the test shows nothing"
        assert self.grad_norm is not None
        assert torch.equal(self.grad_norm, before), "another norm than that before clipping"
        self.norms.append(self.grad_norm)
        for parameter in self.parameters():
            grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            assert grad is not None
            assert bool((grad.abs() <= BOUND).all())


def train_in(out: str, parallel: ParallelConfig, plain: bool) -> None:
    """Train some steps; rank 0 writes weights, norms and the optimizer's groups."""
    trainer = Trainer(
        run_dir=str(Path(out).with_suffix("")),
        max_steps=STEPS,
        parallel=parallel,
        gradient_clip_value=BOUND,
        seed=5,
        progress_bar=False,
    )
    trainer.accumulate_grad_batches = MICRO_BATCHES // trainer.world_size
    batches = MicroBatches(
        trainer.global_rank, trainer.accumulate_grad_batches, micro_batches=MICRO_BATCHES, steps=STEPS
    )
    task: Any = PlainModule(OptimizerConfig(name="sgd", lr=0.1, groups=GROUPS[:1])) if plain else Clipped()
    trainer.fit(task, train_dataloaders=batches)
    strategy = strategy_of(trainer)
    whole = whole_weights(trainer)
    groups = strategy.optimizer_state(trainer.optimizers[0])["param_groups"]
    if trainer.is_global_zero:
        torch.save({"weights": whole, "norms": torch.stack(task.norms) if not plain else None, "groups": groups}, out)


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Train in a layout, once a module."""
    folder = tmp_path_factory.mktemp("clipping")

    @cache
    def run(ranks: int, strategy: Any, plain: bool = False) -> dict[str, Any]:
        name = f"{ranks}-{strategy}-{plain}"
        parallel = ParallelConfig(strategy=strategy, reduction="tree")
        run_ranks(ranks, train_in, str(folder / f"{name}.pt"), parallel, plain, folder=folder / name).ok()
        found: dict[str, Any] = torch.load(folder / f"{name}.pt", weights_only=True)
        return found

    return run


@pytest.mark.parametrize(("ranks", "strategy"), [(1, "fsdp"), (2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp")])
def test_clipping_by_value_and_groups_give_the_same_bits(train, ranks: int, strategy: str) -> None:  # type: ignore[no-untyped-def]
    alone, found = train(1, "ddp"), train(ranks, strategy)
    assert not differing(alone["weights"], found["weights"])
    assert torch.equal(alone["norms"], found["norms"]), f"norms {alone['norms']} and {found['norms']}"
    assert alone["groups"] == found["groups"]
    names = ["rest", "rest, no decay", "model.blocks.0.*", "model.blocks.0.*, no decay", "*.embedding.*"]
    assert [group["name"] for group in alone["groups"]] == names


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_any_lightning_module_is_clipped_by_value(train, strategy: str) -> None:  # type: ignore[no-untyped-def]
    alone = train(1, "ddp", plain=True)
    assert not differing(alone["weights"], train(2, strategy, plain=True)["weights"])


class Divided(PlainModule):
    """Of whose layers a tensor group divides some; without dropout."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer)
        first, _ = self.model.blocks
        self.model.blocks = nn.ModuleList([first[:-1], nn.Sequential(nn.Linear(37, 40), nn.GELU())])  # type: ignore[index]
        self.model.head = nn.Linear(40, 3)

    def tensor_plan(self) -> dict[str, Any]:
        """The first layer by its outputs, which the next one wants whole."""
        return {"model.blocks.1.0": ColwiseParallel(output_layouts=Replicate())}


def train_divided(out: str, bound: float) -> None:
    """Train a module that is no task, alone or divided; rank 0 writes the weights and the last norm."""
    parallel = ParallelConfig(strategy="fsdp", tensor=int(os.environ.get("WORLD_SIZE", "1")))
    trainer = Trainer(
        run_dir=out + "-run",
        max_steps=3,
        parallel=parallel,
        gradient_clip_norm=bound,
        log_every_steps=1,
        seed=5,
        progress_bar=False,
    )
    task = Divided(OptimizerConfig(name="sgd", lr=0.1))
    trainer.fit(task, train_dataloaders=MicroBatches(0, 1, micro_batches=1, steps=3))
    whole = whole_weights(trainer)
    if trainer.is_global_zero:
        torch.save({**whole, "norm": strategy_of(trainer).grad_norm}, out)


def test_any_lightning_module_is_clipped_by_norm_with_tensor_parallelism(tmp_path: Path) -> None:
    """Whose gradients are divided along different axes."""
    found = []
    for ranks in (1, 2):
        out = str(tmp_path / f"{ranks}.pt")
        run_ranks(ranks, train_divided, out, 0.1, folder=tmp_path / f"logs-{ranks}").ok()
        found.append(torch.load(out, weights_only=True))
        logged = read_metrics(tmp_path / f"{ranks}.pt-run" / "metrics.csv")["train/grad_norm"]
        assert logged[-1][1] == pytest.approx(float(found[-1]["norm"]))
    assert float(found[0]["norm"]) > 0.1, "nothing was clipped"
    assert distance(found[0], found[1]) <= 1e-6


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_clip_norm": 1.0, "gradient_clip_value": 0.5}, "gradient_clip_norm is 1.0 and gradient_clip_value"),
        ({"gradient_clip_value": 0.0}, "trainer.gradient_clip_value is 0.0"),
        ({"gradient_clip_norm": -1.0}, "trainer.gradient_clip_norm is -1.0"),
    ],
)
def test_bounds_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Trainer(run_dir=str(tmp_path), progress_bar=False, **settings)
    assert caught.value.hint


def fit(run_dir: Path, data: Path, ranks: int, optimizer: dict[str, Any], *more: str) -> Outcome:
    """Train digits with a configuration file of its own."""
    config = yaml.safe_load(Path("recipes/digits.yaml").read_text())
    config["model"]["init_args"]["optimizer"] = optimizer
    config["trainer"] |= {"run_dir": str(run_dir), "gradient_clip_norm": None, "gradient_clip_value": 0.01}
    config["data"] |= {split: f"{data}/{split}.json" for split in ("train", "val", "test")}
    path = run_dir.parent / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    arguments = ["fit", "--config", str(path), "--data.micro_batch_size", "16", "--checkpoint.every_steps", "4"]
    arguments += ["--checkpoint.save", "sync"]
    arguments += ["--trainer.parallel.reduction", "tree", *more]
    return run_cli(ranks, arguments, folder=run_dir.parent / "logs")


@pytest.mark.slow
def test_groups_in_yaml_and_at_a_resume(digits: Path, tmp_path: Path) -> None:
    optimizer = {
        "name": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.05,
        "groups": [
            {"pattern": ["*.stages.0.*", "*.bias"], "name": "slow", "lr_scale": 0.1},
            {"pattern": "model.*.weight", "betas": [0.8, 0.9]},
        ],
    }
    fit(tmp_path / "whole", digits, 1, optimizer, "--trainer.max_steps", "8", "--model.schedule.name", "constant").ok()
    run = ("--trainer.max_steps", "8", "--model.schedule.name", "constant", "--trainer.parallel.strategy")
    kill = ("--trainer.callbacks+=tests.support.callbacks.KillAt", "--trainer.callbacks.step=6")
    moved = tmp_path / "moved"
    assert fit(moved, digits, 2, optimizer, *run, "fsdp", *kill).codes == [-9, -9]
    checkpoint = committed(moved / "checkpoints")[0][-1].path
    names = [group["name"] for group in read_meta(checkpoint)["param_groups"][0]]
    assert names == ["slow", "slow, no decay", "model.*.weight", "model.*.weight, no decay"]

    other = {**optimizer, "groups": [{**optimizer["groups"][0], "pattern": ["*.bias"]}, optimizer["groups"][1]]}  # type: ignore[index]
    refused = fit(moved, digits, 1, other, *run, "ddp")
    assert refused.codes == [2], refused.text
    assert "settings or parameter groups that differ from this run's AdamW" in refused.text
    assert "Traceback" not in refused.text

    # As written before groups had names.
    meta = torch.load(checkpoint / "meta.pt", weights_only=True)
    for group in meta["param_groups"][0]:
        del group["name"]
    torch.save(meta, checkpoint / "meta.pt")
    commit(checkpoint, 4)
    fit(moved, digits, 2, optimizer, *run, "ddp").ok()
    assert not differing(final_weights(tmp_path / "whole"), final_weights(moved))
    again = read_meta(committed(moved / "checkpoints")[0][-1].path)["param_groups"][0]
    assert [group["name"] for group in again] == names
