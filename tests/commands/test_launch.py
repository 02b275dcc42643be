"""``disttrain launch``: what it runs, and how it ends."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from disttrain.commands import launch
from disttrain.commands.torchrun import explain
from disttrain.distributed.exit_codes import VARIABLE, Ending, code_of, note_ending, read_endings
from disttrain.errors import ConfigError
from disttrain.system.reading import read_run
from tests.support.launching import launched
from tests.support.preemption import fit_arguments

SLOWLY = ["--trainer.callbacks+=tests.support.callbacks.Slowly", "--trainer.callbacks.seconds=0.3"]


@pytest.mark.parametrize(
    ("files", "visible", "number"),
    [
        ([], None, 0),
        (["nvidiactl", "nvidia-uvm", "null"], None, 0),
        (["nvidia0", "nvidia1", "nvidia10", "nvidiactl"], None, 3),
        (["nvidia0", "nvidia1", "nvidia2", "nvidia3"], "0,2", 2),
        (["nvidia0", "nvidia1"], "", 0),
        (["nvidia0", "nvidia1"], "0,-1,1", 1),
        (["nvidia0", "nvidia1"], "GPU-8a5c,MIG-77", 2),
        (["nvidia0", "nvidia1"], "1,7", 1),
        (["nvidia0", "nvidia1"], "0,9,1", 1),  # CUDA stops at the first that does not exist
        (["nvidia0", "nvidia1"], "-1", 0),
        ([], "0,1", 0),
    ],
)
def test_gpus_are_counted_without_torch(tmp_path: Path, files: list[str], visible: str | None, number: int) -> None:
    for name in files:
        (tmp_path / name).touch()
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert launch.count_gpus(env, tmp_path) == number


def test_the_command_is_torchruns() -> None:
    command = launch.torchrun_command(["fit", "--config", "x.yaml"], nproc=4, max_restarts=2)
    assert command[:3] == [sys.executable, "-m", "disttrain.commands.torchrun"]
    assert command[-5:] == ["-m", "disttrain", "fit", "--config", "x.yaml"]
    assert {"--standalone", "--max-restarts"} < set(command)
    assert launch.torchrun_command(["research.py", "--fast"], nproc=1)[-2:] == ["research.py", "--fast"]


@pytest.mark.parametrize(
    ("codes", "words"),
    [
        ([(0, 1), (1, 2)], ""),
        ([(1, -7), (0, 1)], "rank 1 was ended by SIGBUS: a shard or another mapped file was cut off"),
        ([(0, 1), (3, -9)], "rank 3 was ended by SIGKILL: something else killed it: the kernel"),
        ([(0, -11)], "rank 0 was ended by SIGSEGV: native code crashed"),
        ([(0, -15)], ""),
    ],
)
def test_signals_that_end_a_rank_are_explained(codes: list[tuple[int, int]], words: str) -> None:
    assert explain(codes).startswith(words)
    assert bool(explain(codes)) == bool(words)


@pytest.mark.parametrize(
    ("endings", "torchrun", "code"),
    [
        ([], 0, 0),
        ([], 1, 1),
        ([], -9, 137),
        ([Ending(0, 2), Ending(1, 2)], 1, 2),
        ([Ending(0, 75), Ending(1, 75)], 1, 75),
        ([Ending(1, 76)], 1, 76),  # rank 0 was killed while it hung
        ([Ending(0, 2, follows=True)], 1, 1),  # rank 1 was killed
        ([Ending(0, 1), Ending(1, 2, follows=True)], 1, 1),
        ([Ending(0, 2, follows=True), Ending(1, 2)], 1, 2),
        ([Ending(0, 0), Ending(1, 3)], 1, 3),
        ([Ending(0, 75), Ending(1, 75)], 0, 0),  # a later attempt has come to its end
    ],
)
def test_the_code_is_that_of_the_ranks(endings: list[Ending], torchrun: int, code: int) -> None:
    assert code_of(endings, torchrun) == code


def test_the_last_attempt_counts_and_its_first_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not note_ending(2, message="nobody reads it")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for restart, code in (("9", 1), ("10", 75)):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart)
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            assert note_ending(code, message="first")
            assert note_ending(3, message="second")
    assert read_endings(tmp_path) == [Ending(0, 75, False, "first"), Ending(1, 75, False, "first")]


NAMES = ("fit", "test", "launch")


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a subcommand or a script"):
        launch.main(["--nproc", "2"], NAMES)
    with pytest.raises(ConfigError, match="--nproc is 0"):
        launch.main(["--nproc", "0", "fit"], NAMES)
    with pytest.raises(ConfigError, match="--nproc is 99999"):
        launch.main(["--nproc", "99999", "fit"], NAMES)
    with pytest.raises(ConfigError, match="--max-restarts is -1"):
        launch.main(["--max-restarts", "-1", "fit"], NAMES)
    with pytest.raises(ConfigError, match="no subcommand 'ft' to launch") as caught:
        launch.main(["--nproc", "2", "ft"], NAMES)
    assert "did you mean 'fit'?" in caught.value.hint
    with pytest.raises(ConfigError, match="there is no script nowhere"):
        launch.main(["nowhere.py"], NAMES)
    with pytest.raises(ConfigError, match="cannot launch itself"):
        launch.main(["launch", "fit"], NAMES)
    ranks = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}
    tasks = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="started by torchrun, as rank 1 of 2"):
        launch.main(["fit"], NAMES)
    for name in ranks:
        monkeypatch.delenv(name)
    for name, value in tasks.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="srun started 2 tasks"):
        launch.main(["fit"], NAMES)


def test_ranks_that_ran_out_of_memory_are_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As long as each failure is another one, with the same folder for how they end; other failures end the launch."""
    folders = tmp_path / "folders"
    rank = f"""
import os, sys
from disttrain.distributed.exit_codes import note_ending
with open({str(folders)!r}, "a") as file:
    print(os.environ["{VARIABLE}"], len(os.listdir(os.environ["{VARIABLE}"])), file=file)
with open({str(folders)!r}) as file:
    starts = len(file.readlines())
note_ending(2 if starts == 3 else 77, message=f"step 4: out of memory, start {{min(starts, 4)}}")
sys.exit(1)
"""
    monkeypatch.setattr(launch, "torchrun_command", lambda *_, **__: [sys.executable, "-c", rank])
    assert launch.main(["--nproc", "2", "fit"], NAMES) == 2
    told = folders.read_text().splitlines()
    assert len(told) == 3
    assert len(set(told)) == 1, "another folder, or an ending of the launch before in it"
    assert told[0].endswith(" 0")
    text = capsys.readouterr().err
    assert [f"step 4: out of memory, start {start}; restarting all ranks" in text for start in (1, 2)] == [True, True]
    assert text.count("error (rank 0 of 2): step 4: out of memory, start 3") == 1
    assert launch.main(["--nproc", "2", "fit"], NAMES) == 77
    assert len(folders.read_text().splitlines()) == 5, "the same failure came again, and was not the last"


def test_help_and_mistakes_load_no_torch() -> None:
    """What is loaded is asserted, never the time: a login node's disk is slow where its processor is not."""
    code = (
        "import contextlib, io, sys\nfrom disttrain.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "    tools = ('launch', 'doctor', 'shards', 'checkpoints', 'parity', 'report')\n"
        "    for words in (['--help'], ['--version'], ['fitt'], ['launch'], *([tool, '--help'] for tool in tools)):\n"
        "        with contextlib.suppress(SystemExit):\n"
        "            main(words)\n"
        "        assert not {'torch', 'lightning'} & set(sys.modules), words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_ranks_train_and_a_mistake_is_told_once(digits: Path, tmp_path: Path) -> None:
    """Two launches beside each other, as on a workstation: they do not meet at one port."""
    wrong = fit_arguments(tmp_path / "wrong", digits, "ddp", ["--data.global_batch_size", "63"])
    right = fit_arguments(tmp_path / "right", digits, "ddp", [])
    with ExitStack() as stack:
        good = stack.enter_context(launched(["--nproc", "2", *right], tmp_path / "right.log"))
        bad = stack.enter_context(launched(["--nproc", "2", *wrong], tmp_path / "wrong.log"))
        assert (good.wait(), bad.wait()) == (0, 2), good.log.read_text() + bad.log.read_text()
    said = good.log.read_text()
    assert "-m disttrain.commands.torchrun --standalone --nproc-per-node 2" in said.splitlines()[0]
    assert read_run(tmp_path / "right")["attempts"][0]["world_size"] == 2
    said = bad.log.read_text()
    assert "Traceback" not in said, said
    assert said.count("global_batch_size 63 cannot be divided evenly over 2 ranks") == 1, said
    assert re.match(r"disttrain: error \(rank [01, ]+ of 2\): global_batch_size 63", said.splitlines()[-2]), said


@pytest.mark.slow
def test_a_signal_reaches_the_ranks_and_its_code_comes_back(digits: Path, tmp_path: Path) -> None:
    arguments = fit_arguments(tmp_path / "run", digits, "ddp", SLOWLY)
    with launched(["--nproc", "2", "--max-restarts", "1", *arguments], tmp_path / "log") as launcher:
        launcher.wait_for(tmp_path / "run/checkpoints/step-00000004")
        launcher.process.send_signal(signal.SIGUSR1)
        assert launcher.wait(90) == 75, launcher.log.read_text()
    assert "by SIGUSR1 on rank" in launcher.log.read_text()
    assert [attempt["status"] for attempt in read_run(tmp_path / "run")["attempts"]] == ["preempted"]


@pytest.mark.slow
def test_a_hang_and_a_kill_have_codes_of_their_own(digits: Path, tmp_path: Path) -> None:
    """One rank hangs before a step; another, of a launch beside it, is killed, and the rest only follows."""
    name = "--trainer.callbacks"
    hang = [f"{name}+=tests.support.callbacks.HangAt", f"{name}.step=5", f"{name}.how=loop"]
    kill = [f"{name}+=tests.support.callbacks.KillAt", f"{name}.step=5", f"{name}.rank=1"]
    hanging = fit_arguments(tmp_path / "hang", digits, "ddp", [*hang, "--trainer.hang_timeout", "10s"])
    killed = fit_arguments(tmp_path / "kill", digits, "ddp", kill)
    with ExitStack() as stack:
        first = stack.enter_context(launched(["--nproc", "2", *hanging], tmp_path / "hang.log"))
        second = stack.enter_context(launched(["--nproc", "2", *killed], tmp_path / "kill.log"))
        codes = (first.wait(), second.wait())
    assert "rank 1 was ended by SIGKILL: something else killed it" in second.log.read_text()
    assert codes == (76, 1), first.log.read_text() + second.log.read_text()


@pytest.mark.slow
def test_a_killed_launcher_takes_its_ranks_along(digits: Path, tmp_path: Path) -> None:
    arguments = fit_arguments(tmp_path / "run", digits, "ddp", SLOWLY)
    with launched(["--nproc", "2", *arguments], tmp_path / "log") as launcher:
        launcher.wait_for(tmp_path / "run/checkpoints/step-00000004")
        workers = launcher.workers()
        launcher.process.kill()
        gone, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive, f"{alive} of {len(gone)} are left\n{launcher.log.read_text()}"
    assert [attempt["status"] for attempt in read_run(tmp_path / "run")["attempts"]] == ["preempted"]
