"""``disttrain shards``: what each subcommand prints, returns and refuses."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from disttrain.commands.shards import main
from disttrain.data.index import read_manifest
from disttrain.data.sidecar import build_table, sidecar_path
from disttrain.errors import ConfigError, DataError

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
    write_tar(path, [f"{i:03}.{ext}" for i in range(num_samples) for ext in ("cls", "npy")])


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
    assert (code, lines) == (0, [f"{out} holds this packing already: 5 shards, 150 samples; nothing to do"])
    (out / "train-000001.tar").unlink()
    code, lines = run("pack", "sklearn:iris", out, "--shards", 3)
    assert lines[0] == f"train: 3 shards, 105 samples, 2 kept from before -> {out}/train.json"
    assert run("verify", out / "train.json", out / "val.json")[1] == ["4 shards, 128 samples: no faults"]


def test_pack_a_table_with_options(tmp_path: Path, run: Run) -> None:
    rows = "".join(f"{i},{i % 2},note {i},{i * i}\n" for i in range(40))
    (tmp_path / "t.csv").write_text("a,b,words,y\n" + rows)
    options = ("--target", "y", "--task", "regression", "--split", "0.5,0.5", "--split-seed", "3", "--prefix", "sq")
    code, lines = run("pack", tmp_path / "t.csv", tmp_path / "out", "--samples-per-shard", 7, *options)
    assert code == 0
    assert lines == [
        "note: left out columns that hold no numbers: words",
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


@pytest.mark.parametrize("command", ["pack", "index", "verify", "ls"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: disttrain shards {command}")
    assert len(text) > 400, "a help text that helps"


def test_what_the_user_can_mend_is_raised(tmp_path: Path, run: Run) -> None:
    with pytest.raises(DataError, match="did you mean 'iris'"):
        run("pack", "sklearn:irsi", tmp_path)
    with pytest.raises(ConfigError, match="split fractions"):
        run("pack", "sklearn:iris", tmp_path, "--split", "0.5,0.1")
    with pytest.raises(DataError, match="no file matches"):
        run("verify", tmp_path / "*.tar")
    with pytest.raises(DataError, match="does not exist"):
        run("ls", tmp_path / "t.json")
    with pytest.raises(ConfigError, match="--md5 has no manifest"):
        run("index", tmp_path / "t.tar", "--md5")
    write_plain(tmp_path / "t.tar")
    with pytest.raises(DataError, match=r"folder .* does not exist"):
        run("index", tmp_path / "t.tar", "--manifest", tmp_path / "none" / "t.json")


def test_index_writes_what_is_missing_stale_or_wrong(tmp_path: Path, run: Run) -> None:
    paths = [tmp_path / f"t-{number}.tar" for number in range(4)]
    for path in paths:
        write_plain(path)
    assert run("index", tmp_path / "t-{0..3}.tar") == (0, ["4 shards, 12 samples; sidecars: 4 written"])
    assert run("index", tmp_path / "t-*.tar") == (0, ["4 shards, 12 samples; sidecars: 4 right"])
    os.utime(paths[0], (2_000_000_000, 2_000_000_000))
    os.utime(sidecar_path(str(paths[0])), (1_000_000_000, 1_000_000_000))
    wrong = sidecar_path(str(paths[1]))
    wrong.write_text(wrong.read_text().replace("cls 512 ", "cls 513 "))
    sidecar_path(str(paths[2])).write_text("garbage")
    assert run("index", tmp_path / "t-*.tar")[1] == ["4 shards, 12 samples; sidecars: 3 written, 1 right"]
    assert "cls 512 " in wrong.read_text()


def test_index_writes_a_manifest(data: Path, run: Run) -> None:
    shards = read_manifest(data / "t.json")
    assert [(shard.num_samples, len(shard.md5)) for shard in shards] == [(2, 32), (3, 32), (4, 32)]
    lines = run("index", data / "t.json", "--manifest", data / "u.json")[1]
    assert lines == ["3 shards, 9 samples; sidecars: 3 right", f"manifest: {data}/u.json"]
    assert [shard.md5 for shard in read_manifest(data / "u.json")] == ["", "", ""]


def test_index_tells_where_it_could_not_write(tmp_path: Path, run: Run) -> None:
    write_tar(tmp_path / "t.tar", ["two words.cls"])
    lines = run("index", tmp_path / "t.tar")[1]
    assert lines[0] == "1 shard, 1 sample; sidecars: 1 not writable"
    assert "white space" in lines[1]


def test_verify_of_sound_data(data: Path, run: Run) -> None:
    assert run("verify", data / "t.json") == (0, ["3 shards, 9 samples: no faults"])
    assert run("verify", data / "t-*.tar", "--fields", "cls, jpg;npy") == (0, ["3 shards, 9 samples: no faults"])


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
    write_tar(Path(shard[3]), ["a.cls", "a.npy", "b.cls", "a.npy", "c.cls", "c.npy", "c.npy"])
    os.unlink(shard[4])
    content = bytearray(Path(shard[5]).read_bytes())
    content[512] = 9
    Path(shard[5]).write_bytes(content)
    os.utime(shard[5], (1_000_000_000, 1_000_000_000))  # the change itself is to be found, not its time
    os.utime(idx[6], (1_000_000_000, 1_000_000_000))
    Path(idx[7]).write_text(Path(idx[7]).read_text().replace("npy 1536", "npy 1537"))
    Path(idx[8]).write_text("v1.2 1\ncls 512 99999 000.cls\n")
    code, lines = run("verify", tmp_path / "t.json")
    mend = "run `disttrain shards index`"
    text = "\n".join(lines)
    expected = [
        f"shard {shard[1]} at byte 3072: a header is cut off; the file ends at byte 3172",
        f"shard {shard[1]} has 3172 bytes, but its manifest says 10240",
        f"shard {shard[2]} at byte 8192: the end block is missing; the file ends at byte 8192",
        f"shard {shard[2]} has 8192 bytes, but its manifest says 10240",
        f"shard {shard[3]} at byte 3584: sample 'a' occurs twice, apart",
        f"shard {shard[3]} at byte 6656: sample 'c' has field 'npy' twice",
        f"shard {shard[3]} at byte 2560: sample 'b' lacks field 'npy', has cls",
        f"shard {shard[3]} holds 3 samples, but its manifest says 4",
        f"shard {shard[4]} does not exist",
        f"sidecar {idx[6]} is older than its shard and not used: {mend}",
        f"sidecar {idx[7]} does not fit its shard: sample '000' is cls at byte 512 of size 1,"
        f" npy at byte 1536 of size 1 in the shard, cls at byte 512 of size 1, npy at byte 1537 of size 1"
        f" in the sidecar: {mend}",
        f"sidecar {idx[8]} is damaged or points outside its shard: {mend}",
    ]
    for fault in expected:
        assert fault in lines, f"not named: {fault}\n{text}"
    by_md5 = [line for line in lines if "has MD5" in line]
    assert [line.split()[1] for line in by_md5] == [shard[3], shard[5]], text
    assert lines[-1] == f"9 shards, {4 + 2 + 4 + 3 + 0 + 4 * 4} samples: 14 faults", text
    assert code == 1


def test_verify_names_missing_fields(data: Path, run: Run) -> None:
    code, lines = run("verify", data / "t-0.tar", "--fields", "cls,image.npy")
    assert code == 1
    assert lines == [
        f"shard {data}/t-0.tar: no sample has field 'image.npy'; did you mean 'npy'?",
        "1 shard, 2 samples: 1 fault",
    ]


def test_verify_of_files_that_are_no_shards(tmp_path: Path, run: Run) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b" * 600)
    write_tar(tmp_path / "c.tar", ["no_extension"])
    code, lines = run("verify", tmp_path / "*.tar")
    assert code == 1
    assert lines == [
        f"shard {tmp_path}/a.tar at byte 0: the file is empty; the file ends at byte 0",
        f"shard {tmp_path}/b.tar at byte 0: not a tar file (a compressed one must be unpacked)",
        f"shard {tmp_path}/c.tar holds no samples",
        "3 shards, 0 samples: 3 faults",
    ]


def test_ls(data: Path, run: Run) -> None:
    code, lines = run("ls", data / "t.json")
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert cells == [
        [f"{data}/t-0.tar", "2", "10,240", "cls, npy"],
        [f"{data}/t-1.tar", "3", "10,240", "cls, npy"],
        [f"{data}/t-2.tar", "4", "10,240", "cls, npy"],
        ["3 shards", "9", "30,720", ""],
    ]
    code, lines = run("ls", data / "t-0.tar", "--samples")
    assert lines == [f"{data}/t-0.tar 000 cls:1 npy:1", f"{data}/t-0.tar 001 cls:1 npy:1"]


def test_ls_writes_nothing(tmp_path: Path, run: Run) -> None:
    write_plain(tmp_path / "t.tar")
    assert len(build_table(str(tmp_path / "t.tar"))) == 3
    run("ls", tmp_path / "t.tar")
    assert os.listdir(tmp_path) == ["t.tar"]


def test_the_command_imports_nothing_heavy() -> None:
    script = (
        "import sys; from disttrain.commands.shards import main;"
        "print(sorted({'torch', 'lightning', 'webdataset', 'sklearn', 'pyarrow', 'pandas'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.stdout.strip() == "[]", f"heavy imports: {ended.stdout}{ended.stderr}"
