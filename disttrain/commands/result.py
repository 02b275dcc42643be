"""What a run has come to: its table, its report, and whether a complete run is the one that was asked for.

Everything is read from the run's folder and record, so a complete run shows the same again without training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from disttrain.callbacks.bad_samples import FOLDER
from disttrain.errors import CheckpointError, ConfigError, DisttrainError
from disttrain.reading import parse_yaml, read_yaml
from disttrain.report import PAGE_NAME, write_report
from disttrain.runs import CHECKPOINTS, COMPLETED, best_checkpoint, read_run
from disttrain.terminal import cell, tell

_OF_THE_LAUNCH: Final = (
    *("trainer.run_dir", "trainer.progress_bar", "trainer.accelerator", "trainer.hang_timeout", "trainer.stop_after"),
    *("checkpoint.save", "checkpoint.verify", "checkpoint.on_save_error", "checkpoint.mirror."),
    *("trainer.parallel.", "resume", "report", "data.num_workers", "data.micro_batch_size"),
)
"""Settings, and groups of them, on which the result of a run does not depend."""


def changed_settings(path: Path, text: str) -> list[str]:
    """Dotted names of settings that differ between a run's ``config.yaml`` and another text; none if unreadable."""
    try:
        kept, given = (_flat(content) for content in (read_yaml(path), parse_yaml(text)))
    except (OSError, ValueError):
        return []
    names = [name for name in {**kept, **given} if kept.get(name) != given.get(name)]
    return [name for name in names if not f"{name}.".startswith(tuple(f"{own.rstrip('.')}." for own in _OF_THE_LAUNCH))]


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        return {prefix.removesuffix("."): content}
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name}.")
    return found


def show_complete(run_dir: Path, config: str, *, tests: bool, report: bool = True) -> bool:
    """Show the result of a run that has come to its end, and make the report that it lacks. Rank 0 only.

    Args:
        run_dir: the run's folder.
        config: the settings of this command, as YAML.
        tests: whether these have a test split, whose result a complete run holds.
        report: whether to make one that is missing.

    Returns:
        whether the run is complete.

    Raises:
        ConfigError: it is, but was trained with other settings.
    """
    record = read_run(run_dir)
    if record.get("status") != COMPLETED or (tests and "result" not in record):
        return False
    if changed := changed_settings(run_dir / "config.yaml", config):
        raise ConfigError(
            f"the run in {run_dir} is complete, and was trained with other settings: {', '.join(changed)}",
            mend="name another folder: --trainer.run_dir FOLDER; or --resume never to train anew, which renames the"
            f" complete run; or --resume {run_dir} to train on from its end",
        )
    tell(f"the run in {run_dir} is complete, nothing is left to do; --resume never trains anew")
    show_result(run_dir, record, report=report and not (run_dir / "report" / PAGE_NAME).exists())
    return True


def show_result(run_dir: Path, record: dict[str, Any], *, rate: str = "", report: bool = True) -> None:
    """Print the table of a complete run.

    Args:
        run_dir: the run's folder.
        record: what ``run.json`` holds.
        rate: samples per second, in words.
        report: whether to write the report now.
    """
    page = run_dir / "report" / PAGE_NAME
    where = _report(run_dir) if report else str(page) if page.exists() else f"none; disttrain report {run_dir}"
    table = Table(title=cell(f"disttrain fit: {run_dir}"), show_header=False)
    for name, value in record.get("result", {}).items():
        table.add_row(cell(name), f"{float(value):.4f}")
    best = record.get("best")
    if best:
        table.add_row(cell(f"best {best['monitor']}"), f"{float(best['value']):.4f} at step {best['step']}")
    table.add_row("steps", f"{record['attempts'][-1]['to_step']}")
    if rate:
        table.add_row("samples/s", rate)
    for name, source in record.get("sources", {}).items():
        table.add_row(cell(f"source {name!r}"), f"{source['samples']:,} samples, {source['epochs']:.2f} epochs")
    if record.get("bad_samples"):
        table.add_row("bad samples", cell(f"skipped {record['bad_samples']:,} times; see {run_dir / FOLDER}"))
    if record.get("filtered_samples"):
        table.add_row("filtered samples", f"left out {record['filtered_samples']:,} times by data.hooks.transform")
    table.add_row("stopped", cell(record.get("stop_reason", "")))
    try:
        kept = best_checkpoint(run_dir, "best")
    except CheckpointError:  # somebody has cleared them
        kept = run_dir / CHECKPOINTS
    table.add_row("checkpoint", cell(str(kept)))
    table.add_row("report", cell(where))
    Console().print(table)


def _report(run_dir: Path) -> str:
    """Where the report is; the run is complete, so what goes wrong with its report is only told."""
    try:
        return str(write_report([run_dir]))
    except Exception as error:
        told = error.what if isinstance(error, DisttrainError) else f"{type(error).__name__}: {error}"
        tell(f"the run is complete, its report could not be written: {' '.join(told.split())}")
        return "not written"
