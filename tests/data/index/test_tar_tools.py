"""Tars as real tools write them: GNU tar, bsdtar, Python's tarfile and webdataset, read as webdataset reads them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from disttrain.data.index.sidecar import build_table, fitting_sidecar, write_sidecar_file
from disttrain.data.index.tar import Member
from disttrain.data.index.tar_header import BLOCK
from disttrain.errors import ShardError
from tests.support.shards import write_shard
from tests.support.tars import Contents, scan_members, webdataset_contents

Tool = Callable[[Path, Path, list[str]], None]

LONG = "d" * 90 + "/" + "e" * 20 + "/" + "n" * 60  # the prefix field of ustar holds its folders
LONGER = "/".join("d" * 80 for _ in range(3)) + "/" + "n" * 120  # more than 256 characters, for GNU and PAX only
FILES = {
    "000.cls": b"1",
    "000.jpg": b"\xff\xd8" * 700,
    "001.JPG": b"upper",
    "001.seg.left.png": b"",
    "cats.v2/000.cls": b"dot in a folder",
    "cats.v2/000.jpg": b"j" * 512,
    "größe/ключ.txt": b"not ASCII",
    "sub/deep/000.cls": b"2" * 1024,
    f"{LONG}.cls": b"long",
    f"{LONG}.image.npy": b"long too",
    "no_extension": b"belongs to no sample",
    "sub/no_extension": b"nor does this",
}
DOTTED = {
    ".hidden.txt": b"a dot file",
    "sub/.DS_Store.x": b"what macOS leaves",
    "sub/._000.jpg": b"AppleDouble",
    "__MACOSX/._000.jpg": b"AppleDouble, as its archives hold it",
}


def gnu_tar(format: str) -> Tool:
    def write(path: Path, folder: Path, names: list[str]) -> None:
        (folder.parent / "list").write_text("\n".join(names))
        command = [
            "tar",
            f"--format={format}",
            "--no-recursion",
            "-cf",
            path,
            "-C",
            folder,
            "-T",
            folder.parent / "list",
        ]
        subprocess.run(command, check=True, capture_output=True)

    return write


def bsdtar(format: str) -> Tool:
    def write(path: Path, folder: Path, names: list[str]) -> None:
        (folder.parent / "list").write_text("\n".join(names))
        command = ["bsdtar", "--format", format, "-n", "-cf", path, "-C", folder, "-T", folder.parent / "list"]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "LC_ALL": "C.UTF-8"})

    return write


def python_tar(format: int) -> Tool:
    def write(path: Path, folder: Path, names: list[str]) -> None:
        with tarfile.open(path, "w", format=format) as tar:
            for name in names:
                tar.add(folder / name, name, recursive=False)

    return write


TOOLS: dict[str, Tool] = {
    **{f"GNU {format}": gnu_tar(format) for format in ("v7", "oldgnu", "gnu", "ustar", "posix")},
    **{f"bsdtar {format}": bsdtar(format) for format in ("v7", "gnutar", "ustar", "pax")},
    "tarfile ustar": python_tar(tarfile.USTAR_FORMAT),
    "tarfile gnu": python_tar(tarfile.GNU_FORMAT),
    "tarfile pax": python_tar(tarfile.PAX_FORMAT),
}


def needs(tool: str) -> None:
    """Skip where a tool's program is not installed, or not the one that is meant."""
    program = {"GNU": "tar", "bsdtar": "bsdtar"}.get(tool.partition(" ")[0])
    if program is None:
        return
    if shutil.which(program) is None:
        pytest.skip(
            f"{program} is not installed (apt-get install {'libarchive-tools' if program == 'bsdtar' else 'tar'})"
        )
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    if tool.startswith("GNU") and "GNU tar" not in told:
        pytest.skip(f"the tar here is not GNU's: {told.splitlines()[0]}")


def fill(folder: Path, files: dict[str, bytes]) -> list[str]:
    """Write files; gives their names and those of their folders, so ordered that samples stay together."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found = {str(parent) for name in files for parent in list(Path(name).parents)[:-1]}
    return sorted(found | set(files))


def contents(path: Path) -> Contents:
    """Keys, fields and bytes by the table."""
    data = path.read_bytes()
    spans = build_table(str(path)).spans()
    return [(key, {f: data[o : o + n] for f, (o, n) in fields.items()}) for key, fields in spans.items()]


def expected(files: dict[str, bytes]) -> Contents:
    """What the files are as samples, by their names alone."""
    samples: dict[str, dict[str, bytes]] = {}
    for name in sorted(files):
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if dot:
            samples.setdefault(f"{folder}{slash}{stem}", {})[extension.lower()] = files[name]
    return list(samples.items())


def check(path: Path, files: dict[str, bytes]) -> None:
    found = contents(path)
    assert found == expected(files), "other samples than the files"
    assert found == webdataset_contents(path), "other samples than webdataset's"
    table = build_table(str(path))
    assert write_sidecar_file(str(path), table)
    again, wrong = fitting_sidecar(str(path))
    assert again is not None, f"a right sidecar is refused: {wrong}"
    assert again.spans() == table.spans()


@pytest.mark.parametrize("tool", TOOLS)
def test_samples_are_webdatasets_and_those_of_the_files(tmp_path: Path, tool: str) -> None:
    needs(tool)
    files = FILES if "v7" not in tool else {name: c for name, c in FILES.items() if LONG not in name}
    TOOLS[tool](tmp_path / "a.tar", tmp_path / "files", fill(tmp_path / "files", files))
    check(tmp_path / "a.tar", files)


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if "v7" not in tool and "ustar" not in tool])
def test_paths_of_more_than_256_characters(tmp_path: Path, tool: str) -> None:
    needs(tool)
    # First, in the middle and last, where a sidecar is compared with its shard.
    files = {f"{LONGER}{n}.{ext}": f"{n}{ext}".encode() * 100 for n in range(3) for ext in ("cls", "größe.txt")}
    TOOLS[tool](tmp_path / "a.tar", tmp_path / "files", fill(tmp_path / "files", files))
    check(tmp_path / "a.tar", files)


@pytest.mark.parametrize("tool", TOOLS)
def test_hard_links_are_samples_and_dot_files_and_other_links_are_not(tmp_path: Path, tool: str) -> None:
    needs(tool)
    folder = tmp_path / "files"
    short = {"a.cls": b"1", "sub/000.jpg": b"x" * 600, "sub/001.jpg": b"y"}
    names = fill(folder, {**short, **DOTTED})
    os.symlink("a.cls", folder / "b.cls")
    os.link(folder / "sub/000.jpg", folder / "sub/002.jpg")
    (folder / "z").mkdir()
    os.link(folder / "sub/001.jpg", folder / "z/003.jpg")
    others = ["b.cls", "sub/002.jpg", "z/003.jpg"]
    if "v7" not in tool:
        os.mkfifo(folder / "pipe.cls")
        others.append("pipe.cls")
    TOOLS[tool](tmp_path / "a.tar", folder, [*names, *others])
    linked = {**short, "sub/002.jpg": short["sub/000.jpg"], "z/003.jpg": short["sub/001.jpg"]}
    assert sorted(contents(tmp_path / "a.tar")) == expected(linked)
    table = build_table(str(tmp_path / "a.tar"))
    assert table.unread.number == (1 if "v7" in tool else 2)
    assert table.unread.first.endswith("a symbolic link to 'a.cls'"), table.unread
    assert not write_sidecar_file(str(tmp_path / "a.tar"), table), "its form has no place for links"
    # webdataset reads no links, and takes dot files in a folder for one sample named after the folder.
    theirs = [(key, fields) for key, fields in webdataset_contents(tmp_path / "a.tar") if not key.endswith("/")]
    assert theirs == expected(short)


@pytest.mark.parametrize("tool", ["GNU gnu", "bsdtar pax"])
def test_a_leading_dot_folder_is_no_part_of_the_key(tmp_path: Path, tool: str) -> None:
    needs(tool)
    fill(tmp_path / "files", {"a.cls": b"1", "sub/b.cls": b"2"})
    TOOLS[tool](tmp_path / "a.tar", tmp_path / "files", [".", "./a.cls", "./sub", "./sub/b.cls"])
    assert [key for key, _ in contents(tmp_path / "a.tar")] == ["a", "sub/b"]
    assert [key for key, _ in webdataset_contents(tmp_path / "a.tar")] == ["./a", "./sub/b"]


def test_webdatasets_writer(tmp_path: Path) -> None:
    samples = [
        {"__key__": "000", "cls": b"1", "image.npy": b"x" * 513},
        {"__key__": "sub.v2/größe", "cls": b"2", "image.npy": b""},
        {"__key__": LONGER, "cls": b"3", "image.npy": b"y" * 512},
    ]
    path = Path(write_shard(tmp_path / "a.tar", samples))
    assert contents(path) == webdataset_contents(path)
    assert [key for key, _ in contents(path)] == [sample["__key__"] for sample in samples]


HUGE = 9 * 2**30 + 5
WRITE_HUGE = {
    "GNU gnu": ["tar", "--format=gnu"],  # base 256
    "GNU posix": ["tar", "--format=posix"],  # a PAX size
    "bsdtar gnutar": ["bsdtar", "--format", "gnutar", "--no-read-sparse"],
    "bsdtar pax": ["bsdtar", "--format", "pax", "--no-read-sparse"],
}


@pytest.mark.parametrize("tool", WRITE_HUGE)
def test_sizes_of_more_than_eight_gibibytes(tmp_path: Path, tool: str) -> None:
    needs(tool)
    with open(tmp_path / "huge.bin", "wb") as file:  # sparse: takes no room on the disk
        file.truncate(HUGE)
    command = [*WRITE_HUGE[tool], "-cf", "-", "-C", str(tmp_path), "huge.bin"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as writing:
        assert writing.stdout is not None
        head = writing.stdout.read(8 * BLOCK)  # all headers and some of the zeros; the rest is not awaited
        writing.kill()
    # Zeros follow the headers, which never end in a block of them.
    last = max(number for number in range(8) if any(head[number * BLOCK : (number + 1) * BLOCK]))
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(head)
        file.truncate((last + 1) * BLOCK + -(-HUGE // BLOCK) * BLOCK + 2 * BLOCK)
    assert list(scan_members(str(path))) == [Member("huge.bin", (last + 1) * BLOCK, HUGE)]


@pytest.mark.parametrize("tool", ["GNU gnu", "GNU posix", "bsdtar pax"])
def test_sparse_members_are_refused_with_a_hint(tmp_path: Path, tool: str) -> None:
    needs(tool)
    with open(tmp_path / "holes.bin", "wb") as file:
        file.write(b"begin")
        file.truncate(2**20)
        file.seek(2**20)
        file.write(b"end")
    program, format = tool.split()
    command = ["tar", "-S", f"--format={format}"] if program == "GNU" else ["bsdtar", "--format", format]
    subprocess.run([*command, "-cf", tmp_path / "a.tar", "-C", tmp_path, "holes.bin"], check=True)
    if program == "bsdtar" and (tmp_path / "a.tar").stat().st_size > 2**20:
        pytest.skip("this file system shows bsdtar no holes")
    with pytest.raises(ShardError, match="sparse members are not supported") as caught:
        list(scan_members(str(tmp_path / "a.tar")))
    assert "GNU tar without --sparse, bsdtar with --no-read-sparse" in caught.value.hint
    assert "'holes.bin' is sparse" in caught.value.what
