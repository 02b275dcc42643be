"""What the doctor concludes from the figures of several ranks and nodes."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from disttrain.distributed.world import World
from disttrain.doctor import judge
from disttrain.doctor.examine import Report
from disttrain.doctor.finding import Finding, failure, ok, size, warning, worst
from disttrain.doctor.judge import Link
from disttrain.doctor.table import merge, print_report, summary

SPEEDS = {"all_reduce": 1e9, "all_gather": 0.9e9, "latency": 2e-4}


def facts(host: str, **changed: dict[str, str]) -> dict[str, Any]:
    usual = {"host": host, "versions": {"torch": "2.13.0"}, "code": {"source": "a"}, "config": {}, "environment": {}}
    usual |= {"system": {"kernel": "6.1.0"}}
    return usual | changed


def test_ranks_that_are_alike() -> None:
    (finding,) = judge.compare_facts([facts("n1"), facts("n1"), facts("n2")])
    assert finding.status == "ok"
    assert "3 ranks on 2 nodes" in finding.said


@pytest.mark.parametrize(
    ("changed", "check", "status", "said"),
    [
        (
            {"versions": {"torch": "2.12.0"}},
            "versions",
            "failure",
            "torch: 2.13.0 on rank 0-1 (n1); 2.12.0 on rank 2 (n2)",
        ),
        ({"code": {"source": "b"}}, "code", "failure", "source: a on rank 0-1 (n1); b on rank 2 (n2)"),
        ({"config": {"x.yaml": "f"}}, "configuration", "failure", "x.yaml: missing on rank 0-1 (n1); f on rank 2"),
        (
            {"environment": {"NCCL_P2P_DISABLE": "1"}},
            "environment",
            "warning",
            "NCCL_P2P_DISABLE: missing on rank 0-1",
        ),
    ],
)
def test_what_differs_is_named(changed: dict[str, Any], check: str, status: str, said: str) -> None:
    (finding,) = judge.compare_facts([facts("n1"), facts("n1"), facts("n2", **changed)])
    assert (finding.check, finding.status) == (check, status)
    assert said in finding.said
    assert finding.hint


def test_clocks() -> None:
    hosts = {0: "n1", 1: "n1", 2: "n2"}
    assert judge.compare_clocks({0: 100.0, 1: 100.01, 2: 99.9}, hosts).status == "ok"
    finding = judge.compare_clocks({0: 100.0, 1: 100.01, 2: 40.0}, hosts)
    assert finding.status == "warning"
    assert "clock of n2 is -60.0 s off from that of n1" in finding.said


def test_a_slow_rank_is_slow_among_two_and_among_many() -> None:
    hosts = {rank: f"n{rank // 2}" for rank in range(8)}
    usual = {rank: 0.010 + rank * 1e-4 for rank in range(8)}
    assert [each.status for each in judge.compare_speeds(usual, hosts)] == ["ok"]
    (finding,) = judge.compare_speeds(usual | {6: 0.030}, hosts)
    assert finding.status == "warning"
    assert finding.said.startswith("rank 6 (n3) takes 2.9 times as long"), finding.said
    (finding,) = judge.compare_speeds({0: 0.050, 1: 0.010}, {0: "n0", 1: "n1"})
    assert finding.said.startswith("rank 0 (n0) takes 5.0 times as long"), finding.said


@pytest.mark.parametrize(
    ("backend", "link", "slowest"),
    [
        ("gloo", Link("interface", 1.25e9), 0.3e9),
        ("gloo", Link("interface", 0.0), 9e6),  # it tells no speed
        ("nccl", Link("InfiniBand", 50e9), 12e9),
        ("nccl", Link("NVLink", 450e9, inside=True), 44e9),
        ("nccl", Link("PCIe", 31.5e9, inside=True), 3e9),
        ("gloo", Link("one TCP connection within the node", 4e9, inside=True), 0.07e9),
    ],
)
def test_links_are_judged_by_what_they_should_carry(backend: str, link: Link, slowest: float) -> None:
    speeds = SPEEDS | {"all_reduce": slowest, "all_gather": slowest / 2}
    slow = judge.judge_links(speeds, backend=backend, link=link)
    assert (slow.status, bool(slow.hint)) == ("warning", True)
    assert link.name in slow.said if link.speed else "0.00 GB/s" not in slow.said
    well = judge.judge_links(speeds | {"all_reduce": 1.2 * slowest}, backend=backend, link=link)
    assert well.status == "ok", "the faster of the two counts"
    assert "latency 200 us" in well.said
    late = judge.judge_links({"all_reduce": 1e12, "all_gather": 1e12, "latency": 5.0}, backend=backend, link=link)
    assert (late.status, "latency 5,000,000 us" in late.said) == ("warning", True)


def test_drivers_and_kernels() -> None:
    def found(**changed: str) -> list[tuple[str, str]]:
        other = {"kernel": "6.1.0", "NVIDIA driver": "550.54.15"} | changed
        here = {"kernel": "6.1.0", "NVIDIA driver": "550.54.15"}
        return [
            (each.check, each.status)
            for each in judge.compare_facts([facts("a", system=here), facts("b", system=other)])
        ]

    assert found() == [("ranks", "ok")]
    assert found(kernel="6.2.0") == [("ranks", "ok"), ("kernel", "ok")]
    (finding,) = judge.compare_facts([facts("a", system={"NVIDIA driver": "550.1.2"}), facts("b", system={})])
    assert finding.status == "warning"
    assert finding.said.endswith("NVIDIA driver: 550.1.2 on rank 0 (a); missing on rank 1 (b)")


def test_findings_of_many_nodes_are_one_line_each() -> None:
    findings = [Finding("memory", "ok", f"{n} GiB free", host=f"n{n}") for n in range(5)]
    findings += [Finding("shared memory", "failure", "full", "empty it", host=f"n{n}") for n in range(6)]
    findings += [Finding("memory", "warning", "little", "get more", host="n7")]
    merged = merge(findings)
    assert [(each.check, each.status) for each in merged] == [
        ("memory", "ok"),
        ("memory", "warning"),
        ("shared memory", "failure"),
    ]
    assert merged[0].said == "0 GiB free\n1 GiB free\n2 GiB free\nand 2 more"
    assert merged[2].said == "n0, n1, n2, n3 and 2 more: full"
    assert summary(findings) == "1 failure, 1 warning"


def test_the_table_has_the_hint_below_what_was_found() -> None:
    report = Report(World(), [failure("port", "port 1 is in use", "use another"), ok("memory", "enough")])
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(report, console)
    lines = console.export_text().splitlines()
    places = [next(i for i, line in enumerate(lines) if word in line) for word in ("enough", "FAILURE", "hint: use")]
    assert places == sorted(places), "\n".join(lines)
    assert lines[-1] == "disttrain doctor: 1 failure"
    print_report(Report(World(), [ok("a", "one\x1b"), ok("a", "two")]), console)
    assert "one\\x1b" in (text := console.export_text())
    assert "\\x0a" not in text


def test_the_gravest_status_counts() -> None:
    assert worst([]) == "ok"
    assert worst([ok("a", "b"), warning("c", "d", "e")]) == "warning"
    assert worst([failure("a", "b", "c"), warning("c", "d", "e")]) == "failure"
    assert [size(number) for number in (5, 2**20, 1.5 * 2**30, 2**41)] == ["5 bytes", "1 MiB", "1.5 GiB", "2048.0 GiB"]
