"""A real SLURM on this machine: munge, slurmctld, and a slurmd a node, each node with a network of its own.

All of it lives in one process namespace with its own network, mounts and host names. Its first process ends when the
test process closes a pipe, or dies, and the kernel then ends every process in it and frees the rest: nothing can be
left behind, and nothing of the machine's own is touched. Nodes share the file system, as on a cluster. Needs root, for
the namespaces, and SLURM's programs; :func:`missing` says what is not there.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "ip", "unshare", "nsenter")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random")

CONF = """\
ClusterName=test
SlurmctldHost=head(10.77.0.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
EnforcePartLimits=ALL
SlurmctldTimeout=30
SlurmdTimeout=6
KillWait=5
InactiveLimit=0
MinJobAge=3600
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=3,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""

BOOT = """\
set -eu
cd {folder}
mount --make-rprivate /
mount -t proc proc /proc
mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns
hostname head
mount --bind {folder}/hosts /etc/hosts
ip link set lo up
ip link add bridge0 type bridge && ip addr add 10.77.0.254/24 dev bridge0 && ip link set bridge0 up
munged --key-file={folder}/munge/key --socket={folder}/munge/socket --pid-file={folder}/munge/pid \
  --log-file={folder}/munge/log --seed-file={folder}/munge/seed
slurmctld
for i in {numbers}; do
  ip netns add n$i
  ip link add to-n$i type veth peer name eth0 netns n$i
  ip link set to-n$i master bridge0 up
  ip -n n$i addr add 10.77.0.$i/24 dev eth0
  ip -n n$i link set eth0 up
  ip -n n$i link set lo up
  ip netns exec n$i unshare --uts --mount sh -c "hostname n$i; exec slurmd -N n$i"
done
echo started
while read -r _; do :; done
"""


@cache
def missing() -> str:
    """What is not there to start a SLURM; empty where all is."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        packages = "slurmctld slurmd slurm-client munge iproute2"
        return f"no SLURM here: {', '.join(absent)} not found (Debian: apt-get install {packages})"
    probe = ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "true"]
    if subprocess.run(probe, capture_output=True).returncode:
        return "this user may not make namespaces, which the nodes of the test's SLURM live in (run as root)"
    return ""


@dataclass
class Job:
    """A job as SLURM shows it."""

    state: str
    restarts: int
    nodes: str
    reason: str


class Cluster:
    """The cluster, from :meth:`start` to :meth:`stop`.

    Args:
        nodes: how many, named n1, n2, ...
        cpus: of each node, whatever the machine has.
        gpus: of each node; they are device files that every machine has.
    """

    def __init__(self, *, nodes: int = 4, cpus: int = 4, gpus: int = 2) -> None:
        self.nodes, self.cpus, self.gpus = nodes, cpus, gpus
        # munge wants a socket that all may reach, which a folder of pytest's is not, and of a short name.
        self.folder = Path(tempfile.mkdtemp(prefix="disttrain-slurm-"))
        self.folder.chmod(0o755)
        self._outer: subprocess.Popen[bytes] | None = None
        self._inner = 0

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        numbers = range(1, self.nodes + 1)
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        addresses = [f"10.77.0.{number} n{number}" for number in numbers]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", "10.77.0.254 head", *addresses, ""]))
        shape = f"CPUs={self.cpus} Sockets=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory=4000"
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        lines = [f"NodeName=n{number} NodeAddr=10.77.0.{number} {shape}{gres} State=UNKNOWN" for number in numbers]
        (self.folder / "slurm.conf").write_text(CONF.format(folder=self.folder, nodes="\n".join(lines)))
        # Named and never used: without it, slurmd looks for a systemd that is not there.
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        devices = ",".join(_DEVICES[: self.gpus])
        (self.folder / "gres.conf").write_text(
            f"NodeName=n[1-{self.nodes}] Name=gpu File={devices}\n" if self.gpus else ""
        )
        boot = BOOT.format(folder=self.folder, numbers=" ".join(map(str, numbers)))
        log = self.folder / "boot.log"
        with open(log, "wb") as file:
            self._outer = subprocess.Popen(
                ["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "bash", "-c", boot],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=self.environ,
                start_new_session=True,
            )
        outer = self._outer
        wait_until(lambda: "started" in log.read_text() or outer.poll() is not None, 60, self.logs)
        assert outer.poll() is None, self.logs()
        self._inner = psutil.Process(outer.pid).children()[0].pid
        wait_until(lambda: self.idle() == self.nodes, 60, self.logs)

        self._write_commands()

    def _write_commands(self) -> None:
        """SLURM's commands for a process of the machine: each runs inside, and hands on no trace of being a cover."""
        (self.folder / "bin").mkdir()
        for name in ("sbatch", "squeue", "scontrol", "sinfo", "scancel"):
            cover = self.folder / "bin" / name
            inside = " ".join(shlex.quote(word) for word in self._inside)
            words = f"PATH={shlex.quote(self.environ['PATH'])} SLURM_CONF={self.folder}/slurm.conf"
            cover.write_text(f'#!/bin/sh\nexport {words}\nexec {inside} --wd="$PWD" {name} "$@"\n')
            cover.chmod(0o755)

    @property
    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self._inner), "--mount", "--net", "--uts", "--pid"]

    def stop(self) -> None:
        """End every process of the cluster, and remove its files."""
        if self._outer is not None and self._outer.stdin is not None:
            self._outer.stdin.close()
            try:
                self._outer.wait(20)
            except subprocess.TimeoutExpired:
                self._outer.kill()  # and with it, by --kill-child, the first process of the namespace
                self._outer.wait()
            self._outer = None
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environ(self) -> dict[str, str]:
        """Of commands that talk to this cluster."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        return own | {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": _PATH, "PYTHONPATH": str(ROOT)}

    def run(
        self, arguments: Sequence[str], *, folder: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as on the cluster's login node."""
        words = [*self._inside, f"--wd={folder or ROOT}", *arguments]
        done = subprocess.run(words, capture_output=True, text=True, env=self.environ, timeout=120)
        assert not check or done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stderr}"
        return done

    def disttrain(
        self, *arguments: str, folder: Path | None = None, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run ``disttrain ARGUMENTS`` there."""
        return self.run([sys.executable, "-m", "disttrain", *arguments], folder=folder, check=check)

    @contextmanager
    def as_here(self) -> Iterator[None]:
        """This process has the cluster's commands, as on its login node."""
        before = os.environ["PATH"]
        os.environ["PATH"] = f"{self.folder / 'bin'}:{before}"
        try:
            yield
        finally:
            os.environ["PATH"] = before

    def job(self, number: str) -> Job:
        """How a job stands."""
        shown = self.run(["scontrol", "-o", "show", "job", number]).stdout
        about = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        return Job(about["JobState"], int(about.get("Restarts", 0)), about.get("NodeList", ""), about.get("Reason", ""))

    def idle(self) -> int:
        """How many nodes are free."""
        done = self.run(["sinfo", "--noheader", "--Node", "--partition=main", "--format=%T"], check=False)
        return done.stdout.split().count("idle")

    def settle(self) -> None:
        """Cancel all jobs, repair all nodes, and wait until these are idle."""
        self.run(["bash", "-c", "scancel --quiet $(squeue --noheader --format=%A | sort -u) || true"])
        for number in range(1, self.nodes + 1):
            self.heal(f"n{number}")
        self.run(["scontrol", "update", f"NodeName=n[1-{self.nodes}]", "State=RESUME"], check=False)
        wait_until(lambda: self.idle() == self.nodes, 60, lambda: self.run(["sinfo", "-N", "-l"]).stdout + self.logs())

    def wait_state(self, number: str, *states: str, timeout: float = 120, log: Path | None = None) -> Job:
        """Wait until a job is in one of these states."""
        wait_until(
            lambda: self.job(number).state in states,
            timeout,
            lambda: f"job {number}: {self.job(number)}, not {states}\n{log.read_text() if log else ''}\n{self.logs()}",
        )
        return self.job(number)

    def wait_done(self, number: str, *, timeout: float = 180, log: Path | None = None) -> None:
        """Wait until a job is completed; fail with its output where it ends otherwise."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        job = self.wait_state(number, *over, timeout=timeout, log=log)
        assert job.state == "COMPLETED", f"{job}\n{log.read_text() if log else ''}\n{self.logs()}"

    def kill_node(self, name: str) -> None:
        """A node dies at once, with all of its processes."""
        self.run(["bash", "-c", f"kill -KILL $(ip netns pids {name})"])

    def cut(self, name: str) -> None:
        """A node loses its network; its processes go on."""
        self.run(["ip", "link", "set", f"to-{name}", "down"])

    def heal(self, name: str) -> None:
        """A node has its network again, and its daemon."""
        self.run(["ip", "link", "set", f"to-{name}", "up"])
        if not self.run(["ip", "netns", "pids", name]).stdout.split():
            start = f"hostname {name}; exec slurmd -N {name}"
            self.run(["ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh", "-c", start])

    @contextmanager
    def holding(self, name: str, ports: Sequence[int]) -> Iterator[None]:
        """Another program listens at some ports of a node's address."""
        address = f"10.77.0.{name.removeprefix('n')}"
        script = f"import socket, sys; kept = [socket.create_server(({address!r}, p)) for p in {list(ports)}]"
        command = ["ip", "netns", "exec", name, sys.executable, "-c", f"{script}; print(flush=True); sys.stdin.read()"]
        pipe = subprocess.PIPE
        with subprocess.Popen([*self._inside, *command], stdin=pipe, stdout=pipe, env=self.environ) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline(), f"the ports {ports} could not be taken"
            yield  # the pipe is closed at the end, and with it the program

    def processes_of(self, name: str, word: str) -> list[str]:
        """Processes of a node whose command holds a word."""
        script = f"for p in $(ip netns pids {name}); do tr '\\0' ' ' </proc/$p/cmdline; echo; done"
        return [line for line in self.run(["bash", "-c", script]).stdout.splitlines() if word in line]

    def logs(self) -> str:
        """The last words of the daemons."""
        files = [self.folder / "boot.log", *sorted(self.folder.glob("*.log"))]
        return "\n".join(f"--- {one.name}\n{one.read_text()[-1500:]}" for one in dict.fromkeys(files) if one.exists())


def wait_until(condition: Callable[[], bool], timeout: float, why: Callable[[], str]) -> None:
    """Until a condition holds; what is then said comes from ``why``."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout} s:\n{why()}"
        time.sleep(0.2)
