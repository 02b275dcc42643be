"""Check this node: versions, processors, devices, memory, shared memory, limits. Takes milliseconds without CUDA."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Final

import psutil
import torch

from disttrain.distributed.consistency import versions
from disttrain.distributed.world import World
from disttrain.doctor.finding import Finding, failure, ok, size, warning
from disttrain.errors import ConfigError

_MIB: Final = 2**20
_GIB: Final = 2**30
_SMI_SECONDS: Final = 5.0


def examine_machine(world: World, *, shm: Path) -> list[Finding]:
    """Check what concerns the whole node. Called by its first rank.

    Args:
        world: provides the rank and the number of ranks on this node.
        shm: where shared memory is mounted.
    """
    found = [ok("versions", ", ".join(f"{name} {text}" for name, text in versions().items()))]
    found += [_processors(world), _memory(world), _shared_memory(shm), _open_files()]
    return found + _devices(world)


def _processors(world: World) -> Finding:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    load = os.getloadavg()[0]
    said = f"{usable} usable cores, {_plural(nodes, 'NUMA node')}, load {load:.1f}, {platform.machine()}"
    if usable < world.local_size:
        return warning(
            "processors",
            f"{said}: fewer cores than the {world.local_size} ranks of this node",
            "start fewer ranks, or request more cores (--cpus-per-task; taskset and cpuset limit them too)",
        )
    if load > 1.5 * usable + world.local_size:
        return warning(
            "processors",
            f"{said}: other processes are busy here",
            "check with `top`; SLURM's --exclusive keeps other jobs out",
        )
    return ok("processors", said)


def _memory(world: World) -> Finding:
    free = psutil.virtual_memory().available
    limit = cgroup_left()
    said = f"{size(free)} free of {size(psutil.virtual_memory().total)}"
    if limit is not None:
        said += f", {size(limit)} of it left for the job"
        free = min(free, limit)
    if free < world.local_size * _GIB:
        return warning(
            "memory",
            f"{said} for {_plural(world.local_size, 'rank')}",
            "a rank needs about 1 GiB for PyTorch alone: stop other processes, or request more memory (--mem)",
        )
    return ok("memory", said)


def cgroup_left(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory left in this process's cgroups and their parents, or None if unlimited.

    On a bare node the limit is set on the job's cgroup, a parent of the process's; in a container mostly at the root.
    Inactive page cache counts as free.

    Args:
        root: the folder that contains ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, own = line.split(":", 2)
        if controllers == "":
            top, names, kept = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            kept = "total_inactive_file"
        else:
            continue
        parts = [part for part in own.split("/") if part not in ("", "..")]
        for depth in range(len(parts) + 1):
            folder = top.joinpath(*parts[:depth])
            with suppress(OSError, ValueError):  # missing, or "max"
                most, used = (int((folder / name).read_text()) for name in names)
                if most < psutil.virtual_memory().total:
                    left.append(max(0, most - used + _kept(folder / "memory.stat", kept)))
    return min(left, default=None)


def _kept(stat: Path, name: str) -> int:
    with suppress(OSError):
        for line in stat.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _shared_memory(shm: Path) -> Finding:
    hint = (
        f"delete what dead processes left in {shm}; in a container, enlarge it: --shm-size=8g or --ipc=host in Docker,"
        " an emptyDir with medium Memory in Kubernetes"
    )
    try:
        free = shutil.disk_usage(shm).free
        probe = shm / f".disttrain-doctor-{os.getpid()}"
        try:
            with open(probe, "wb") as file:
                file.write(bytes(_MIB))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        return failure("shared memory", f"{shm} cannot be written: {error.strerror}", hint)
    said = f"{size(free)} free in {shm}"
    if free < 64 * _MIB:
        return failure("shared memory", f"{said}: NCCL and worker processes need more", hint)
    return warning("shared memory", said, hint) if free < _GIB else ok("shared memory", said)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        return warning("open files", f"at most {soft} (hard limit {hard})", "raise the limit: ulimit -n 65536")
    return ok("open files", f"at most {soft:,}")


def _devices(world: World) -> list[Finding]:
    if not torch.cuda.is_available():
        if _smi("--list-gpus"):
            return [
                failure(
                    "devices",
                    f"nvidia-smi lists GPUs, but PyTorch {torch.__version__} sees none",
                    "install the PyTorch build for this driver's CUDA version; in a container, pass --gpus all",
                )
            ]
        return [ok("devices", "no GPU: ranks use the CPU and gloo")]
    number = torch.cuda.device_count()
    names = {torch.cuda.get_device_name(i) for i in range(number)}
    driver = _smi("--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown"
    found = [ok("devices", f"{number} x {', '.join(sorted(names))}, driver {driver}")]
    try:
        world.check_devices(number)
    except ConfigError as error:
        return [*found, failure("devices", error.what, error.hint)]
    if number > world.local_size > 1:
        hint = f"start {number} ranks per node, or hide the other GPUs with CUDA_VISIBLE_DEVICES"
        found.append(warning("devices", f"{number - world.local_size} of {number} GPUs have no rank", hint))
    pairs = [(i, j) for i in range(number) for j in range(number) if i != j]
    apart = [pair for pair in pairs if not torch.cuda.can_device_access_peer(*pair)]
    if apart and world.local_size > 1:
        hint = "check `nvidia-smi topo -m`; IOMMU or ACS in the BIOS, or a virtual machine, may prevent it"
        found.append(warning("topology", f"{len(apart)} of {len(pairs)} pairs of GPUs have no direct access", hint))
    elif pairs:
        found.append(ok("topology", f"all {_plural(number, 'GPU')} have direct access to each other"))
    return found


def examine_device(world: World) -> list[Finding]:
    """Check free memory of this rank's GPU. Every rank calls it."""
    if not torch.cuda.is_available() or world.local_rank >= torch.cuda.device_count():
        return []
    free, total = torch.cuda.mem_get_info(world.local_rank)
    said = f"GPU {world.local_rank}: {size(free)} free of {size(total)}"
    if free < 0.9 * total:
        return [warning("GPU memory", said, "another process holds the rest: check with `nvidia-smi`")]
    return [ok("GPU memory", said)]


def system_facts() -> dict[str, str]:
    """Return the kernel and GPU driver versions, read from files because starting a program takes seconds."""
    found = {"kernel": platform.release()}
    with suppress(OSError):
        driver = driver_of(Path("/proc/driver/nvidia/version").read_text())
        found |= {"NVIDIA driver": driver} if driver else {}
    return found


def driver_of(text: str) -> str:
    """Extract the version from the driver's version file; empty if there is none."""
    found = re.search(r"Kernel Module\b.*?\s(\d{3,}(?:\.\d+)+)\s", text)
    return found[1] if found else ""


def gpu_link() -> tuple[str, float]:
    """Return how this node's GPUs are linked and the bytes per second that nvidia-smi reports; 0 if it reports none."""
    if speed := nvlink_speed(_smi("nvlink", "--status", "--id=0")):
        return "NVLink", speed
    return "PCIe", pcie_speed(_smi("--query-gpu=pcie.link.gen.max,pcie.link.width.current", "--format=csv,noheader"))


def nvlink_speed(text: str) -> float:
    """Return the bytes per second of all links of the first GPU, from ``nvidia-smi nvlink --status``."""
    first = text.partition("\nGPU ")[0]
    return sum(float(each) for each in re.findall(r"Link \d+: ([\d.]+) GB/s", first)) * 1e9


def pcie_speed(text: str) -> float:
    """Return the bytes per second of the first GPU, from its ``generation, lanes``."""
    found = re.match(r"(\d+), (\d+)", text)
    # A PCIe 3.0 lane carries 0.985 GB/s; each later generation doubles it.
    return 0.985e9 * 2.0 ** (int(found[1]) - 3) * int(found[2]) if found else 0.0


def _smi(*arguments: str) -> str:
    """Return the output of nvidia-smi; empty if it is missing or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
