"""The rendered scripts that are kept in ``slurm/`` are what the templates give, and shell can read them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from disttrain.errors import ConfigError
from disttrain.slurm.job import STYLES, Job
from disttrain.slurm.render import Script, render
from disttrain.slurm.site import Container, Site
from tests.support.slurm_examples import FOLDER, examples

SCRIPT = Script(FOLDER / "runs" / "a run", FOLDER, "/usr/bin/python3", {})


@pytest.mark.parametrize("name", sorted(examples()))
def test_the_examples_are_what_is_rendered(name: str) -> None:
    kept = (FOLDER / name).read_text()
    assert kept == examples()[name], f"run python -m tests.support.slurm_examples and read the change of slurm/{name}"
    checked = subprocess.run(["bash", "-n", str(FOLDER / name)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_there_is_no_example_of_nothing() -> None:
    assert sorted(path.name for path in FOLDER.glob("*.sbatch")) == sorted(examples())


def test_the_signal_goes_to_the_ranks_or_to_the_shell() -> None:
    by_rank = Job("a", tasks_per_node=1, requeue=True, signal_seconds=90)
    by_node = Job("a", tasks_per_node=1, requeue=True, signal_seconds=90, style="torchrun")
    assert "#SBATCH --signal=USR1@90\n" in render(by_rank, Site(), SCRIPT)
    assert "#SBATCH --signal=B:USR1@90\n" in render(by_node, Site(), SCRIPT)
    asleep = render(Job("a", tasks_per_node=1), Site(), SCRIPT)
    assert "--signal" not in asleep
    assert "#SBATCH --no-requeue\n" in asleep
    assert "DISTTRAIN_REQUEUE" not in asleep


def test_names_with_spaces_stay_one_word() -> None:
    text = render(Job("a job", tasks_per_node=1), Site(environment={"NOTE": "it's one"}), SCRIPT)
    run_dir = next(line for line in text.splitlines() if line.startswith("RUN_DIR="))
    said = subprocess.run(["bash", "-c", f'{run_dir}; printf %s "$RUN_DIR"'], capture_output=True, text=True)
    assert said.stdout == str(SCRIPT.run_dir)
    assert "#SBATCH --job-name='a job'\n" in text
    exported = next(line for line in text.splitlines() if line.startswith("export NOTE="))
    said = subprocess.run(["bash", "-c", f'{exported}; printf %s "$NOTE"'], capture_output=True, text=True)
    assert said.stdout == "it's one"


def before_the_ranks(site: Site, folder: Path) -> subprocess.CompletedProcess[str]:
    """What the script of a job does before it starts any rank."""
    text = render(Job("a", tasks_per_node=1), site, SCRIPT).partition("step() {")[0]
    (folder / "module").write_text('#!/bin/sh\necho "module $*"\n[ "$2" != absent ]\n')
    (folder / "module").chmod(0o755)
    env = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "7"}
    return subprocess.run(["bash", "-c", f"{text}\necho ready"], env=env, capture_output=True, text=True)


def test_what_a_site_sets_up_may_be_any_shell_and_ends_the_job_where_it_fails(tmp_path: Path) -> None:
    (tmp_path / "activate").write_text('[ -n "$CONDA_BACKUP_X" ] || export ENV=there\n')  # no "set -u" for conda
    loop = ("for name in a b; do", "  module load $name", "done")
    tests = ("[ -f absent ] && source absent", "if [ -f absent ]; then", "  false", "fi", "false || true")
    good = Site(modules=("cuda",), setup=(f"source {tmp_path}/activate", *loop, *tests, "echo $ENV  # a word"))
    done = before_the_ranks(good, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["module load cuda", "module load a", "module load b", "there", "ready"]
    assert "unbound" not in done.stderr
    for site, what in (
        (Site(modules=("absent",)), "module load absent"),
        (Site(setup=("true", "source absent/activate")), "source absent/activate"),
        (Site(setup=("if true; then", "  module load absent", "fi")), "  module load absent"),
    ):
        done = before_the_ranks(site, tmp_path)
        assert (done.returncode, "ready" in done.stdout) == (1, False), done.stdout
        assert f"disttrain: {what} failed; no rank was started" in done.stderr
    lines = ("cat >/dev/null <<EOF", "it's", "EOF", "X='a", "b'")  # are left as they are
    assert before_the_ranks(Site(setup=lines), tmp_path).stdout == "ready\n"


def test_pyxis_mounts_by_options_of_srun() -> None:
    site = Site(container=Container("docker://a/b:c", runtime="pyxis", mounts=("/data", "/scratch:/tmp")))
    for style in STYLES:
        text = render(Job("a", tasks_per_node=1, style=style), site, SCRIPT)
        folder = f"{FOLDER}:{FOLDER}"
        assert f"--container-image=docker://a/b:c --container-mounts={folder},/data:/data,/scratch:/tmp \\\n" in text
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stderr


def test_an_option_that_disttrain_sets_is_refused() -> None:
    with pytest.raises(ConfigError, match="sbatch option ntasks is set by disttrain"):
        render(Job("a", tasks_per_node=1), Site(sbatch={"ntasks": "4"}), SCRIPT)
