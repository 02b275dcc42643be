"""Show the result of a complete run: its table, its report, and whether its settings match the current ones.

Everything is read from the run's folder and record, so a complete run can be shown again without training.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from disttrain.callbacks.bad_sample_report import FOLDER
from disttrain.callbacks.records.settings_notes import is_effective
from disttrain.data.loader.transforms import HooksConfig
from disttrain.data.module import ShuffleConfig
from disttrain.errors import CheckpointError, ConfigError, DisttrainError
from disttrain.parallel.config import ParallelConfig
from disttrain.report import PAGE_NAME, write_report
from disttrain.run.folder import CHECKPOINTS, COMPLETED, best_checkpoint
from disttrain.system.reading import CONFIG_BYTES, parse_yaml, read_run, read_text
from disttrain.system.terminal import cell, redacted, tell

_NULL: Final[dict[str, Any]] = {
    "trainer.parallel": ParallelConfig(),
    "data.shuffle": ShuffleConfig(),
    "data.hooks": HooksConfig(),
}
"""Defaults of groups of settings that may be null."""
_OF_THE_USER: Final = ("model.", "data.fields.")
"""Under these prefixes a name that only one configuration has is a change; elsewhere it belongs to another version."""


def changed_settings(path: Path, text: str) -> list[str]:
    """Return dotted names of settings that differ between a ``config.yaml`` and a text; empty if unreadable."""
    try:
        content = parse_yaml(redacted(read_text(path, limit=CONFIG_BYTES)))  # older versions did not redact the file
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        tell(f"cannot check whether the run was trained with these settings: {path}: {why}")
        return []
    kept, given = _flat(content), _flat(parse_yaml(text))
    common = {name for name in {**kept, **given} if name.startswith(_OF_THE_USER) or (name in kept and name in given)}
    return sorted(name for name in common if kept.get(name) != given.get(name) and is_effective(name))


def _flat(content: Any, name: str = "") -> dict[str, Any]:
    """Flatten settings to dotted names; a group has its own entry too, so replacing it by a value is a change."""
    if content is None and name in _NULL:
        content = asdict(_NULL[name])
    found: dict[str, Any] = {name: "several"}
    if isinstance(content, list) and any(isinstance(one, dict) for one in content):
        found, content = {name: len(content)}, dict(enumerate(content))
    elif not isinstance(content, dict):
        return {name: content}
    for part, value in content.items():
        found |= _flat(value, f"{name}.{part}" if name else str(part))
    return found


def show_complete(run_dir: Path, config: str, *, tests: bool, report: bool = True) -> bool:
    """Show the result of a complete run and write its report if missing. Call on rank 0 only.

    Args:
        run_dir: the run's folder.
        config: the settings of this command, as YAML.
        tests: whether these settings have a test split, whose result a complete run must hold.
        report: whether to write a missing report.

    Returns:
        Whether the run is complete.

    Raises:
        ConfigError: the run is complete but was trained with other settings.
    """
    record = read_run(run_dir)
    if record.get("status") != COMPLETED or (tests and "result" not in record):
        return False
    if changed := changed_settings(run_dir / "config.yaml", config):
        raise ConfigError(
            f"the run in {run_dir} is complete and was trained with different settings: {', '.join(changed)}",
            hint="choose another folder: --trainer.run_dir FOLDER; or use --resume never to start over, which renames"
            f" the complete run; or --resume {run_dir} to continue from its end",
        )
    tell(f"the run in {run_dir} is already complete; to start over, use --resume never")
    show_result(run_dir, record, report=report and not (run_dir / "report" / PAGE_NAME).exists())
    return True


def show_result(run_dir: Path, record: dict[str, Any], *, rate: str = "", report: bool = True) -> None:
    """Print the table of a complete run.

    Args:
        run_dir: the run's folder.
        record: the content of ``run.json``.
        rate: samples per second, as text.
        report: whether to write the report now.
    """
    page = run_dir / "report" / PAGE_NAME
    where = _report(run_dir) if report else str(page) if page.exists() else f"none; run disttrain report {run_dir}"
    table = Table(title=cell(f"disttrain fit: {run_dir}"), show_header=False)
    for name, value in record.get("result", {}).items():
        table.add_row(cell(name), f"{value:.4f}")
    best = record.get("best", {})
    if best.get("value") is not None:
        table.add_row(cell(f"best {best.get('monitor')}"), f"{best['value']:.4f} at step {best.get('step')}")
    for attempt in record.get("attempts", [])[-1:]:
        table.add_row("steps", f"{attempt.get('to_step')}")
    if rate:
        table.add_row("samples/s", rate)
    for name, source in record.get("sources", {}).items():
        samples, epochs = source.get("samples") or 0, source.get("epochs") or 0.0
        table.add_row(cell(f"source {name!r}"), f"{samples:,} samples, {epochs:.2f} epochs")
    if record.get("bad_samples"):
        table.add_row("bad samples", cell(f"skipped {record['bad_samples']:,} times; see {run_dir / FOLDER}"))
    if record.get("filtered_samples"):
        table.add_row("filtered samples", f"dropped {record['filtered_samples']:,} times by data.hooks.transform")
    table.add_row("stopped", cell(record.get("stop_reason", "")))
    try:
        kept = best_checkpoint(run_dir, "best")
    except CheckpointError:  # the checkpoints were removed
        kept = run_dir / CHECKPOINTS
    table.add_row("checkpoint", cell(str(kept)))
    table.add_row("report", cell(where))
    Console().print(table)


def _report(run_dir: Path) -> str:
    """Write the report and return its path. Failures are only logged, because the run itself is complete."""
    try:
        return str(write_report([run_dir]))
    except Exception as error:
        message = error.what if isinstance(error, DisttrainError) else f"{type(error).__name__}: {error}"
        tell(f"the run is complete, but its report could not be written: {' '.join(message.split())}")
        return "not written"
