"""Ranks of real processes meet as their launcher says, see that they run the same, and name who does not."""

from __future__ import annotations

import os
import re
import socket
import sys
import types
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed.distributed_c10d import Store

from disttrain.cli import main
from disttrain.distributed.process_group import join
from disttrain.distributed.rendezvous import Meeting, announce, find_meeting
from disttrain.distributed.world import World, detect_world
from disttrain.system.reading import read_run
from tests.support.preemption import fit_arguments
from tests.support.ranks import run_ranks
from tests.support.weights import differing, final_weights

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")


def as_srun(job: str, *, nodes: int = 1) -> None:
    """Turn what torchrun would set into what srun would, on nodes that are all this one."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name in TORCHRUN:
        del os.environ[name]
    os.environ |= {
        "SLURM_JOB_ID": job,
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % (size // nodes)),
        "SLURM_NTASKS": str(size),
        "SLURM_NNODES": str(nodes),
        "SLURM_STEP_NODELIST": ",".join(["localhost"] * nodes),
    }


def sum_of_ranks(store: Store, world: World) -> list[int]:
    """What all ranks write into the store under one key each."""
    store.set(f"rank/{world.rank}", str(world.rank))
    found = [int(store.get(f"rank/{rank}")) for rank in range(world.size)]
    store.set(f"done/{world.rank}", "")
    for rank in range(world.size if world.rank == 0 else 0):
        store.get(f"done/{rank}")  # rank 0 keeps the store until all have read it
    return found


def meet(job: str, taken: int) -> None:
    """Join under SLURM's variables, where rank 0 finds the first ports in use."""
    as_srun(job)
    world = detect_world()
    with ExitStack() as stack:
        if world.rank == 0:
            ports = find_meeting(world).ports
            for number, port in enumerate(ports[:taken]):
                if number % 2:  # another job's ranks meet there
                    stack.enter_context(announce(Meeting("", (port,), "another"), 1))
                else:  # something that is mute
                    stack.enter_context(socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True))
        store = join(world, timedelta(seconds=60))
        assert sum_of_ranks(store, world) == list(range(world.size))


@pytest.mark.parametrize("taken", [0, 2])
def test_ranks_of_srun_meet_at_the_first_port_that_is_free(tmp_path: Path, taken: int) -> None:
    job = str(os.getpid() * 10 + taken)
    run_ranks(3, meet, job, taken, folder=tmp_path).ok()


def fit_at_a_port_in_use(*arguments: str) -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        os.environ["MASTER_PORT"] = str(other.getsockname()[1])
        assert main(list(arguments)) == 0


def test_a_rank_alone_needs_no_port(digits: Path, tmp_path: Path) -> None:
    """Which another program could take after it was seen to be free."""
    arguments = fit_arguments(tmp_path / "run", digits, "ddp")
    run_ranks(1, fit_at_a_port_in_use, *arguments, folder=tmp_path / "logs").ok()


def come(absent: int) -> None:
    """Join, unless this is the rank that does not come."""
    world = detect_world()
    if world.rank != absent:
        join(world, timedelta(seconds=1.5))


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    outcome = run_ranks(3, come, 2, folder=tmp_path / "2")
    assert outcome.codes == [1, 0, 0], outcome.text
    assert "JoinError: rank 2 did not join the others in time" in outcome.outputs[0]
    outcome = run_ranks(2, come, 0, folder=tmp_path / "0")
    assert outcome.codes == [0, 1], outcome.text
    assert re.search(
        r"JoinError: rank 0 at 127.0.0.1 was not reached in time; port \d+: Connection refused", outcome.text
    )


def come_elsewhere() -> None:
    """All ranks are told an address that is nobody's."""
    os.environ["MASTER_ADDR"] = "203.0.113.9"
    join(detect_world(), timedelta(seconds=1))


def test_an_address_that_leads_nowhere(tmp_path: Path) -> None:
    outcome = run_ranks(2, come_elsewhere, folder=tmp_path, timeout=60)
    assert outcome.codes == [1, 1], outcome.text
    assert "JoinError: rank 1 did not join the others in time" in outcome.outputs[0]
    assert "JoinError: rank 0 at 203.0.113.9 was not reached in time; port" in outcome.outputs[1]


def come_to_a_port_in_use() -> None:
    world = detect_world()
    if world.rank == 0:
        with socket.create_server(("", int(os.environ["MASTER_PORT"])), family=socket.AF_INET6, dualstack_ipv6=True):
            join(world, timedelta(seconds=5))


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    outcome = run_ranks(2, come_to_a_port_in_use, folder=tmp_path)
    assert re.search(
        r"ConfigError: rank 0 cannot listen on port \d+ of .*: it is used by another program", outcome.text
    )


def fit_under_srun(arguments: list[str], job: str) -> None:
    as_srun(job)
    sys.exit(main(arguments))


def fit_as_is(arguments: list[str]) -> None:
    sys.exit(main(arguments))


@pytest.mark.slow
def test_srun_trains_what_torchrun_does(digits: Path, tmp_path: Path) -> None:
    """The same ranks take the same samples and places, so the weights have the same bits."""
    folders = [tmp_path / name for name in ("torchrun", "srun")]
    arguments = [fit_arguments(folder, digits, "ddp", []) for folder in folders]
    run_ranks(2, fit_as_is, arguments[0], folder=tmp_path / "log-torchrun").ok()
    run_ranks(2, fit_under_srun, arguments[1], str(os.getpid()), folder=tmp_path / "log-srun").ok()
    assert read_run(folders[1])["attempts"][0]["world_size"] == 2
    assert not differing(final_weights(folders[0]), final_weights(folders[1]))


def many_callbacks(last: float) -> str:
    """A long setting, the last of whose many values is this one."""
    each = "{class_path: tests.support.callbacks.Slowly, init_args: {seconds: %s}}"
    return f"--trainer.callbacks=[{', '.join(each % seconds for seconds in (*[0.0] * 6, last))}]"


def fit_otherwise(arguments: list[str], how: str, folder: str) -> None:
    """Train, but for one rank whose settings, library or code is another."""
    if os.environ["RANK"] == "1":
        if how == "settings":
            arguments = [*arguments, "--model.optimizer.lr", "0.125", "--data.cache.directory", "/tmp/of-one-node"]
            arguments.append(many_callbacks(0.003))
        else:
            module = types.ModuleType("my_layers")
            module.__file__ = f"{folder}/my_layers.py"
            sys.modules["my_layers"] = module
    elif how == "settings":
        arguments = [*arguments, "--data.cache.directory", "/tmp/of-another-node", many_callbacks(0.002)]
    else:
        module = types.ModuleType("my_layers")
        module.__file__ = f"{folder}/older/my_layers.py"
        sys.modules["my_layers"] = module
    sys.exit(main(arguments))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            "settings",
            r"setting model.init_args.optimizer.*: .*0\.\d+.* on rank 0 \(.*\); .*0\.125.* on rank 1 \([^\n]*\n"
            r" *setting trainer\.callbacks: \.\.\..{,60}0\.002.{,20} on rank 0 \(.*\);"
            r" \.\.\..{,60}0\.003.{,20} on rank 1 \(",
        ),
        ("code", r"code of module my_layers: \w{8} on rank 0 \(.*\); \w{8} on rank 1 \("),
    ],
)
def test_ranks_that_would_not_train_the_same_are_refused(digits: Path, tmp_path: Path, how: str, said: str) -> None:
    (tmp_path / "older").mkdir()
    (tmp_path / "my_layers.py").write_text("WIDTH = 8\n")
    (tmp_path / "older/my_layers.py").write_text("WIDTH = 4\n")
    arguments = fit_arguments(tmp_path / "run", digits, "ddp", [])
    outcome = run_ranks(2, fit_otherwise, arguments, how, str(tmp_path), folder=tmp_path / "log")
    assert outcome.codes == [2, 2], outcome.text
    assert outcome.text.count("error (rank 0 of 2): the ranks differ in versions, code or settings") == 1
    assert re.search(said, outcome.outputs[0]), outcome.text
    assert "cache" not in outcome.text
    assert outcome.outputs[1].strip() == "", "what rank 0 says need not be said twice"
    assert not (tmp_path / "run").exists()
