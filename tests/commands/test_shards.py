"""``disttrain shards``: what each subcommand prints, returns and refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from disttrain.commands.shards import main
from disttrain.data.index.shard_index import read_manifest
from disttrain.data.index.sidecar import build_table, sidecar_path
from disttrain.errors import ConfigError, DataError
from tests.support.servers import range_server

ROOT = Path(__file__).parents[2]
Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; gives its exit code and the lines that it printed."""

    def call(*arguments: object) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, capsys.readouterr().out.splitlines()

    return call


def write_tar(path: Path, names: list[str], content: bytes = b"1") -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_plain(path: Path, num_samples: int = 3) -> None:
    write_tar(path, [f"{path.stem}/{i:03}.{ext}" for i in range(num_samples) for ext in ("cls", "txt")])


@pytest.fixture
def data(tmp_path: Path, run: Run) -> Path:
    """Three indexed shards with a manifest."""
    for number in range(3):
        write_plain(tmp_path / f"t-{number}.tar", number + 2)
    assert run("index", tmp_path / "t-*.tar", "--manifest", tmp_path / "t.json", "--md5")[0] == 0
    return tmp_path


def test_pack_and_pack_again(tmp_path: Path, run: Run) -> None:
    out = tmp_path / "out"
    code, lines = run("pack", "sklearn:iris", out, "--shards", 3)
    assert code == 0
    assert lines == [
        f"train: 3 shards, 105 samples -> {out}/train.json",
        f"val: 1 shard, 23 samples -> {out}/val.json",
        f"test: 1 shard, 22 samples -> {out}/test.json",
    ]
    assert json.loads((out / "classes.json").read_text()) == ["setosa", "versicolor", "virginica"]
    code, lines = run("pack", "sklearn:iris", out, "--shards", 3)
    assert (code, lines) == (0, [f"{out} already holds this packing: 5 shards, 150 samples; nothing to do"])
    (out / "train-000001.tar").unlink()
    code, lines = run("pack", "sklearn:iris", out, "--shards", 3)
    assert lines[0] == f"train: 3 shards, 105 samples, 2 already present -> {out}/train.json"
    assert run("verify", out / "train.json", out / "val.json")[1] == ["4 shards, 128 samples: no faults"]


def test_pack_a_table_with_options(tmp_path: Path, run: Run) -> None:
    rows = "".join(f"{i},{i % 2},note {i},{i * i}\n" for i in range(40))
    (tmp_path / "t.csv").write_text("a,b,words,y\n" + rows)
    options = ("--target", "y", "--task", "regression", "--split", "0.5,0.5", "--split-seed", "3", "--prefix", "sq")
    code, lines = run("pack", tmp_path / "t.csv", tmp_path / "out", "--samples-per-shard", 7, *options)
    assert code == 0
    assert lines == [
        "note: skipped non-numeric columns: words",
        f"sq-train: 3 shards, 20 samples -> {tmp_path}/out/sq-train.json",
        f"sq-val: 3 shards, 20 samples -> {tmp_path}/out/sq-val.json",
    ]
    code, lines = run("pack", tmp_path / "t.csv", tmp_path / "one", "--target", "words", "--split", "none")
    assert lines == [f"data: 1 shard, 40 samples -> {tmp_path}/one/data.json"]
    assert len(json.loads((tmp_path / "one/classes.json").read_text())) == 40


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["pack", "sklearn:iris"],
        ["pack", "sklearn:iris", "out", "--shards", "0"],
        ["pack", "sklearn:iris", "out", "--shards", "2", "--samples-per-shard", "5"],
        ["pack", "sklearn:iris", "out", "--split", "half"],
        ["pack", "sklearn:iris", "out", "--task", "ranking"],
        ["index"],
        ["unknown"],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: disttrain shards" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["pack", "index", "verify", "ls", "stats"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: disttrain shards {command}")
    assert len(text) > 400, "a help text that helps"


def test_what_the_user_can_fix_is_raised(tmp_path: Path, run: Run) -> None:
    with pytest.raises(DataError, match="did you mean 'iris'"):
        run("pack", "sklearn:irsi", tmp_path)
    with pytest.raises(ConfigError, match="split fractions"):
        run("pack", "sklearn:iris", tmp_path, "--split", "0.5,0.1")
    with pytest.raises(DataError, match="no file matches"):
        run("verify", tmp_path / "*.tar")
    with pytest.raises(DataError, match="does not exist"):
        run("ls", tmp_path / "t.json")
    with pytest.raises(ConfigError, match="--md5 needs a manifest"):
        run("index", tmp_path / "t.tar", "--md5")
    write_plain(tmp_path / "t.tar")
    with pytest.raises(DataError, match=r"folder .* does not exist"):
        run("index", tmp_path / "t.tar", "--manifest", tmp_path / "none" / "t.json")


def test_index_writes_what_is_missing_stale_or_wrong(tmp_path: Path, run: Run) -> None:
    paths = [tmp_path / f"t-{number}.tar" for number in range(4)]
    for path in paths:
        write_plain(path)
    assert run("index", tmp_path / "t-{0..3}.tar") == (0, ["4 shards, 12 samples; sidecars: 4 written"])
    assert run("index", tmp_path / "t-*.tar") == (0, ["4 shards, 12 samples; sidecars: 4 unchanged"])
    assert run("index", tmp_path / "t-*.tar", "--force") == (0, ["4 shards, 12 samples; sidecars: 4 right"])
    os.utime(paths[0], (2_000_000_000, 2_000_000_000))
    os.utime(sidecar_path(str(paths[0])), (1_000_000_000, 1_000_000_000))
    wrong = sidecar_path(str(paths[1]))
    wrong.write_text(wrong.read_text().replace("cls 512 ", "cls 513 "))
    sidecar_path(str(paths[2])).write_text("garbage")
    assert run("index", tmp_path / "t-*.tar")[1] == ["4 shards, 12 samples; sidecars: 3 written, 1 unchanged"]
    assert "cls 512 " in wrong.read_text()


def test_index_writes_a_manifest(data: Path, run: Run) -> None:
    shards = read_manifest(data / "t.json")
    assert [(shard.num_samples, len(shard.md5)) for shard in shards] == [(2, 32), (3, 32), (4, 32)]
    lines = run("index", data / "t.json", "--manifest", data / "u.json")[1]
    assert lines == ["3 shards, 9 samples; sidecars: 3 unchanged", f"manifest: {data}/u.json"]
    assert [shard.md5 for shard in read_manifest(data / "u.json")] == ["", "", ""]


def test_index_keeps_md5s(data: Path, run: Run) -> None:
    before = read_manifest(data / "t.json")
    time.sleep(0.02)  # more than the grain of a file's times
    run("index", data / "t-*.tar", "--manifest", data / "t.json", "--md5")
    os.utime(data / "t-1.tar")
    time.sleep(0.02)
    told = "3 shards, 9 samples; sidecars: 1 written, 2 unchanged"
    lines = run("index", data / "t-*.tar", "--manifest", data / "t.json", "--md5")[1]
    assert lines == [told, f"manifest: {data}/t.json (1 hashed, 2 MD5 unchanged)"]
    assert read_manifest(data / "t.json") == before
    with pytest.raises(DataError, match="is not a shard manifest"):
        run("index", data / "t-*.tar", "--manifest", data / "t-0.idx")


def test_index_tells_where_it_could_not_write(tmp_path: Path, run: Run) -> None:
    write_tar(tmp_path / "t.tar", ["two words.cls"])
    lines = run("index", tmp_path / "t.tar")[1]
    assert lines[0] == "1 shard, 1 sample; sidecars: 1 not writable"
    assert "white space" in lines[1]


def test_verify_of_sound_data(data: Path, run: Run) -> None:
    assert run("verify", data / "t.json") == (0, ["3 shards, 9 samples: no faults"])
    assert run("verify", data / "t-*.tar", "--fields", "cls, jpg;txt") == (0, ["3 shards, 9 samples: no faults"])


def test_verify_names_every_fault(tmp_path: Path, run: Run) -> None:
    for number in range(9):
        write_plain(tmp_path / f"t-{number}.tar", 4)
    run("index", tmp_path / "t-*.tar", "--manifest", tmp_path / "t.json", "--md5")
    shard = [str(tmp_path / f"t-{number}.tar") for number in range(9)]
    idx = [str(sidecar_path(path)) for path in shard]
    for path in idx[1:5]:
        os.unlink(path)
    os.truncate(shard[1], 6 * 512 + 100)
    os.truncate(shard[2], 16 * 512)
    write_tar(Path(shard[3]), ["a.cls", "a.txt", "b.cls", "a.txt", "c.cls", "c.txt", "c.txt"])
    os.unlink(shard[4])
    content = bytearray(Path(shard[5]).read_bytes())
    content[512] = ord("9")
    Path(shard[5]).write_bytes(content)
    os.utime(shard[5], (1_000_000_000, 1_000_000_000))  # the change itself is to be found, not its time
    os.utime(idx[6], (1_000_000_000, 1_000_000_000))
    Path(idx[7]).write_text(Path(idx[7]).read_text().replace("txt 1536", "txt 1537"))
    Path(idx[8]).write_text("v1.2 1\ncls 512 99999 000.cls\n")
    code, lines = run("verify", tmp_path / "t.json")
    hint = "run `disttrain shards index`"
    text = "\n".join(lines)
    expected = [
        f"shard {shard[1]} at byte 3072: a header is cut off; the file ends at byte 3172",
        f"shard {shard[1]} has 3172 bytes, but its manifest says 10240",
        f"shard {shard[2]} at byte 8192: the end block is missing; the file ends at byte 8192",
        f"shard {shard[2]} has 8192 bytes, but its manifest says 10240",
        f"shard {shard[3]} at byte 3584: sample 'a' occurs twice, with other samples in between",
        f"shard {shard[3]} at byte 6656: sample 'c' has field 'txt' twice",
        f"shard {shard[3]} at byte 2560: sample 'b' lacks field 'txt', has cls",
        f"shard {shard[3]} holds 3 samples, but its manifest says 4",
        f"shard {shard[4]} does not exist",
        f"sidecar {idx[6]} is older than its shard and ignored: {hint}",
        f"sidecar {idx[7]} does not match its shard: sample 't-7/000' is cls at byte 512 of size 1,"
        f" txt at byte 1536 of size 1 in the shard, cls at byte 512 of size 1, txt at byte 1537 of size 1"
        f" in the sidecar: {hint}",
        f"sidecar {idx[8]} is damaged or points outside its shard: {hint}",
    ]
    for fault in expected:
        assert fault in lines, f"not named: {fault}\n{text}"
    by_md5 = [line for line in lines if "has MD5" in line]
    assert [line.split()[1] for line in by_md5] == [shard[3], shard[5]], text
    assert lines[-1] == f"9 shards, {4 + 2 + 4 + 3 + 0 + 4 * 4} samples: 14 faults", text
    assert code == 1


def test_verify_names_keys_of_several_shards(tmp_path: Path, run: Run) -> None:
    for name, numbers in (("a", range(4)), ("b", range(3, 9)), ("c", range(20, 22))):
        write_tar(tmp_path / f"{name}.tar", [f"{number}.cls" for number in numbers])
    code, lines = run("verify", tmp_path / "?.tar")
    assert (code, lines) == (
        0,
        [
            f"note: key '3' is in shard {tmp_path}/a.tar, and in shard {tmp_path}/b.tar",
            "3 shards, 12 samples: no faults",
        ],
    )
    write_tar(tmp_path / "c.tar", [f"{number}.cls" for number in range(2, 9)])
    code, lines = run("verify", tmp_path / "?.tar")
    assert lines[1] == f"note: key '2' is in shard {tmp_path}/a.tar, and in shard {tmp_path}/c.tar"
    assert lines[5:] == ["note: 7 keys in total occur in more than one shard", "3 shards, 17 samples: no faults"]


def test_verify_decodes(tmp_path: Path, run: Run) -> None:
    write_tar(tmp_path / "t.tar", ["0.cls", "0.npy", "0.mp4", "0.bin"])
    code, lines = run("verify", tmp_path / "t.tar")
    assert code == 1
    assert lines[0].startswith(f"shard {tmp_path}/t.tar at byte 1536: sample '0', field 'npy': not an npy array")
    assert lines[1:] == ["note: not decoded: field 'mp4': no decoder named 'mp4'", "1 shard, 1 sample: 1 fault"]
    assert run("verify", tmp_path / "t.tar", "--no-decode") == (0, ["1 shard, 1 sample: no faults"])
    code, lines = run("verify", tmp_path / "t.tar", "--fields", "cls, npy:txt, mp4:bytes")
    assert (code, lines) == (0, ["1 shard, 1 sample: no faults"])
    with pytest.raises(ConfigError, match="no decoder named 'numpy'"):
        run("verify", tmp_path / "t.tar", "--fields", "npy:numpy")


def test_verify_names_missing_fields(data: Path, run: Run) -> None:
    code, lines = run("verify", data / "t-0.tar", "--fields", "cls,text")
    assert code == 1
    assert lines == [
        f"shard {data}/t-0.tar: no sample has field 'text'; did you mean 'txt'?",
        "1 shard, 2 samples: 1 fault",
    ]


def test_verify_of_files_that_are_no_shards(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" * 600)
    write_tar(tmp_path / "c.tar", ["no_extension"])
    code, lines = run("verify", tmp_path / "*.tar")
    assert code == 1
    assert lines == [
        f"shard {tmp_path}/a.tar at byte 0: the file is empty",
        f"shard {tmp_path}/b.tar at byte 0: not a tar file (decompress it first if it is compressed)",
        f"shard {tmp_path}/c.tar holds no samples",
        "3 shards, 0 samples: 3 faults",
    ]


def test_ls(data: Path, run: Run) -> None:
    code, lines = run("ls", data / "t.json")
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        [f"{data}/t-0.tar", "2", "10,240", "cls, txt"],
        [f"{data}/t-1.tar", "3", "10,240", "cls, txt"],
        [f"{data}/t-2.tar", "4", "10,240", "cls, txt"],
        ["3 shards", "9", "30,720", ""],
    ]
    (data / "t-0.tar").rename(data / "t-[bold].tar")
    assert f"{data}/t-[bold].tar" in run("ls", data / "t-[bold].tar")[1][3], "not taken for a style"
    (data / "t-[bold].tar").rename(data / "t-0.tar")
    code, lines = run("ls", data / "t-0.tar", "--samples")
    assert lines == [f"{data}/t-0.tar t-0/000 cls:1 txt:1", f"{data}/t-0.tar t-0/001 cls:1 txt:1"]


def test_stats(data: Path, run: Run) -> None:
    write_tar(data / "u.tar", ["0.cls", "0.txt"], b"22")
    code, lines = run("stats", data / "t.json", data / "u.tar", "--classes")
    assert code == 0
    assert lines[0] == "4 shards, 10 samples, 1 to 4 per shard"
    assert lines[1] == "40 KiB in shards, of which 22 B in samples, the rest in headers and padding"
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [[name, "10", "1 B", "1 B", "2 B", "11 B"] for name in ("cls", "txt")]
    bars = [line.split() for line in lines if "█" in line]
    assert [bar[:-1] for bar in bars] == [
        ["2", "B", "9"],
        ["4", "B", "1"],
        ["10", "KiB", "4"],
        ["1", "9"],
        ["22", "1"],
    ]
    assert "samples by cls: 2 classes" in "\n".join(lines)
    write_tar(data / "v.tar", ["0.txt"])
    with pytest.raises(DataError, match="have no field cls; they have txt"):
        run("stats", data / "v.tar", "--classes")


def test_stats_of_many_classes(tmp_path: Path, run: Run) -> None:
    for number in range(100):
        write_tar(tmp_path / f"t-{number:02}.tar", [f"{n}.cls" for n in range(1 + number % 7)], b"%d" % number)
    lines = run("stats", tmp_path / "*.tar", "--classes")[1]
    start = next(number for number, line in enumerate(lines) if "samples by cls" in line)
    assert "100 classes, the 40 most frequent" in lines[start]
    assert [line.split()[1] for line in lines[start + 1 :]][:14] == ["7"] * 14


def test_remote_shards(data: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DISTTRAIN_CACHE", str(tmp_path / "cache"))
    with range_server(data) as server:
        pattern, secret = f"{server.url}/t-{{0..2}}.tar", f"{server.url}/t-0.tar?signature=secret"
        manifest = tmp_path / "remote.json"
        kept = f"tables kept in {tmp_path}/cache/disttrain-index-{os.geteuid()}"
        assert run("index", pattern, "--manifest", manifest, "--md5") == (
            0,
            [f"3 shards, 9 samples; {kept}: 3 written", f"manifest: {manifest} (3 hashed)"],
        )
        assert [shard.md5 for shard in read_manifest(manifest)] == [s.md5 for s in read_manifest(data / "t.json")]
        lines = run("index", pattern, data / "t-1.tar", "--manifest", manifest, "--md5")[1]
        assert lines[0] == f"4 shards, 12 samples; sidecars: 1 unchanged; {kept}: 3 unchanged"
        assert lines[1] == f"manifest: {manifest} (1 hashed, 3 MD5 unchanged)"
        assert run("verify", pattern) == (0, ["3 shards, 9 samples: no faults"])
        code, lines = run("verify", f"{server.url}/t.json", manifest)
        assert (code, lines[-1]) == (0, "7 shards, 21 samples: no faults")
        assert lines[0] == f"note: key 't-0/000' is in shard {server.url}/t-0.tar, which is listed twice"
        assert "2 shards, 5 samples, 2 to 3 per shard" in run("stats", f"{server.url}/t-{{0..1}}.tar", "--classes")[1]
        assert run("ls", pattern)[1][-2].split("│")[1].strip() == "3 shards"

        outputs = [run(command, secret)[1] for command in ("index", "verify", "ls", "stats")]
        outputs += [run("ls", "--samples", secret)[1], run("index", secret, "--manifest", tmp_path / "s.json")[1]]
        assert "signature" not in str(outputs)
        assert outputs[-1][-1].startswith("note: it contains URLs with a query or a user name")
        server.fail("t-0.tar", *["status:403"] * 9)
        with pytest.raises(DataError, match=r"t-0\.tar\?\.\.\.: HTTP 403") as caught:
            run("index", secret)
        assert "secret" not in str(caught.value)
        with pytest.raises(DataError, match="is a glob"):
            run("verify", f"{server.url}/t-*.tar")


def test_names_that_are_not_utf_8(tmp_path: Path, run: Run) -> None:
    write_tar(tmp_path / "t.tar", ["gr\udcf6sse.cls", "gr\udcf6sse.\udcfc"])
    assert run("ls", "--samples", tmp_path / "t.tar")[1] == [f"{tmp_path}/t.tar gr\\xf6sse cls:1 \\xfc:1"]
    assert "cls, \\xfc" in run("ls", tmp_path / "t.tar")[1][3]
    assert any("\\xfc" in line for line in run("stats", tmp_path / "t.tar")[1])
    assert run("index", tmp_path / "t.tar") == (0, ["1 shard, 1 sample; sidecars: 1 written"])
    assert run("verify", tmp_path / "t.tar")[1][-1] == "1 shard, 1 sample: no faults"


def test_ls_writes_nothing(tmp_path: Path, run: Run) -> None:
    write_plain(tmp_path / "t.tar")
    assert len(build_table(str(tmp_path / "t.tar"))) == 3
    for command in ("ls", "stats", "verify"):
        run(command, tmp_path / "t.tar")
    assert os.listdir(tmp_path) == ["t.tar"]


def test_the_command_imports_nothing_heavy() -> None:
    script = (
        "import sys; from disttrain.commands.shards import main;"
        "print(sorted({'torch', 'lightning', 'webdataset', 'sklearn', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.strip() == "[]", f"heavy imports: {ended.stdout}{ended.stderr}"
