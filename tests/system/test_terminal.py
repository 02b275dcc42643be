"""What is printed: no text of others reaches a terminal as it is."""

from __future__ import annotations

import ast
import io
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

import disttrain
from disttrain.system.terminal import Parser, cell, printable, say, tell

OBEYED = [*map(chr, range(0x20)), *map(chr, range(0x7F, 0xA0)), *"\u200e\u202e\u2028\u2066\ufeff\ud800\udcff"]


@pytest.mark.parametrize("lines", [False, True])
def test_what_a_terminal_obeys_is_shown(lines: bool) -> None:
    text = printable("a".join(OBEYED), lines=lines)
    assert not set(OBEYED) & set(text.replace("\n", "").replace("\t", "") if lines else text)
    assert ("\n" in text) is ("\t" in text) is lines
    assert printable("\x1b[2J \x7f \u202e \udcff \ud800") == r"\x1b[2J \u007f \u202e \xff \ud800"
    assert printable("Ünïcødé 数 🙂") == "Ünïcødé 数 🙂"


def test_a_message_cannot_pose_as_another(capsys: pytest.CaptureFixture[str]) -> None:
    tell("error: key 'a\ndisttrain: all is well\r' is damaged\n  hint: \x1b[31mred")
    assert capsys.readouterr().err == (
        "disttrain: error: key 'a\n  disttrain: all is well\\x0d' is damaged\n  hint: \\x1b[31mred\n"
    )
    say("a\nb")
    assert capsys.readouterr().out == "a\\x0ab\n"


def test_a_name_of_a_million_letters_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    tell("error: no file " + "a" * 1_000_000 + "z")
    text = capsys.readouterr().err
    assert len(text) < 2200
    assert "more characters" in text
    assert text.endswith("az\n")


def test_text_that_the_terminal_cannot_show_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    say("naïve 数")
    sys.stdout.flush()
    assert raw.getvalue() == b"na\\xefve \\u6570\n"


def test_cells_have_neither_markup_nor_escapes() -> None:
    out = io.StringIO()
    table = Table(title=cell("[red]x[/red]"))
    table.add_row(cell("[/] \x1b[31m"))
    Console(file=out, width=80).print(table)
    assert "[red]x[/red]" in out.getvalue()
    assert r"[/] \x1b[31m" in out.getvalue()


def test_arguments_that_are_refused_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args(["--\x1b[31m", "\x9b"])
    assert r"unrecognized arguments: --\x1b[31m \x9b" in capsys.readouterr().err


def test_nothing_else_prints() -> None:
    found = []
    for path in Path(disttrain.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if name in ("print", "argparse.ArgumentParser") or re.fullmatch(r"sys\.std(out|err)\.write", name):
                    found.append(f"{path.name}:{node.lineno}: {name}")
    assert [one for one in found if not one.startswith("terminal.py")] == []
