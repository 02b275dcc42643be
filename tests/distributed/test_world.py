"""Who this process is, from the environments that launchers set."""

from __future__ import annotations

import pytest

from disttrain.distributed.world import World, detect_world
from disttrain.errors import ConfigError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NNODES": "2",
    "SLURM_JOB_ID": "77",
}
# One task a node of the same job, and its batch script.
ONE_A_NODE = SRUN | {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
STANDALONE = {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "aabbc023-d8d6-481c-bad8-d8276e077458"}
BATCH = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"} | {"SLURM_PROCID": "0"}


def without(environment: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in names}


@pytest.mark.parametrize(
    ("environment", "world", "nodes"),
    [
        pytest.param({}, World(), 1, id="nothing"),
        pytest.param({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, World(), 1, id="one process of mpirun"),
        pytest.param(TORCHRUN | {"OMPI_COMM_WORLD_SIZE": "2"}, World(5, 8, 1, 4, "torchrun"), 2, id="mpirun torchrun"),
        pytest.param({"HOME": "/", "MASTER_ADDR": "here"}, World(), 1, id="unrelated"),
        pytest.param(TORCHRUN, World(5, 8, 1, 4, "torchrun"), 2, id="torchrun"),
        pytest.param(without(TORCHRUN, "TORCHELASTIC_RUN_ID"), World(5, 8, 1, 4, "torchrun"), 2, id="by hand"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, World(1, 2, 1, 2, "torchrun"), 1, id="one node by hand"
        ),
        pytest.param(
            {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, World(0, 1, 0, 1, "torchrun"), 1, id="one rank"
        ),
        pytest.param({"RANK": "3", "WORLD_SIZE": "4"}, World(), 1, id="stale variables without a local rank"),
        pytest.param(SRUN, World(5, 8, 1, 4, "slurm"), 2, id="srun"),
        pytest.param(without(SRUN, "SLURM_NNODES"), World(5, 8, 1, 8, "slurm"), 1, id="srun on one node"),
        pytest.param(ONE_A_NODE | TORCHRUN, World(5, 8, 1, 4, "torchrun"), 2, id="torchrun under srun"),
        pytest.param(BATCH | TORCHRUN, World(5, 8, 1, 4, "torchrun"), 2, id="torchrun in a batch script"),
        pytest.param(
            ONE_A_NODE | TORCHRUN | STANDALONE | {"TORCHELASTIC_RESTART_COUNT": "1"},
            World(5, 8, 1, 4, "torchrun"),
            2,
            id="an elastic job of one node that is left",
        ),
        pytest.param(
            ONE_A_NODE | TORCHRUN | {"GROUP_WORLD_SIZE": "1"},
            World(5, 8, 1, 4, "torchrun"),
            2,
            id="an elastic job of one node that others may join",
        ),
        pytest.param(
            SRUN | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            World(5, 8, 1, 4, "torchrun"),
            2,
            id="a script under srun that sets the ranks",
        ),
        pytest.param(
            SRUN | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x3)"},
            World(5, 6, 1, 2, "slurm"),
            3,
            id="a step smaller than its job",
        ),
        pytest.param(without(SRUN, "SLURM_STEP_ID"), World(), 1, id="batch script"),
        pytest.param(without(SRUN, "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_LOCALID"), World(), 1, id="salloc"),
        pytest.param(SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, World(), 1, id="srun of one task"),
    ],
)
def test_the_world_of_each_launcher(environment: dict[str, str], world: World, nodes: int) -> None:
    found = detect_world(environment)
    assert found == world
    assert found.num_nodes == nodes


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)
    assert detect_world() == World()
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert detect_world() == World(5, 8, 1, 4, "torchrun")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (TORCHRUN | {"RANK": "eight"}, ["RANK is 'eight'", "not a number", "unset RANK"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": ""}, ["LOCAL_WORLD_SIZE is ''"]),
        ({"TORCHELASTIC_RUN_ID": "x"}, ["WORLD_SIZE", "not a number"]),
        (SRUN | {"SLURM_NTASKS": "8(x2)"}, ["SLURM_NTASKS is '8(x2)'"]),
        (TORCHRUN | {"RANK": "8"}, ["contradictory", "rank 8 of 8", "torchrun"]),
        (TORCHRUN | {"RANK": "-1"}, ["contradictory", "rank -1 of 8"]),
        (TORCHRUN | {"LOCAL_RANK": "4"}, ["contradictory", "local rank 4 of 4"]),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, ["contradictory", "local rank 1 of 9"]),
        (TORCHRUN | {"WORLD_SIZE": "0"}, ["contradictory", "rank 5 of 0"]),
        (SRUN | {"SLURM_NNODES": "9"}, ["slurm environment is contradictory"]),
        (SRUN | {"SLURM_NNODES": "3"}, ["8 tasks unevenly over 3 nodes", "--ntasks-per-node"]),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "3(x2),2"}, ["unevenly", "3(x2),2"]),
        (SRUN | {"SLURM_DISTRIBUTION": "cyclic"}, ["in turn", "--distribution=block"]),
        (SRUN | {"SLURM_LOCALID": "2"}, ["task 5", "position 2", "--distribution=block"]),
        (SRUN | TORCHRUN, ["torchrun runs inside srun with 4 tasks per node", "task 5 of 8", "--ntasks-per-node=1"]),
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            ["task 5 of 8", "rank 0 of 2, local rank 0", "unset RANK WORLD_SIZE LOCAL_RANK before srun"],
        ),
        (
            ONE_A_NODE | TORCHRUN | STANDALONE,
            ["torchrun on 2 nodes", "2 separate runs of 8 ranks", "not --standalone"],
        ),
    ],
)
def test_what_makes_no_sense_is_refused(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        detect_world(environment)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{str(caught.value)!r} does not say {missing}"


@pytest.mark.parametrize("size", ["OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_the_processes_of_mpirun_are_no_runs_of_their_own(size: str) -> None:
    with pytest.raises(ConfigError, match=r"mpirun started this process as rank 1 of 2") as caught:
        detect_world({size: "2", size.replace("SIZE", "RANK"): "1", "PMI_RANK": "1"})
    assert "torchrun" in caught.value.hint


def test_uneven_nodes_are_refused() -> None:
    with pytest.raises(ConfigError, match="7 ranks cannot be spread evenly over nodes of 4 ranks"):
        _ = World(0, 7, 0, 4).num_nodes


def test_ranks_need_a_device_each() -> None:
    World(3, 4, 3, 4, "torchrun").check_devices(4)
    World(3, 4, 3, 4, "torchrun").check_devices(8)
    with pytest.raises(ConfigError, match=r"this node has 4 ranks, but PyTorch sees 2 GPUs\n.*one rank per GPU"):
        World(3, 4, 3, 4, "torchrun").check_devices(2)
    with pytest.raises(ConfigError, match=r"this node has 4 ranks, but PyTorch sees 1 GPU: .*\n.*--gpu-bind=none"):
        World(3, 4, 3, 4, "slurm").check_devices(1)


def test_ranks_of_a_node_follow_each_other() -> None:
    assert [World(rank, 6, rank % 2, 2).node for rank in range(6)] == [0, 0, 1, 1, 2, 2]
