"""A report of one run, or a comparison of several, as one HTML page.

The page is self-contained: pictures are inside it, it runs no script and fetches nothing, so it can be mailed
or kept with the results. The pictures also lie beside it as PNG files. It is made from the run folder alone,
at any time: while the run goes on, after it ended, or after it was killed. Cost: a pass over the files
and some tenths of a second a picture; neither torch nor Lightning is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from disttrain.errors import ConfigError, DataError
from disttrain.files import make_folder, write_atomically
from disttrain.report.choose import pictures_of_run, pictures_of_runs
from disttrain.report.draw import draw
from disttrain.report.page import Figure, page_of_run, page_of_runs
from disttrain.report.read import Run, read_run

PAGE_NAME = "report.html"


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write ``report.html`` and its pictures.

    Args:
        run_dirs: the run folder, or several to compare.
        out: the folder to write to; ``<run_dir>/report`` by default. It has to be given for several.

    Returns:
        the path of the page.

    Raises:
        ConfigError: no run folder is given, or several without ``out``.
        DataError: a folder is no run folder, or ``out`` cannot be written to.
    """
    named: dict[Path, Path] = {}
    for folder in run_dirs:
        named.setdefault(folder.resolve(), folder)
    folders = list(named.values())
    if not folders:
        raise ConfigError("no run folder is given", mend="name at least one")
    if out is None and len(folders) > 1:
        raise ConfigError(f"{len(folders)} runs are compared, but not where to", mend="give the folder with --out")
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
            mend="give a folder that can be written to with --out",
        ) from None
    return path


def labels_of(runs: Sequence[Run]) -> list[str]:
    """What runs are called when they are compared: their names, or their folders where names are shared."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
