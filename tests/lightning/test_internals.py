"""What disttrain asks of Lightning's protected parts: against another Lightning, these fail first and say what moved.

One rank in this process: three epochs of five micro batches, two of which make a step, so that the last step of an
epoch has one; a validation every second step.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from disttrain.lightning import internals
from disttrain.lightning.bases import TrainerBase
from disttrain.lightning.callback import Callback
from disttrain.lightning.loops import FitLoop, StepLoop, use_own_loops
from disttrain.lightning.position import (
    Progress,
    epochs_done,
    loop_state,
    micro_batches_into_epoch,
    progress_of,
    steps_into_epoch,
)

MICRO_BATCHES, ACCUMULATION, EPOCHS = 5, 2, 3
STEPS = 3  # an epoch

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on loaders and loggers


class Line(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Watch(Callback):
    """Notes what the functions say at each hook."""

    def __init__(self) -> None:
        self.begins: list[bool] = []
        self.ends: list[bool] = []
        self.ends_epoch: list[bool] = []
        self.ends_training: list[bool] = []
        self.position: list[tuple[int, int, int]] = []
        self.events: list[str] = []
        self.progress: list[Progress] = []
        self.saved: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.begins.append(internals.begins_step(trainer))
        self.ends.append(internals.ends_step(trainer))
        self.position.append((epochs_done(trainer), steps_into_epoch(trainer), micro_batches_into_epoch(trainer)))

    def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert internals.ends_step(trainer)
        self.ends_epoch.append(internals.ends_epoch(trainer))
        self.ends_training.append(internals.ends_training(trainer))
        self.progress.append(progress_of(trainer))
        self.events.append("step, and a validation follows" if internals.validation_follows(trainer) else "step")
        if trainer.global_step == 4:
            self.saved = internals.checkpoint_of(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.events.append("validation")


def trainer_of(folder: Path, *callbacks: Callback, kind: type[pl.Trainer] = pl.Trainer, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "accumulate_grad_batches": ACCUMULATION,
        "max_epochs": EPOCHS,
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        **options,
    }
    trainer = kind(callbacks=list(callbacks), **settings)
    use_own_loops(trainer, validate_every_steps=2)
    internals.without_signal_handlers(trainer)
    return trainer


def loader(batches: int = MICRO_BATCHES) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(batches * 2, 2, generator=torch.Generator().manual_seed(0))), 2)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[pl.Trainer, Line, Watch]:
    watch, module = Watch(), Line()
    trainer = trainer_of(tmp_path_factory.mktemp("run"), watch)
    trainer.fit(module, loader(), loader(1))
    return trainer, module, watch


def test_steps_begin_and_end(run: tuple[pl.Trainer, Line, Watch]) -> None:
    watch = run[2]
    assert watch.begins == [True, False, True, False, True] * EPOCHS, "epoch_loop.batch_idx has another meaning"
    assert watch.ends == [False, True, False, True, True] * EPOCHS, (
        "epoch_loop._should_accumulate() does not say any more that the last micro batch of an epoch ends a step"
    )


def test_epochs_and_training_end(run: tuple[pl.Trainer, Line, Watch]) -> None:
    watch = run[2]
    last = [False, False, True] * EPOCHS
    assert watch.ends_epoch == last, "batch_progress or num_training_batches has another meaning"
    assert watch.ends_training == last, "the epoch ends elsewhere"


def test_the_last_step_of_a_limited_run_ends_the_training(tmp_path: Path) -> None:
    watch = Watch()
    trainer_of(tmp_path, watch, max_epochs=None, max_steps=2).fit(Line(), loader())
    assert watch.ends_training == [False, True], "max_steps or global_step has another meaning"


def test_a_validation_follows_where_it_is_said_to(run: tuple[pl.Trainer, Line, Watch]) -> None:
    expected = []
    for step in range(1, STEPS * EPOCHS + 1):
        expected += ["step, and a validation follows", "validation"] if step % 2 == 0 else ["step"]
    assert run[2].events == expected, "_TrainingEpochLoop does not ask _should_check_val_fx(data_fetcher) any more"


def test_a_validation_follows_the_last_step_of_an_epoch(tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_of(tmp_path, watch)
    use_own_loops(trainer)  # which say nothing of validations, so that Lightning decides
    trainer.fit(Line(), loader(), loader(1))
    epoch = ["step", "step", "step, and a validation follows", "validation"]
    assert watch.events == epoch * EPOCHS, "_should_check_val_fx(data_fetcher) decides otherwise"


def test_a_run_that_is_told_to_stop_ends_its_step_and_validates(tmp_path: Path) -> None:
    class Stop(Watch):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            super().on_train_batch_start(trainer, *args)
            trainer.should_stop = True

    stop = Stop()
    trainer_of(tmp_path, stop).fit(Line(), loader(), loader(1))
    assert stop.begins == [True, False], "a step is cut short"
    assert stop.events == ["step, and a validation follows", "validation"], "fit_loop._can_stop_early says otherwise"


def test_the_position(run: tuple[pl.Trainer, Line, Watch]) -> None:
    expected = [
        (epoch, micro // ACCUMULATION, micro) for epoch in range(EPOCHS) for micro in range(1, MICRO_BATCHES + 1)
    ]
    assert run[2].position == expected, "epoch_progress.current or batch_progress.current counts otherwise"
    steps = [Progress(e, s, e * STEPS + s) for e in range(EPOCHS) for s in range(1, STEPS + 1)]
    assert run[2].progress == steps, "epoch_progress.current counts otherwise where a step ends"


def test_the_counters_for_a_position_are_those_that_lightning_has_there(run: tuple[pl.Trainer, Line, Watch]) -> None:
    """Of the whole state, that of the fit loop alone: a validation that follows has counters of its own."""
    trainer, _, watch = run
    theirs, ours = watch.saved["loops"]["fit_loop"], loop_state(trainer, watch.progress[3])
    assert theirs.keys() == ours.keys(), "the fit loop keeps other counters"
    assert theirs["epoch_progress"] == ours["epoch_progress"]
    for name, state in ours.items():
        assert type(theirs[name]) is type(state), f"{name} is kept in another form"
        assert theirs[name].keys() == state.keys(), f"{name} has other counters"
    micro = theirs["epoch_loop.batch_progress"]["current"]
    assert micro == {**ours["epoch_loop.batch_progress"]["current"]}, "batch_progress counts otherwise"


def test_a_run_goes_on_from_counters_made_for_a_position(tmp_path: Path) -> None:
    watch = Watch()
    trainer = trainer_of(tmp_path, watch)
    trainer.fit_loop.load_state_dict(loop_state(trainer, Progress(epoch=1, step=1, global_step=4)))
    assert trainer.global_step == 4, "optim_progress has other counters"
    trainer.fit(Line(), loader())
    assert [(p.epoch, p.step) for p in watch.progress] == [(1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]


def test_a_checkpoint_is_gathered(run: tuple[pl.Trainer, Line, Watch]) -> None:
    names = {"epoch", "global_step", "state_dict", "loops", "optimizer_states", "callbacks"}
    assert names <= run[2].saved.keys(), "_checkpoint_connector.dump_checkpoint() returns something else"


def test_a_validation_before_the_first_step_leaves_no_trace(tmp_path: Path) -> None:
    class Early(Watch):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            internals.run_validation(trainer)
            assert trainer.training, "val_loop.run() leaves the trainer in another state"
            self.events.append("start")

    early, usual = Early(), Watch()
    modules = [Line(), Line()]
    modules[1].load_state_dict(modules[0].state_dict())
    for module, watch in zip(modules, (early, usual), strict=True):
        trainer_of(tmp_path, watch).fit(module, loader(), loader(1))
    assert early.events[:2] == ["validation", "start"], "val_loop.run() does not validate"
    assert early.events[2:] == usual.events, "a validation before the first step changes those that follow"
    assert torch.equal(modules[0].layer.weight, modules[1].layer.weight)


def test_a_fit_ends_midway(tmp_path: Path) -> None:
    class Over(Exception):  # noqa: N818
        pass

    class Ends(Callback):
        def __init__(self) -> None:
            self.events: list[str] = []

        def on_step_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            raise Over

        def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
            self.events.append("teardown")

        def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
            self.events.append("exception")

    class Caught(TrainerBase):
        def around_run(self, run: Callable[[], Any]) -> Any:
            try:
                return run()
            except Over:
                internals.end_midway(self)

    ends = Ends()
    trainer = trainer_of(tmp_path, ends, kind=Caught)
    trainer.fit(Line(), loader())
    assert ends.events == ["teardown"], "Trainer._run or _call_teardown_hook() does something else"
    assert (trainer.state.finished, trainer.state.stage) == (True, None), "a fit that is done leaves another state"


def test_no_signal_handler_is_set(tmp_path: Path) -> None:
    found: list[Any] = []

    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            found.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    trainer = trainer_of(tmp_path, Look(), max_epochs=1)
    trainer.fit(Line(), loader())
    assert found == [before], "Lightning's signal connector sets handlers in another way"
    assert signal.getsignal(signal.SIGTERM) is before
    assert trainer.received_sigterm is False


def test_the_loops_are_used(run: tuple[pl.Trainer, Line, Watch]) -> None:
    trainer = run[0]
    assert type(trainer.fit_loop) is FitLoop
    assert type(trainer.fit_loop.epoch_loop) is StepLoop
    assert (trainer.max_epochs, trainer.max_steps, trainer.min_steps) == (EPOCHS, -1, None), "a limit is kept elsewhere"
    assert trainer.global_step == EPOCHS * STEPS, "trainer.global_step is not that of fit_loop.epoch_loop"


def test_nothing_is_asked_of_the_ranks_before_a_batch(run: tuple[pl.Trainer, Line, Watch]) -> None:
    name = "_broadcast_sigterm_tensor"
    assert name in vars(StepLoop)
    assert hasattr(StepLoop.__mro__[1], name), f"Lightning has renamed {name}, which costs a collective a step"


def test_the_train_loaders(tmp_path: Path) -> None:
    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            assert internals.train_loaders(trainer).flattened == [given], "fit_loop._combined_loader holds others"

    given, trainer = loader(), trainer_of(tmp_path, Look(), max_epochs=1)
    assert internals.train_loaders(trainer) is None
    trainer.fit(Line(), given)


def test_a_module_says_the_device_that_was_set() -> None:
    module = Line()
    internals.set_device(module, torch.device("meta"))
    assert module.device == torch.device("meta"), "LightningModule.device does not come from _device any more"
    assert module.layer.weight.device == torch.device("cpu")


def test_the_state_of_optimizers_is_moved() -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    internals.move_optimizers([optimizer], torch.device("meta"))
    state = optimizer.state[layer.weight]
    assert state["exp_avg"].device.type == "meta"
    assert state["step"].device.type == "cpu", "the count of steps is moved, too, which fused kernels refuse"
