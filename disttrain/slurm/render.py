"""Render the script of a job from the template for its style. Pure: the same job gives the same text.

The templates are part of the package, so an installed disttrain has them; ``slurm/`` in the repository shows the
rendered scripts. A placeholder is ``{{name}}``; an unknown or unfilled one is a bug and raises.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from disttrain.errors import ConfigError
from disttrain.slurm.job import Job, slurm_time
from disttrain.slurm.site import Site
from disttrain.system.terminal import printable

INDEX: Final = "%a"
"""Placeholder for a job array's index in a setting's value, as in SLURM's file names."""
SUBMIT: Final = "submit"
"""Subfolder of a run folder with the script, the configuration and the state of the code at submission."""
_OPTION: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PLACE: Final = re.compile(r"\{\{(\w+)\}\}")
_PARTS: Final = frozenset(
    [
        *("if", "then", "else", "elif", "fi", "for", "while", "until", "do", "done", "case", "esac", "select", "in"),
        *("function", "{", "}", "(", ")", "!", "[[", "["),
    ]
)
"""Words that start part of a compound shell command, or a test that may be false."""
_OWN: Final = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "time", "partition"),
    *("account", "qos", "array", "requeue", "no-requeue", "open-mode", "signal", "output", "chdir"),
)


@dataclass(frozen=True)
class Script:
    """What a job runs.

    Attributes:
        run_dir: the run's folder, absolute; the runs of an array have subfolders, by index.
        folder: working folder of the job, absolute.
        python: the interpreter for the ranks.
        settings: settings that contain ``%a``, by name; all others are in the run folder's configuration.
        output: the job's output file, absolute, in SLURM's notation; None for a file in the run folder.
    """

    run_dir: Path
    folder: Path
    python: str
    settings: Mapping[str, str]
    output: str | None = None

    @property
    def config(self) -> Path:
        """The configuration file saved at submission."""
        return self.run_dir / SUBMIT / "config.yaml"

    def output_of(self, job: Job) -> str:
        """Return the job's output file, in SLURM's notation."""
        return self.output or str(self.run_dir / SUBMIT / ("%A_%a.log" if job.array else "%j.log"))


def render(job: Job, site: Site, script: Script) -> str:
    """Return the text of a job's script.

    Raises:
        ConfigError: an extra sbatch option is invalid or one that disttrain sets; a word contains a control character.
    """
    _check_words(job, site, script)
    run_dir = script.run_dir / INDEX if job.array else script.run_dir
    # In an array, the last task's job number equals that of the whole array.
    number = "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" if job.array else "$SLURM_JOB_ID"
    settings = {"config": str(script.config), "trainer.run_dir": '"$RUN_DIR"', **script.settings}
    arguments = [
        f"{shlex.quote(f'--{name}')}={value if name == 'trainer.run_dir' else _quote(value)}"
        for name, value in settings.items()
    ]
    requeue = _template("requeue.sh", {"max_requeues": str(job.max_requeues)}) if job.requeue else ""
    pass_on = _template("pass_on.sh", {}) if job.requeue and job.style == "torchrun" else ""
    places = {
        "title": f"{job.name}: {job.nodes} x {job.ranks_per_node} ranks",
        "directives": "\n".join(f"#SBATCH {line}" for line in _directives(job, site, script)),
        "run_dir": f"{_quote(str(run_dir))}" + (f"\nJOB={number}" if job.requeue else ""),
        "setup": "\n".join(_setup(job, site)),
        "srun": " \\\n    ".join(_srun(job, site, script)),
        "python": shlex.quote(script.python),
        "arguments": " ".join(arguments),
        "ranks_per_node": str(job.ranks_per_node),
        "finish": _template("finish.sh", {"pass_on": pass_on.rstrip("\n"), "requeue": requeue.rstrip("\n")}).rstrip(),
    }
    return _template(f"{job.style}.sbatch", places).rstrip("\n") + "\n"


def _directives(job: Job, site: Site, script: Script) -> list[str]:
    by_node = job.style == "torchrun"
    tasks = 1 if by_node else job.ranks_per_node
    limit = job.limit_seconds
    options: dict[str, object] = {
        "job-name": job.name,
        "account": site.account,
        "partition": job.partition or site.partition,
        "qos": site.qos,
        "nodes": job.nodes,
        "ntasks-per-node": tasks,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": _cpus_per_task(job, site),
        "mem": site.memory,
        "time": None if limit is None else slurm_time(limit),
        "array": job.array,
        "chdir": script.folder,
        "output": script.output_of(job),
        "open-mode": "append",
    }
    if job.requeue:
        # Signal the tasks if they are the ranks; with torchrun in between, signal the batch shell (B:).
        options["signal"] = f"{'B:' if by_node else ''}USR1@{job.signal_seconds}"
    lines = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    lines.append("--requeue" if job.requeue else "--no-requeue")
    for name, value in site.sbatch.items():
        if name in _OWN:
            raise ConfigError(
                f"sbatch option {name} is set by disttrain itself",
                hint=f"use disttrain's own setting; see `disttrain submit --help` for --{name}",
            )
        lines.append(f"--{name}" if value is None else f"--{name}={shlex.quote(value)}")
    return lines


def _check_words(job: Job, site: Site, script: Script) -> None:
    """Reject anything that could break out of a comment, directive or command, such as a line break.

    Quoting does not help in directives and comments. Lines of ``setup`` are shell code and left unchanged.
    """
    words: list[tuple[str, str | None]] = [
        ("--name", job.name),
        ("--partition", job.partition or site.partition),
        *((f"{name} of the site", getattr(site, name)) for name in ("account", "qos", "memory")),
        ("trainer.run_dir", str(script.run_dir)),
        ("the working folder", str(script.folder)),
        ("python", script.python),
        ("--output", script.output),
        *((f"--set {name!r}", f"{name}={value}") for name, value in script.settings.items()),
        *((f"sbatch option {name!r}", f"{name}={value}") for name, value in site.sbatch.items()),
        *(("modules", one) for one in site.modules),
        *((f"environment.{name}", value) for name, value in site.environment.items()),
    ]
    if site.container is not None:
        words += [
            ("container.image", site.container.image),
            *(("container.mounts", one) for one in site.container.mounts),
        ]
    for what, text in words:
        if text is not None and printable(text) != text:
            raise ConfigError(
                f"{what} is {text!r}, which contains a control character or bytes that are not UTF-8", hint="remove it"
            )
    for name in site.sbatch:
        if not _OPTION.fullmatch(name):
            raise ConfigError(f"{name!r} is not the name of an sbatch option", hint="write NAME or NAME=VALUE")


def _cpus_per_task(job: Job, site: Site) -> int | None:
    if site.cpus_per_task is None:
        return job.ranks_per_node if job.style == "torchrun" else None
    return site.cpus_per_task * (job.ranks_per_node if job.style == "torchrun" else 1)


def _setup(job: Job, site: Site) -> list[str]:
    lines = _checked(
        [*([f"module load {' '.join(map(shlex.quote, site.modules))}"] if site.modules else []), *site.setup]
    )
    lines += [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    lines.append(f"export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{site.cpus_per_task or 1}}}")
    if (cpus := _cpus_per_task(job, site)) is not None:
        lines.append(f"export SRUN_CPUS_PER_TASK={cpus}  # since SLURM 22.05, srun does not inherit it from sbatch")
    if job.requeue:
        lines.append(
            f"export DISTTRAIN_REQUEUE={job.max_requeues}  # limit of requeues; a rank that is stopped requeues the job"
        )
    return lines


def _checked(lines: Sequence[str]) -> list[str]:
    """Make each of the site's lines end the job if it fails; parts of a compound command stay unchanged."""
    if not lines:
        return []
    try:
        whole = all(shlex.split(line) is not None for line in lines) and not any("<<" in line for line in lines)
    except ValueError:  # a quoted string continues on the next line
        whole = False
    checked = [f"{line} || failed {shlex.quote(line)}" if whole and _is_simple(line) else line for line in lines]
    says = 'echo "disttrain: $1 failed; no rank was started" >&2'
    return [f"failed() {{ {says}; exit 1; }}", *checked] if checked != list(lines) else checked


def _is_simple(line: str) -> bool:
    """Return whether a line of shell is one command whose failure nothing else handles."""
    first = line.split(maxsplit=1)[:1]
    return (
        bool(first)
        and "\n" not in line
        and first[0] not in _PARTS
        and not re.search(r"&&|\|\||;|#|^[^()]*\)|[\\&|{(]\s*$", line)
    )


def _srun(job: Job, site: Site, script: Script) -> list[str]:
    """Return srun's options and the container command that wraps the ranks."""
    # Block distribution makes ranks consecutive per node; without binding, local rank i can use GPU i of the node.
    words = ["--kill-on-bad-exit=1 --distribution=block" + " --gpu-bind=none" * (job.gpus_per_node > 0)]
    if site.container is None:
        return words
    image, mounts = shlex.quote(site.container.image), [str(script.folder), *site.container.mounts]
    if not script.run_dir.is_relative_to(script.folder):
        mounts.append(str(script.run_dir))
    joined = shlex.quote(",".join(mounts))
    if site.container.runtime == "pyxis":
        both = shlex.quote(",".join(one if ":" in one else f"{one}:{one}" for one in mounts))
        return [*words, f"--container-image={image} --container-mounts={both}"]
    return [*words, f"apptainer exec --nv --bind {joined} --pwd {shlex.quote(str(script.folder))} {image}"]


def _quote(text: str) -> str:
    """Quote a shell word, replacing ``%a`` by the array index."""
    parts: Sequence[str] = text.split(INDEX)
    return '"$SLURM_ARRAY_TASK_ID"'.join(shlex.quote(part) if part else "" for part in parts) or "''"


def _template(name: str, places: Mapping[str, str]) -> str:
    text = resources.files("disttrain.slurm").joinpath("templates", name).read_text()
    return _PLACE.sub(lambda match: places[match[1]], text)
