"""``disttrain doctor`` finds planted faults, on this machine and on real ranks, and names who and how to fix it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from disttrain.commands import doctor
from disttrain.doctor import examine as examine_module, network, speed
from disttrain.errors import ConfigError
from tests.support.ranks import Outcome, run_ranks

COMMON = ("--json", "--shm", tempfile.gettempdir())
"""In a container, other tests may have all of the real shared memory."""


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = doctor.main([*COMMON, *arguments])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, found


def of(found: dict[str, Any], check: str, status: str = "failure") -> list[str]:
    """What was found of a subject."""
    return [each["said"] for each in found["findings"] if (each["check"], each["status"]) == (check, status)]


@contextlib.contextmanager
def tmpfs(path: Path, options: str) -> Iterator[Path]:
    """A small file system of its own."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_one_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str], digits: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"trainer: {{run_dir: {tmp_path}/run}}\ndata: {{train: '{digits}/train-{{000000..000003}}.tar'}}\n"
    )
    code, found = run_here(capsys, "--config", str(config))
    assert code == 0, [each for each in found["findings"] if each["status"] == "failure"]
    checks = {each["check"] for each in found["findings"]}
    wanted = {"versions", "processors", "memory", "shared memory", "open files", "devices", "network", "run folder"}
    assert wanted | {"data", "computing", "ranks"} <= checks
    assert found["measured"]["compute_seconds"] > 0
    assert all(each["hint"] for each in found["findings"] if each["status"] != "ok")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"], "something was left behind"
    code, found = run_here(capsys, "--config", str(config), "--data", f"{tmp_path}/nowhere/*.tar", "--strict")
    assert code == 1
    assert of(found, "data") == [f"{tmp_path}/nowhere does not exist"]


def test_mistakes(tmp_path: Path) -> None:
    def written(content: bytes) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_bytes(content)
        return str(path)

    for arguments, said in (
        (["--timeout", "0"], "--timeout is 0"),
        (["--port", "0"], r"--port is 0\n.*use 1 to 65535"),
        (["--port", "65536"], r"--port is 65536\n.*use 1 to 65535"),
        (["--config", str(tmp_path / "none.yaml")], "cannot be read"),
        (["--config", written(b"- a\n- b\n")], "is not a mapping of settings"),
        (["--config", written(b"trainer: foo\n")], "trainer is 'foo', not a mapping of settings"),
        (["--config", written(b"data: []\n")], r"data is \[\], not a mapping of settings"),
        (["--config", written(b"data: \xff\n")], "is not UTF-8 text"),
    ):
        with pytest.raises(ConfigError, match=said):
            doctor.main(arguments)


def test_launchers_that_contradict_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, found = run_here(capsys)
    assert code == 1
    assert "rank 5 of 2" in of(found, "launcher")[0]


def test_a_read_only_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(tmp_path / "mount", "ro,size=1m") as mount:
        code, found = run_here(capsys, "--run-dir", str(mount / "runs/digits"))
    assert code == 1
    assert re.search(
        r"runs/digits \(to be created in .*\) cannot be written: the file system is read-only",
        of(found, "run folder")[0],
    )
    (tmp_path / "file").touch()
    code, found = run_here(capsys, "--run-dir", str(tmp_path / "file"))
    assert of(found, "run folder") == [f"{tmp_path}/file is a file"]


def test_a_full_shared_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tmpfs(tmp_path / "shm", "size=128m") as mount:
        code, found = run_here(capsys, "--shm", str(mount))
        assert of(found, "shared memory", "warning") == [f"128 MiB free in {mount}"]
        (mount / "nccl-left").write_bytes(bytes(100 * 2**20))
        code, found = run_here(capsys, "--shm", str(mount))
        assert code == 1
        assert of(found, "shared memory") == [f"28 MiB free in {mount}: NCCL and worker processes need more"]
        (mount / "more").write_bytes(bytes(28 * 2**20))
        code, found = run_here(capsys, "--shm", str(mount))
        assert code == 1
        assert of(found, "shared memory") == [f"{mount} cannot be written: No space left on device"]


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, found = run_here(capsys, "--port", str(port))
    assert code == 1
    (said,) = of(found, "port")
    assert f"port {port} on {socket.gethostname()}: Address already in use" in said
    assert f"(pid {os.getpid()})" in said
    code, found = run_here(capsys, "--port", str(port))
    assert not of(found, "port"), "nobody has it any more"


def test_an_interface_that_does_not_exist(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lp")
    code, found = run_here(capsys)
    assert code == 1
    assert of(found, "network") == ["GLOO_SOCKET_IFNAME is 'lp', which is not an interface of this node"]
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    code, found = run_here(capsys)
    assert "lo (127.0.0.1) is used" in of(found, "network", "ok")[0]


def test_peers_that_cannot_be_reached() -> None:
    open_, closed = network.Reached(), network.Reached()
    closed.close()
    mute = socket.create_server(("127.0.0.1", 0))
    with mute:
        places = {1: ("127.0.0.1", open_.port), 2: ("127.0.0.1", closed.port), 3: mute.getsockname()[:2]}
        found = network.reach(places)
    open_.close()
    assert found == {2: "Connection refused", 3: "no answer within 3 s"}


def examine(absent: int | None, how: str, arguments: list[str]) -> None:
    """The doctor on a rank, with a fault planted in one."""
    rank = int(os.environ["RANK"])
    if rank == absent:
        return
    if how == "environment" and rank == 1:
        os.environ["NCCL_P2P_DISABLE"] = "1"
    if how == "dies" and rank == 1:
        speed.compute_seconds = lambda device: os._exit(0)
    if how == "slow" and rank == 1:
        stop_at_times(os.getpid())
    if how == "port" and rank == 0:
        keep.append(socket.create_server(("127.0.0.1", int(os.environ["MASTER_PORT"]))))
    sys.exit(doctor.main([*COMMON, *arguments]))


keep: list[socket.socket] = []


def stop_at_times(victim: int) -> None:
    """From now on, for some seconds, this process is stopped nine tenths of the time."""
    if os.fork():
        return
    deadline = time.monotonic() + 6
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.045)  # the fault itself
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.005)
    os._exit(0)


def run(folder: Path, size: int, *arguments: str, absent: int | None = None, how: str = "") -> Outcome:
    return run_ranks(size, examine, absent, how, ["--run-dir", str(folder / "run"), *arguments], folder=folder)


def found_by(outcome: Outcome, rank: int) -> dict[str, Any]:
    text = outcome.outputs[rank]
    found: dict[str, Any] = json.loads(text[text.index("{\n") : text.rindex("}") + 1])
    return found


def test_several_ranks(tmp_path: Path) -> None:
    outcome = run(tmp_path, 3, how="environment")
    assert outcome.codes == [0, 0, 0], outcome.text
    found = found_by(outcome, 0)
    assert of(found, "environment", "warning") == [
        f"differs between ranks: NCCL_P2P_DISABLE: missing on rank 0, 2 ({socket.gethostname()}); 1 on rank 1"
        f" ({socket.gethostname()})"
    ]
    assert found["measured"]["all_reduce"] > 1e6
    assert 0 < found["measured"]["latency"] < 10
    assert "gloo: all-reduce" in (of(found, "collectives", "ok") + of(found, "collectives", "warning"))[0]
    assert outcome.outputs[1].strip() == outcome.outputs[2].strip() == "", "rank 0 speaks for all"
    assert not list(tmp_path.glob(".disttrain*")), "something was left behind"


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    outcome = run(tmp_path, 3, "--timeout", "2", absent=1)
    assert outcome.codes == [1, 0, 1], outcome.text
    found = found_by(outcome, 0)
    assert of(found, "peers") == ["rank 1 did not connect to 127.0.0.1 within 2 s"]
    assert not of(found, "collectives"), "there was nothing to try"


def test_rank_0_does_not_come(tmp_path: Path) -> None:
    outcome = run(tmp_path, 2, "--timeout", "1", absent=0)
    assert outcome.codes == [0, 1], outcome.text
    (said,) = of(found_by(outcome, 1), "peers")
    assert re.fullmatch(r"rank 0 at 127.0.0.1 was not reached in time; port \d+: Connection refused", said)


def test_rank_0_has_no_port(tmp_path: Path) -> None:
    outcome = run(tmp_path, 2, "--timeout", "2", how="port")
    assert outcome.codes == [1, 1], outcome.text
    assert "Address already in use, by" in of(found_by(outcome, 0), "port")[0]
    assert "rank 0 at 127.0.0.1 was not reached in time" in of(found_by(outcome, 1), "peers")[0]


@pytest.mark.slow
def test_a_rank_that_dies_underway(tmp_path: Path) -> None:
    outcome = run(tmp_path, 2, "--timeout", "2", how="dies")
    assert outcome.codes == [1, 0], outcome.text
    found = found_by(outcome, 0)
    assert f"rank 1 on {socket.gethostname()} connected, but then stopped responding" in of(found, "peers")
    assert of(found, "collectives"), "it was not there for them"


def hang() -> None:
    """The doctor in a process whose device never answers."""
    examine_module._GUARD_SECONDS = 0.5  # type: ignore[misc]
    speed.compute_seconds = lambda device: threading.Event().wait()  # type: ignore[return-value,assignment]
    sys.exit(doctor.main(["--json", "--timeout", "0.5"]))


def test_a_rank_that_hangs_is_ended_and_says_where(tmp_path: Path) -> None:
    outcome = run_ranks(1, hang, folder=tmp_path, timeout=60)
    assert outcome.codes == [1], outcome.text
    (said,) = of(found_by(outcome, 0), "peers")
    assert said == f"rank 0 on {socket.gethostname()} hung for more than 3 s while computing"


def test_a_slow_rank(tmp_path: Path) -> None:
    outcome = run(tmp_path, 2, how="slow")
    assert outcome.codes == [0, 0], outcome.text
    (said,) = of(found_by(outcome, 0), "computing", "warning")
    assert re.match(rf"rank 1 \({socket.gethostname()}\) takes \d+\.\d times as long", said)


def other_torch(folder: Path) -> Path:
    """A PyTorch of another version: links to this one's files, but for the one that says the version."""
    import torch

    real, fake = Path(torch.__file__).parent, folder / "torch"
    fake.mkdir(parents=True)
    for entry in real.iterdir():
        if entry.name not in ("version.py", "__pycache__"):
            (fake / entry.name).symlink_to(entry)
    (fake / "version.py").write_text((real / "version.py").read_text().replace(torch.__version__, "2.12.9+other"))
    return folder


@pytest.mark.slow
def test_ranks_with_different_versions_of_torch(port: int, tmp_path: Path) -> None:
    shared = {
        **os.environ,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    paths = [os.environ.get("PYTHONPATH", ""), f"{other_torch(tmp_path / 'site')}:{os.environ.get('PYTHONPATH', '')}"]
    command = [sys.executable, "-m", "disttrain", "doctor", "--json", "--timeout", "60", "--run-dir", str(tmp_path)]
    ranks = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, path in enumerate(paths)
    ]
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1], outputs
    (said,) = of(json.loads(outputs[0]), "versions")
    assert re.search(r"torch: 2\.\S+ on rank 0 \(.*\); 2\.12\.9\+other on rank 1 \(", said), said


@pytest.mark.gpu
def test_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_here(capsys, "--run-dir", str(tmp_path / "run"))
    assert code == 0, found["findings"]
    assert "driver" in of(found, "devices", "ok")[0]
    assert of(found, "GPU memory", "ok") + of(found, "GPU memory", "warning")
    assert "on cuda" in of(found, "computing", "ok")[0]
