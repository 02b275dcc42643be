"""What the doctor reads of a machine, from made-up files and from what tools print on machines that are not here."""

from __future__ import annotations

from pathlib import Path

import pytest

from disttrain.doctor import machine, network

GIB = 2**30


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


SECOND = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
FIRST = "sys/fs/cgroup/memory/slurm/uid_0/job_7"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        (  # a bare node: the job's limit is above the step's group, and below the top
            {
                "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
                "sys/fs/cgroup/memory.max": "max",
                f"{SECOND}/memory.max": f"{2 * GIB}\n",
                f"{SECOND}/memory.current": f"{GIB}\n",
                f"{SECOND}/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
                f"{SECOND}/step_0/user/task_0/memory.max": "max\n",
                f"{SECOND}/step_0/user/task_0/memory.current": "5\n",
            },
            1.5 * GIB,
        ),
        (
            {
                "proc/self/cgroup": "5:cpuset:/slurm\n4:cpu,memory:/slurm/uid_0/job_7/step_0\n0::/init.scope\n",
                f"{FIRST}/memory.limit_in_bytes": f"{GIB}\n",
                f"{FIRST}/memory.usage_in_bytes": f"{GIB // 4}\n",
                f"{FIRST}/step_0/memory.limit_in_bytes": "9223372036854771712\n",
                f"{FIRST}/step_0/memory.usage_in_bytes": "0\n",
            },
            0.75 * GIB,
        ),
        (  # a container without a name space of its own: only its top is there
            {
                "proc/self/cgroup": "0::/../../docker/abc\n",
                "sys/fs/cgroup/memory.max": f"{GIB}",
                "sys/fs/cgroup/memory.current": "0",
            },
            GIB,
        ),
        ({"proc/self/cgroup": "0::/user.slice\n", "sys/fs/cgroup/user.slice/memory.max": "max\n"}, None),
        ({}, None),
    ],
)
def test_the_memory_that_the_job_may_have(tmp_path: Path, files: dict[str, str], left: float | None) -> None:
    assert machine.cgroup_left(written(tmp_path, files)) == left


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build  (x)\n", "550.54.15"),
        ("GCC version:  gcc version 12.3.0\n", ""),
    ],
)
def test_the_driver(text: str, version: str) -> None:
    assert machine.driver_of(text) == version


def test_what_joins_gpus() -> None:
    links = "".join(f"\t Link {link}: 26.562 GB/s\n" for link in range(18))
    text = f"GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\n{links}GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n{links}"
    assert machine.nvlink_speed(text) == pytest.approx(478e9, rel=1e-3)
    assert machine.nvlink_speed("GPU 0: x\n\t Link 0: <inactive>\n") == 0
    assert machine.pcie_speed("4, 16\n4, 16") == pytest.approx(31.5e9, rel=1e-2)
    assert machine.pcie_speed("[N/A], [N/A]") == machine.pcie_speed("") == 0


def test_infiniband(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def port(name: str, state: str, rate: str) -> dict[str, str]:
        return {f"{name}/ports/1/state": f"4: {state}\n", f"{name}/ports/1/rate": f"{rate}\n"}

    monkeypatch.setattr(network, "_INFINIBAND", tmp_path)
    assert network.infiniband_speed() == 0
    written(tmp_path, port("mlx5_0", "ACTIVE", "400 Gb/sec (4X NDR)") | port("mlx5_1", "DOWN", "800 Gb/sec (8X NDR)"))
    written(tmp_path, port("mlx5_2", "ACTIVE", "2.5 Gb/sec (1X SDR)"))
    assert network.infiniband_speed() == 50e9
