"""Report one run, or compare several, on one HTML page.

The page is self-contained: plots are embedded, there are no scripts, and nothing is fetched, so it can be mailed or
archived with the results. The plots are also written next to it as PNG files. The page needs only the run folder and
can be written at any time: while the run trains, after it ended, or after it was killed. Cost: one pass over the files
and a few tenths of a second per plot. Imports neither torch nor Lightning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disttrain.errors import ConfigError, DataError
from disttrain.report.choose import pictures_of_run, pictures_of_runs
from disttrain.report.draw import draw
from disttrain.report.page import Figure, page_of_run, page_of_runs
from disttrain.report.read import Run, read_run
from disttrain.system.files import make_folder, write_atomically

PAGE_NAME = "report.html"


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write ``report.html`` and its plots.

    Args:
        run_dirs: the run folder, or several to compare.
        out: the folder to write to; ``<run_dir>/report`` by default. Required for several runs.

    Returns:
        The path of the page.

    Raises:
        ConfigError: no run folder is given, or several without ``out``.
        DataError: a folder is not a run folder, or ``out`` cannot be written to.
    """
    named: dict[Path, Path] = {}
    for folder in run_dirs:
        named.setdefault(folder.resolve(), folder)
    folders = list(named.values())
    if not folders:
        raise ConfigError("no run folder is given", hint="give at least one")
    if out is None and len(folders) > 1:
        raise ConfigError(f"a comparison of {len(folders)} runs needs an output folder", hint="give one with --out")
    runs = [read_run(folder) for folder in folders]
    out = out or folders[0] / "report"
    labels = labels_of(runs)
    pictures = pictures_of_run(runs[0]) if len(runs) == 1 else pictures_of_runs(runs, labels)
    figures = [Figure(picture, draw(picture)) for picture in pictures]
    page = page_of_run(runs[0], figures) if len(runs) == 1 else page_of_runs(runs, labels, figures)
    path = out / PAGE_NAME
    try:
        make_folder(out)
        for figure in figures:
            write_atomically(out / f"{figure.picture.name}.png", figure.png)
        write_atomically(path, page.encode("utf-8", errors="xmlcharrefreplace"))
    except OSError as error:
        raise DataError(
            f"the report cannot be written to {out}: {error.strerror}",
            hint="give a writable folder with --out",
        ) from None
    return path


def labels_of(runs: Sequence[Run]) -> list[str]:
    """Return labels for compared runs: their names, or their folders if names are not unique."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
