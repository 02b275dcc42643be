"""What a specification names: home folders, variables, lists, braces without bound, and files that are not there."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from disttrain.data.index import patterns
from disttrain.data.index.patterns import places
from disttrain.data.remote.ranges import shown
from disttrain.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a-0.tar", "a-1.tar", "b-0.tar", "sub/c-0.tar", "$x.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    monkeypatch.setenv("PART", "a")
    monkeypatch.delenv("x", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("~/a-{0..1}.tar", ["a-0.tar", "a-1.tar"]),
        ("$DATA/$PART-*.tar", ["a-0.tar", "a-1.tar"]),
        ("${DATA}/${PART}-{1,0}.tar", ["a-1.tar", "a-0.tar"]),
        ("$DATA/sub/../sub/c-0.tar", ["sub/../sub/c-0.tar"]),
        ("~/t{r,e}.json", ["tr.json", "te.json"]),
    ],
)
def test_home_folders_and_variables(folder: Path, spec: str, names: list[str]) -> None:
    assert places(spec) == [f"{folder}/{name}" for name in names]


def test_variables_in_urls_but_not_in_their_query(folder: Path) -> None:
    assert places("s3://bucket/$PART-{0..1}.tar?k=$PART") == [f"s3://bucket/a-{n}.tar?k=$PART" for n in range(2)]


@pytest.mark.parametrize("password", ["pa/ss", "s3cr#t", "x{1,2}", "a:b@c%2Fd?e", "plain!$&'()*+,;=", "u:p"])
def test_a_variable_before_the_host_is_taken_to_the_letter(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    monkeypatch.setenv("PW", password)
    [url] = places("https://me:$PW@host/a.tar")
    assert (urlsplit(url).hostname, urlsplit(url).path, unquote(urlsplit(url).password or "")) == (
        "host",
        "/a.tar",
        password,
    )
    assert shown(url) == "https://host/a.tar"
    with pytest.raises(DataError, match="cannot be expanded over HTTP") as caught:
        places("https://me:${PW}@host/*.tar")
    assert str(caught.value).startswith("data: https://host/*.tar is a glob")


def test_a_variable_that_is_not_set_is_named(folder: Path) -> None:
    assert places(f"{folder}/$x.tar") == [f"{folder}/$x.tar"], "a file of that very name"
    with pytest.raises(DataError, match=r"data.train: '\$NOT_SET/a.tar' has \$NOT_SET, which is not set"):
        places("$NOT_SET/a.tar", name="data.train")


def test_lists_in_text_files(folder: Path) -> None:
    (folder / "sub/train.txt").write_text(
        "# shards\n../a-{0..1}.tar\r\n\n  c-*.tar\n$DATA/b-0.tar\nhttps://host/d-{0..1}.tar?s=1\nm.json\n"
    )
    expected = [f"{folder}/{name}" for name in ("sub/../a-0.tar", "sub/../a-1.tar", "sub/c-0.tar", "b-0.tar")]
    expected += ["https://host/d-0.tar?s=1", "https://host/d-1.tar?s=1", f"{folder}/sub/m.json"]
    assert places("~/sub/train.txt") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"# nothing\n", "names no shards"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"other.list\n", "names another list"),
        (b"a\0.tar\n", "NUL byte"),
    ],
)
def test_lists_that_are_none(folder: Path, content: bytes, words: str) -> None:
    (folder / "l.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        places("~/l.txt")


@pytest.mark.parametrize("where", ["none.txt", "sub", "/dev/zero"])
def test_lists_that_cannot_be_read(folder: Path, where: str) -> None:
    os.symlink(where, folder / "l.list")
    with pytest.raises(DataError, match=r"No such file|Is a directory|list .* cannot be read: it is"):
        places(f"{folder}/l.list")


@pytest.mark.parametrize(
    "pattern",
    [
        "x-{0..99999999999}.tar",
        "x-{99999999999..0}.tar",
        "{0..999999}-{0..999999}.tar",
        "{0..99999}" * 40 + ".tar",
        "{a,b}" * 40 + ".tar",
        "{0..2000000}",
        "{0.." + "9" * 5000 + "}",
        "s3://bucket/{0..99999999999}.tar",
        "{x,{0..99999999999}}.tar",
        "{a..z}" * 5,
        "{{a,b},{c,d}}" * 11,
    ],
)
def test_patterns_without_bound_are_refused_at_once(pattern: str) -> None:
    with pytest.raises(DataError, match=r"names more than 1,000,000 shards") as caught:
        places(pattern)
    assert len(caught.value.what) < 400


@pytest.mark.parametrize("pattern", ["{" * 3000 + "a" + "}" * 3000, "{" * 150 + "a,b" + "}" * 150, "{0..1", "a\0b.tar"])
def test_braces_that_do_not_expand(pattern: str) -> None:
    with pytest.raises(DataError, match=r"brace|too long"):
        places(pattern)


def test_the_count_of_names_is_that_of_the_names() -> None:
    for pattern in (
        "a",
        "{a,b}{c,d}",
        "x{1..3}{a,{2..4},c{5,6}}",
        "{x}{1..9..2}",
        r"\{1..3\}{a,b}",
        "{,a}{3..-2}",
        "{{1,2}}",
    ):
        assert patterns._count(pattern) == len(places(f"s3://b/{pattern}.tar")), pattern


def test_steps_make_a_range_small(folder: Path) -> None:
    assert places("s3://b/{0..3000000..1000000}.tar") == [
        f"s3://b/{n}000000.tar".replace("/0000000", "/0") for n in range(4)
    ]


def test_what_stands_in_the_place_of_a_shard(folder: Path) -> None:
    (folder / "d.tar").mkdir()
    (folder / "d.tar" / "x.tar").write_bytes(b"")
    os.symlink("nowhere.tar", folder / "l.tar")
    os.symlink("loop.tar", folder / "loop.tar")
    os.mkfifo(folder / "p.tar")
    (folder / "secret.tar").mkdir(mode=0o300)
    for path, what, hint in [
        ("d.tar", r"d\.tar is a folder", r"d\.tar/\*\.tar"),
        ("secret.tar", r"secret\.tar is a folder", "name the shards in it"),
        ("l.tar", r"l\.tar is a link to 'nowhere\.tar', which does not exist", "restore it"),
        ("loop.tar", "cannot be read: Too many levels of symbolic links", "correct the pattern"),
        ("p.tar", "is not a regular file", "name a tar file"),
        ("n" * 300 + ".tar", "cannot be read: File name too long", "correct the pattern"),
        ("none/x.tar", "does not exist", "folder .*none does not exist"),
        ("c-0.tar", "does not exist", r"did you mean '[ab]-0\.tar'"),
    ]:
        with pytest.raises(DataError, match=what) as caught:
            places(f"{folder}/{path}")
        caught.match(hint)
        assert f"did you mean '{path}'" not in caught.value.hint


def test_many_neighbours_are_not_all_named(folder: Path) -> None:
    for number in range(50):
        (folder / f"long-name-{number}.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"holds 54 \.tar files, such as") as caught:
        places(f"{folder}/zzz.zip")
    assert len(caught.value.hint) < 300


def test_globs_of_an_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("train-0.tar", "train-1.tar", "train-1.idx", "sub/train-2.tar", "val-0.tar", "train-[x].tar"):
        (tmp_path / "bucket" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bucket" / name).write_bytes(b"x")
    root = f"file://{tmp_path}/bucket"

    def found(pattern: str) -> list[str]:
        return [place.removeprefix(f"{root}/") for place in places(f"{root}/{pattern}")]

    assert found("train-*.tar") == ["train-0.tar", "train-1.tar", "train-[x].tar"]
    assert found("train-[0-9].{tar,idx}") == ["train-0.tar", "train-1.tar", "train-1.idx"]
    assert found("train-[!1x].tar") == ["train-0.tar"]
    assert found("**/train-?.tar") == ["sub/train-2.tar", "train-0.tar", "train-1.tar"]
    assert found("s*/train-2.tar") == ["sub/train-2.tar"]
    for nothing in ("test-*.tar", "train-[9-0].tar"):
        with pytest.raises(DataError, match="no object matches") as caught:
            places(f"{root}/{nothing}")
        assert "holds 6 objects" in caught.value.hint
    assert places(f"{root}/test-*.tar", ask_servers=False) == []
    for place in ("https://host/a-*.tar", "s3://*/a-*.tar"):
        with pytest.raises(DataError, match=r"cannot be expanded over HTTP|does not name its bucket"):
            places(place)


def test_frozen_regular_expressions_of_globs() -> None:
    assert patterns._as_regex("a*/**/b?.[!x^]") == r"a[^/]*/(?:.*/)?b[^/]\.[^x\^]"
