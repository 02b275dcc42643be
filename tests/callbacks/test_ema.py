"""Averaged weights in one process: the rule, narrow weights, and checkpoints from before they were kept."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from disttrain import EMA, Checkpointing, OptimizerConfig, Trainer
from disttrain.checkpoint.format.reader import committed, read_model
from disttrain.errors import CheckpointError, ConfigError
from tests.support.sameness import MicroBatches, MLPTask

# The micro batches of these runs begin anew at a resume, which is told and does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore:the run resumes after batch:UserWarning")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Leave no process group of this process behind, nor its port in the environment of later ones."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


class Record(Callback):
    """Keeps the weights of all steps, and those that are validated."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.steps = [weights(pl_module)]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.steps.append(weights(pl_module))

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self.validated = weights(pl_module)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def fit(
    folder: Path, *callbacks: Callback, steps: int = 6, checkpoint: Path | None = None, **settings: Any
) -> tuple[MLPTask, Trainer]:
    """Train a small model; its last step is validated and saved."""
    trainer = Trainer(
        run_dir=str(folder),
        max_steps=steps,
        validate_every_steps=steps,
        progress_bar=False,
        callbacks=[*callbacks, Checkpointing()],
        **settings,
    )
    task = MLPTask(OptimizerConfig(name="sgd", lr=0.1))
    batches = [MicroBatches(0, 1, micro_batches=1, steps=count) for count in (steps, 2)]
    trainer.fit(task, *batches, ckpt_path=None if checkpoint is None else str(checkpoint))
    return task, trainer


def last(folder: Path) -> Path:
    return committed(folder / "checkpoints")[0][-1].path


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("warmup", [True, False])
@pytest.mark.parametrize("every", [1, 2])
def test_the_rule(tmp_path: Path, warmup: bool, every: int) -> None:
    record = Record()
    fit(tmp_path, EMA(decay=0.4, warmup=warmup, every_steps=every), record)
    expected = record.steps[0]
    decays = [min(0.4, (1 + n) / (10 + n)) if warmup else 0.4 for n in range(6 // every)]
    assert (decays[0] == 0.1) == warmup
    for decay, step in zip(decays, record.steps[every::every], strict=True):
        expected = {name: decay * tensor + (1 - decay) * step[name] for name, tensor in expected.items()}
    averages = read_model(last(tmp_path), group="ema")
    for name, tensor in expected.items():
        torch.testing.assert_close(averages[name], tensor, rtol=1e-5, atol=1e-7)
    assert not apart(averages, record.validated), "validated with something else"


def test_narrow_weights_have_averages_that_move(tmp_path: Path) -> None:
    """In bfloat16 an average with a high decay would never leave the start weights."""
    record = Record()
    task, _ = fit(tmp_path, EMA(decay=0.999, warmup=False), record, precision="bf16-true")
    averages = read_model(last(tmp_path), group="ema")
    assert {tensor.dtype for tensor in averages.values()} == {torch.float32}
    start = {name: tensor.float() for name, tensor in record.steps[0].items()}
    assert set(apart(averages, start)) == set(averages)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in averages.items()}
    assert not apart(narrow, record.validated)
    assert not apart(record.steps[-1], weights(task)), "the training weights did not come back"


def test_a_checkpoint_without_averages_starts_them_from_its_weights(tmp_path: Path) -> None:
    fit(tmp_path / "plain")
    record = Record()
    with pytest.warns(UserWarning, match="the checkpoint has no averaged weights: they start from its weights"):
        fit(tmp_path / "more", EMA(decay=0.4), record, steps=7, checkpoint=last(tmp_path / "plain"))
    start, end = record.steps
    assert not apart(start, read_model(last(tmp_path / "plain")))
    averages = read_model(last(tmp_path / "more"), group="ema")
    for name in start:
        torch.testing.assert_close(averages[name], 0.1 * start[name] + 0.9 * end[name], rtol=1e-5, atol=1e-7)


def test_averages_that_nobody_keeps_are_left_out(tmp_path: Path) -> None:
    fit(tmp_path / "averaged", EMA(decay=0.4))
    with pytest.warns(UserWarning, match="the tensors 'ema' of checkpoint .* are left out"):
        fit(tmp_path / "more", steps=7, checkpoint=last(tmp_path / "averaged"))
    with pytest.raises(CheckpointError, match="has no 'ema' tensors"):
        read_model(last(tmp_path / "more"), group="ema")


def test_evaluating_a_checkpoint_without_averages_is_told(tmp_path: Path) -> None:
    fit(tmp_path / "plain")
    record = Record()
    trainer = Trainer(run_dir=str(tmp_path / "validate"), progress_bar=False, callbacks=[EMA(), record])
    with pytest.warns(UserWarning, match="no averaged weights: its training weights are evaluated"):
        trainer.validate(
            MLPTask(OptimizerConfig()),
            MicroBatches(0, 1, micro_batches=1, steps=1),
            ckpt_path=str(last(tmp_path / "plain")),
            verbose=False,
        )
    assert not apart(record.validated, read_model(last(tmp_path / "plain")))


def test_weights_that_were_loaded_are_what_is_evaluated(tmp_path: Path) -> None:
    """After the best weights are restored, a test must not put the last averages in their place."""
    record = Record()
    fit(tmp_path / "first", EMA(decay=0.4))
    task, trainer = fit(tmp_path / "second", EMA(decay=0.9), record, steps=3)
    trainer.strategy.load_weights(last(tmp_path / "first"))  # type: ignore[attr-defined]
    best = read_model(last(tmp_path / "first"), group="ema")
    assert not apart(best, weights(task))
    trainer.validate(task, MicroBatches(0, 1, micro_batches=1, steps=1), verbose=False)
    assert not apart(best, record.validated)
    # A training that goes on starts its averages from them.
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(task, *(MicroBatches(0, 1, micro_batches=1, steps=steps) for steps in (4, 2)))
    averages = read_model(last(tmp_path / "second"), group="ema")
    for name in best:
        torch.testing.assert_close(averages[name], 0.1 * best[name] + 0.9 * record.steps[1][name])


def test_training_weights_come_back_from_inference_mode(tmp_path: Path) -> None:
    """In which Lightning evaluates, but for gloo, and which an exception leaves first."""
    ema, record = EMA(decay=0.9, warmup=False), Record()
    task, trainer = fit(tmp_path, ema, record)
    with torch.inference_mode():
        ema.on_validation_start(trainer, task)
        assert not apart(read_model(last(tmp_path), group="ema"), weights(task))
    ema.on_exception(trainer, task, KeyboardInterrupt())
    assert not apart(record.steps[-1], weights(task))
    sum(p.square().sum() for p in task.parameters()).backward()  # type: ignore[union-attr]
    torch.optim.SGD(task.parameters(), lr=0.1).step()
    assert apart(record.steps[-1], weights(task)), "the weights can no longer be trained"


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"decay": 1.0}, "ema.decay is 1.0"), ({"decay": math.nan}, "ema.decay is nan"), ({"every_steps": 0}, "is 0")],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        EMA(**settings)
    assert caught.value.hint


def test_one_average_is_enough(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than one EMA"):
        fit(tmp_path, EMA(), EMA(decay=0.5))


@pytest.mark.gpu
def test_on_a_gpu_the_averages_stay_there_and_are_evaluated_after_training(tmp_path: Path) -> None:
    """Lightning moves the module to the host when a training ends, and back for the test."""
    record = Record()
    task, trainer = fit(tmp_path, EMA(decay=0.4), record)
    assert {tensor.device.type for tensor in record.validated.values()} == {"cuda"}
    averages = read_model(last(tmp_path), group="ema")
    trainer.validate(task, MicroBatches(0, 1, micro_batches=1, steps=1), verbose=False)
    assert not apart(averages, {name: tensor.cpu() for name, tensor in record.validated.items()})
    end = {name: tensor.cpu() for name, tensor in record.steps[-1].items()}
    assert not apart(end, {name: tensor.cpu() for name, tensor in weights(task).items()})


@pytest.mark.gpu
@pytest.mark.parametrize("size", [1, 7, 1000, 65_537, 3_000_001])
def test_on_a_gpu_a_part_has_the_bits_of_the_whole(size: int) -> None:
    """However the weights are cut into shards."""
    generator = torch.Generator("cuda").manual_seed(0)
    average, weight = (torch.randn(size, device="cuda", generator=generator) for _ in range(2))
    cuts = [slice(0, size // 3), slice(size // 3, size - 1), slice(size - 1, size)]
    parts = [average[cut].clone() for cut in cuts]
    torch._foreach_lerp_([average], [weight], 0.0001)
    torch._foreach_lerp_(parts, [weight[cut].clone() for cut in cuts], 0.0001)
    assert torch.equal(torch.cat(parts), average)
