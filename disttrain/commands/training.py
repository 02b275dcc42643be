"""``disttrain fit | validate | test | predict`` on LightningCLI: typed YAML, dotted overrides, ``--help``.

``fit`` resumes an interrupted run, trains, restores the best weights, tests if there is a test split, prints the result
as a table and writes the report. All ranks parse the same configuration; only rank 0 prints.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from argparse import SUPPRESS
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table
from torch import nn

from disttrain.callbacks.checkpointing.callback import Checkpointing
from disttrain.callbacks.early_stopping import EarlyStopping
from disttrain.callbacks.predictions.callback import PredictionWriter
from disttrain.callbacks.predictions.files import SAMPLES_PER_FILE, Output
from disttrain.callbacks.predictions.formats import FormatName
from disttrain.callbacks.update_guard.callback import UpdateGuard
from disttrain.checkpoint.format.export import initialize
from disttrain.commands.result import show_complete, show_result
from disttrain.commands.settings.parse_errors import explain, own_error
from disttrain.commands.settings.read_config import parse
from disttrain.data.module import ShardedDataModule
from disttrain.data.remote.ranges import is_remote, shown
from disttrain.distributed.exit_codes import ends_within
from disttrain.distributed.synchronize_errors import raise_together
from disttrain.distributed.world import detect_world
from disttrain.errors import ConfigError, DisttrainError, passed_through_users_code
from disttrain.lightning.cli import CLIBase
from disttrain.run.folder import CHECKPOINTS, Start, best_checkpoint, finished_by_this_job
from disttrain.strategies.build import strategy_of
from disttrain.system.files import make_folder, place, resolve_path, write_atomically
from disttrain.system.terminal import cell, redacted, tell
from disttrain.trainer import Trainer
from disttrain.version import __version__

_EVALUATIONS = ("validate", "test", "predict")
_OF_FIT = ("resume", "initialize_from", "initialize_strict", "report")
"""Settings that only ``fit`` uses. A run's own configuration contains them, so evaluations accept and ignore them."""


class _Parser(LightningArgumentParser):
    """A parser that raises disttrain's errors: one message, with the nearest key."""

    def add_class_arguments(self, theclass: Any, nested_key: str | None = None, **kwargs: Any) -> list[str]:
        """Add a class's settings; paths in the data settings are shards, never nested configuration files.

        With ``sub_configs``, jsonargparse would parse a shard as the value of any setting that accepts a list.
        """
        if nested_key == "data":
            kwargs["sub_configs"] = False
        added: list[str] = super().add_class_arguments(theclass, nested_key, **kwargs)
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise explain(str(message), _settings(self)) from None


class TrainingCLI(CLIBase):
    """Parses the configuration and runs the subcommand."""

    trainer: Trainer
    datamodule: ShardedDataModule

    def __init__(self, args: list[str]) -> None:
        header = [f"disttrain=={__version__}"]
        self._chosen = args[0]
        super().__init__(
            pl.LightningModule,
            ShardedDataModule,
            subclass_mode_model=True,
            trainer_class=Trainer,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_class=_Parser,
            parser_kwargs={"prog": "disttrain", **{name: {"dump_header": header} for name in self.subcommands()}},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return subcommands and the Trainer arguments to hide, which the data module and --resume replace."""
        loaders = {"model", "datamodule", "ckpt_path", "weights_only"}
        return {
            "fit": loaders | {"train_dataloaders", "val_dataloaders", "resume"},
            "validate": loaders | {"dataloaders", "verbose"},
            "test": loaders | {"dataloaders", "verbose"},
            "predict": loaders | {"dataloaders", "return_predictions"},
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add early stopping, checkpoints, the update guard, and one seed for order, weights and dropout."""
        parser.add_lightning_class_args(EarlyStopping, "early_stopping")
        parser.add_lightning_class_args(Checkpointing, "checkpoint")
        parser.add_lightning_class_args(UpdateGuard, "guard")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "trainer.seed", compute_fn=int)

    def fills(self, subcommand: str) -> bool:
        """Return whether this is the chosen subcommand."""
        return subcommand == self._chosen

    def add_subcommand_arguments(self, parser: LightningArgumentParser, subcommand: str) -> None:
        """Add arguments for where to start from and what to write."""
        if subcommand == "fit":
            parser.add_argument(
                "--resume",
                default="auto",
                help="auto: resume the interrupted run in this run folder; never: start over; or a checkpoint's path",
            )
            parser.add_argument(
                "--initialize_from",
                type=str | None,
                default=None,
                help="weights that a new run starts from: a .safetensors file, a .pt state_dict, a checkpoint, or a run"
                " folder (its best checkpoint)",
            )
            parser.add_argument(
                "--initialize_strict",
                type=bool,
                default=True,
                help="whether these must match the model's names and shapes; if false, those that match are used",
            )
            parser.add_argument(
                "--report",
                type=bool,
                default=True,
                help="whether to write the report at the end; `disttrain report RUN_FOLDER` writes it at any time",
            )
        else:
            parser.add_argument(
                "--checkpoint_path",
                default="best",
                help="weights to evaluate: best, last, or the path of a checkpoint or run folder",
            )
            for name in _OF_FIT:
                parser.add_argument(f"--{name}", help=SUPPRESS)
        if subcommand == "predict":
            _add_output_arguments(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, ignoring ``sys.argv``."""
        flags = {str(arg).removeprefix("--").partition("=")[0] for arg in args if str(arg).startswith("--")}
        for name in _OF_FIT:
            if name in flags and args[0] in _EVALUATIONS:
                raise ConfigError(
                    f"--{name} applies to fit, not to {args[0]}", hint="choose the weights with --checkpoint_path PATH"
                )
        self.config = parse(parser, args)

    def instantiate_classes(self) -> None:
        """Build trainer, model and data; report settings that they reject as disttrain's errors."""
        parallel = self.given("trainer.parallel")
        if parallel is not None and parallel.meta_init:
            with warnings.catch_warnings():
                # jsonargparse 4.50 deprecates this in favor of an argument to a call inside Lightning; older versions
                # have only this.
                warnings.simplefilter("ignore")
                self.parser.add_instantiator(_on_meta, nn.Module, subclasses=True)
        try:
            super().instantiate_classes()
        except ValueError as error:
            if own_error(error) is None and passed_through_users_code(error):
                raise  # raised by user code, such as the module's __init__
            raise own_error(error) or explain(str(error), []) from None
        assert self.subcommand is not None
        config = self.config[self.subcommand]
        self.trainer.settings = vars(config.as_flat()) if isinstance(config, Namespace) else {}

    def fit(self) -> None:
        """Train, then test and report."""
        trainer, data = self.trainer, self.datamodule
        trainer.connect()
        with raise_together():
            complete = trainer.is_global_zero and self._is_complete()
        if trainer.strategy.broadcast(complete):
            return
        trainer.record.awaits_result = True
        start = trainer.find_start(self.given("resume"))
        if start.checkpoint is None:  # a resumed run already has weights
            try:
                self._initialize(start)
            except DisttrainError as error:
                trainer.record.on_exception(trainer, self.model, error)
                raise
        with raise_together():
            if trainer.is_global_zero:
                _say(start.notes)
                _write_config(trainer.run_dir, self._config_text)
        trainer.fit(self.model, datamodule=data, ckpt_path=str(start.checkpoint) if start.checkpoint else None)
        result: dict[str, float] = {}
        if data.specs["test"]:
            trainer.test(self.model, datamodule=data, verbose=False)
            result = _metrics(trainer)
        if trainer.is_global_zero:
            trainer.record.add_result(result)
            log = trainer.step_log
            ranks = "1 rank" if trainer.world_size == 1 else f"{trainer.world_size} ranks"
            rate = f"{log.samples / log.seconds:,.0f} on {ranks}" if log.samples and log.seconds > 0 else ""
            report = self.given("report")
            show_result(trainer.run_dir, trainer.record.record, rate=rate, report=report)
            trainer.record.note_output()

    def _is_complete(self) -> bool:
        """Return whether the run is complete and not to be trained again; if so, show its result. Rank 0 only."""
        run_dir = self.trainer.run_dir
        again = self.given("resume") == "auto" or finished_by_this_job(run_dir)
        text, report = redacted(self._config_text), self.given("report")
        return again and show_complete(run_dir, text, tests=bool(self.datamodule.specs["test"]), report=report)

    def _initialize(self, start: Start) -> None:
        """Load the weights given by ``--initialize_from``, if any."""
        source, strict = (self.given(name) for name in ("initialize_from", "initialize_strict"))
        if source is None:
            return
        with raise_together():
            if is_remote(source):
                raise ConfigError(
                    f"--initialize_from {shown(source)} is a URL, not a path",
                    hint="run `disttrain checkpoints export URL weights.safetensors`, and give that file",
                )
            path = resolve_path(source, name="--initialize_from")
            if start.aside is not None and path.is_relative_to(self.trainer.run_dir):
                path = start.aside / path.relative_to(self.trainer.run_dir)
            if (path / CHECKPOINTS).is_dir():  # a run folder
                path = best_checkpoint(path, "best", tell=start.notes.append)
            taken = initialize(self.model, path, strict=strict)
            start.notes.append(f"starting from the weights of {path}: {taken}")

    def validate(self) -> None:
        """Evaluate on the validation split."""
        self._evaluate("validate")

    def test(self) -> None:
        """Evaluate on the test split."""
        self._evaluate("test")

    def predict(self) -> None:
        """Write one result per sample, in order."""
        names = ("output", "format", "samples_per_file", "overwrite")
        path, format, samples_per_file, overwrite = (self.given(name) for name in names)
        output = Output.choose(
            self.trainer.run_dir, path=path, format=format, samples_per_file=samples_per_file, overwrite=overwrite
        )
        writer = PredictionWriter(output)
        self.trainer.connect()
        with raise_together():
            if self.trainer.is_global_zero:
                output.check()
        self.trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        self.trainer.predict(
            self.model, datamodule=self.datamodule, ckpt_path=self._checkpoint(), return_predictions=False
        )
        if self.trainer.is_global_zero:
            averaged = strategy_of(self.trainer).evaluated_group
            _say([*writer.notes, *(["predictions were made with the averaged weights"] if averaged else [])])

    def _evaluate(self, which: str) -> None:
        run = self.trainer.validate if which == "validate" else self.trainer.test
        checkpoint = self._checkpoint()
        run(self.model, datamodule=self.datamodule, ckpt_path=checkpoint, verbose=False)
        if self.trainer.is_global_zero:
            averaged = ", averaged weights" if strategy_of(self.trainer).evaluated_group else ""
            table = Table(title=cell(f"disttrain {which}: {checkpoint}{averaged}"))
            table.add_column("metric")
            table.add_column("value", justify="right")
            for name, value in _metrics(self.trainer).items():
                table.add_row(cell(name), f"{value:.6f}")
            Console().print(table)

    def _checkpoint(self) -> str:
        self.trainer.connect()
        notes: list[str] = []
        which = place(self.given("checkpoint_path"), name="--checkpoint_path")
        path = best_checkpoint(self.trainer.run_dir, which, tell=notes.append)
        if self.trainer.is_global_zero:
            _say(notes)
        return str(path.absolute())

    @cached_property
    def _config_text(self) -> str:
        """The full configuration of this run, in a form that ``--config`` accepts."""
        assert self.subcommand is not None
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        return str(parser.dump(config.clone() if isinstance(config, Namespace) else config, skip_none=False))


def run(argv: list[str]) -> int:
    """Run a training subcommand; ``argv`` starts with its name."""
    _quieten()
    # Like `python -m`, so that a configuration can name classes from the working directory.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        cli = TrainingCLI(argv)
        del cli
    finally:
        if dist.is_available() and dist.is_initialized():
            with ends_within(sys.exception() if dist.get_world_size() > 1 else None):
                dist.destroy_process_group()
    return 0


def _on_meta(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    """Build a module on the meta device; the strategy allocates and initializes it later."""
    with torch.device("meta"):
        return kind(*args, **kwargs)


def _add_output_arguments(parser: LightningArgumentParser) -> None:
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="where to write: one file if it ends in .jsonl, .parquet or .tar, else a folder of files; by default"
        " RUN_DIR/predictions.jsonl, or the folder RUN_DIR/predictions for another --format",
    )
    parser.add_argument("--format", type=FormatName | None, default=None, help="file format: jsonl, parquet or tar")
    parser.add_argument(
        "--samples_per_file",
        type=int | None,
        default=None,
        help=f"samples per file in a folder; {SAMPLES_PER_FILE} by default",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace existing predictions")


def _write_config(run_dir: Path, text: str) -> None:
    try:
        make_folder(run_dir)
        write_atomically(run_dir / "config.yaml", redacted(text))
    except OSError as error:
        raise ConfigError(
            f"run folder {run_dir} cannot be written: {error.strerror}",
            hint="set trainer.run_dir to a writable folder",
        ) from None


def _metrics(trainer: Trainer) -> dict[str, float]:
    """Return the metrics that the last evaluation logged, by name."""
    return {str(name): float(value) for name, value in sorted(trainer.callback_metrics.items())}


def _settings(parser: LightningArgumentParser) -> set[str]:
    """Return the dotted names of all settings of a parser and its subcommands."""
    found = {action.dest for action in parser._actions}
    for action in parser._actions:
        for inner in getattr(action, "_name_parser_map", {}).values():
            found |= _settings(inner)
    return found - {"help", "config", "print_config", "print_shtab", "subcommand"}


def _say(lines: list[str]) -> None:
    for line in lines:
        tell(line)


def _quieten() -> None:
    """Suppress Lightning's messages that are irrelevant to a disttrain run."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if detect_world().rank != 0:
        warnings.filterwarnings("ignore")
