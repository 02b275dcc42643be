"""The rendered scripts of ``slurm/``: what each is made of. ``python -m tests.support.slurm_examples`` writes them."""

from __future__ import annotations

from pathlib import Path

from disttrain.slurm.job import Job
from disttrain.slurm.render import Script, render
from disttrain.slurm.site import Site, load_site

FOLDER = Path(__file__).resolve().parents[2] / "slurm"
_HOME = Path("/home/me/project")


def examples() -> dict[str, str]:
    """Each file of ``slurm/`` by name."""
    site = load_site(FOLDER / "site.yaml")
    gpus = {"gpus_per_node": 8, "time": "23h50m", "requeue": True}
    made: dict[str, tuple[Job, Site, dict[str, str]]] = {
        "srun.sbatch": (Job("gpt", nodes=4, **gpus), Site(cpus_per_task=12), {}),  # type: ignore[arg-type]
        "torchrun.sbatch": (
            Job("gpt", nodes=4, style="torchrun", **gpus),  # type: ignore[arg-type]
            Site(cpus_per_task=12),
            {},
        ),
        "container.sbatch": (Job("gpt", nodes=4, **gpus), site, {}),  # type: ignore[arg-type]
        "cpu.sbatch": (Job("digits", nodes=2, tasks_per_node=4, time="30m"), Site(), {}),
        "array.sbatch": (
            Job("digits", gpus_per_node=1, time="1h", array="0-9%4", requeue=True),
            Site(),
            {"seed_everything": "%a"},
        ),
    }
    return {
        name: render(
            job, site, Script(_HOME / "runs" / job.name, _HOME, site.python or f"{_HOME}/.venv/bin/python", more)
        )
        for name, (job, site, more) in made.items()
    }


if __name__ == "__main__":
    for name, text in examples().items():
        (FOLDER / name).write_text(text)
