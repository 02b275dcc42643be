"""What hostile input is made of: sound commands to spoil, hostile values, damage to files, and what reads these."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

Damage = Callable[[Path, random.Random], object]

TRAINING = ("fit", "validate", "test", "predict")
_FIT = ("fit", "--config", "run.yaml", "--trainer.run_dir=new", "--trainer.max_steps=1")
FITS: tuple[tuple[str, ...], ...] = (
    _FIT,
    _FIT,
    ("fit", "--config", "run.yaml", "--trainer.run_dir=new", "--trainer.max_epochs=1", "--seed_everything=3"),
    ("fit", "--config", "run.yaml", "--resume=run", "--trainer.run_dir=new", "--trainer.max_steps=5"),
    (*_FIT, "--initialize_from=weights.safetensors"),
    ("validate", "--config", "run.yaml", "--checkpoint_path=run"),
    ("test", "--config", "run.yaml", "--data.test=data/val-000.tar"),
    ("predict", "--config", "run.yaml", "--output=out.jsonl", "--format=jsonl"),
)
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("shards", "ls", "data/train.json"),
    ("shards", "ls", "data/val-000.tar", "--samples"),
    ("shards", "stats", "data/train-{000..001}.tar", "--classes"),
    ("shards", "verify", "data/train.json", "--fields=image.npy:npy,cls"),
    ("shards", "index", "data/val-000.tar", "--manifest", "data/val.json", "--md5"),
    ("shards", "pack", "table.csv", "packed", "--target", "target", "--task", "classification", "--split=0.5,0.2,0.3"),
    ("shards", "pack", "images", "packed", "--shards", "2", "--split-seed", "3", "--prefix", "p"),
    ("shards", "pack", "sklearn:iris", "packed", "--samples-per-shard", "50", "--split", "none"),
    ("checkpoints", "ls", "run", "--verify"),
    ("checkpoints", "verify", "run/checkpoints/step-00000004"),
    ("checkpoints", "export", "run", "out.safetensors", "--which=last"),
    ("checkpoints", "prune", "run", "--keep-last=1", "--keep-best=0", "--keep-every-steps=2", "--dry-run"),
    ("jobs", "run", "--json"),
    ("jobs", "."),
    ("report", "run", "--out", "page"),
    ("report", "run", "done", "--out=page"),
    ("submit", "-c", "run.yaml", "--tasks-per-node=2", "--dry-run", "--name=x", "--time=3h", "--array=0-3"),
    ("submit", "-c", "run.yaml", "--gpus-per-node=2", "--nodes=2", "--dry-run", "--sbatch=nice=5", "--site=site.yaml"),
    ("submit", "-c", "run.yaml", "--tasks-per-node=1", "--dry-run", "--set=data.micro_batch_size=4", "--requeue"),
    ("submit", "-c", "run.yaml", "--tasks-per-node=1", "--dry-run", "--output=x.log", "--memory=1G", "--account=me"),
    ("parity", "--config", "nope.yaml", "--layouts=1,2xddp", "--steps=2", "--tolerance=1e-5"),
    ("launch", "--nproc=0", "fit"),
    ("launch", "--max-restarts=-1", "shards", "ls"),
    ("doctor", "--config=nope.yaml", "--timeout=1", "--json"),
    ("doctor", "--port=0", "--timeout=1"),
)
MAKES: tuple[tuple[str, ...], ...] = (
    ("shards", "index", "data/train-{000..001}.tar", "--manifest", "data/train.json", "--md5"),
    ("shards", "pack", "table.csv", "packed0", "--target", "target", "--task", "classification"),
    ("fit", "--config", "run.yaml", "--trainer.run_dir=done", "--trainer.max_steps=2"),
    ("fit", "--config", "run.yaml"),
    ("checkpoints", "export", "run", "weights.safetensors", "--which=last"),
    ("checkpoints", "export", "run", "weights.pt", "--which=last"),
)
_DEEP = "[" * 5000 + "]" * 5000
_ALIASES = "{" + ", ".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12)) + "}"
VALUES: tuple[str, ...] = (
    *("", " ", "-", "--", "-1", "0", "1", "2", "-0", "1.5", "-5", "99999999999999999999", "1e400", "-1e400", "nan"),
    *(
        "inf",
        "9" * 5000,
        "-" + "9" * 5000,
        "1" + "0" * 400,
        "1e-400",
        "1_000",
        "0x10",
        "0b1",
        "0o17",
        "\uff11\uff12",
        "²",
    ),
    *("4294967296", "18446744073709551616", "2147483648", "-2147483649", "9223372036854775807", "1:30:00", "1e5"),
    *(
        "a" * 300,
        "a" * 5000,
        "a/" * 2500,
        "é" * 200,
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "a\nb",
        "a\r\nb",
        "a\tb",
    ),
    *(
        "\u202egnp.exe",
        "\x9b31m",
        "\x7f",
        "\u2028",
        "\udcff\udcfe",
        "a\udc80b",
        "\ufeff",
        "[red]bold[/red]",
        "[/]",
        "%s%n",
    ),
    *(
        "%a",
        "%(x)s",
        "{}",
        "{0}",
        "{a}",
        "{{",
        "}",
        "{a,b",
        "{1..3",
        "*",
        "?",
        "[",
        "[a",
        "**/*",
        "~",
        "~nobody/x",
        "$HOME",
    ),
    *(
        "/dev/zero",
        "/dev/null",
        "/dev/full",
        "/dev/stdin",
        "fifo",
        "loop",
        "loop/x",
        "dangling",
        ".",
        "..",
        "/",
        "//",
        "",
    ),
    *("/proc/self/mem", "/proc/self/fd/99", "/root/x/../..", "run", "run.yaml", "data", "data/train.json", "x.npy"),
    *(
        "data/val-000.tar",
        "weights.safetensors",
        "run/run.json",
        "nope.yaml",
        "nope/nope",
        "run/checkpoints",
        "small.tar",
    ),
    *("null", "true", "false", "yes", "[]", "{}", "[1, 2]", "{a: 1}", "{a: {b: {c: 1}}}", "[[1], [2]]", "a: &a [*a]"),
    *(
        "&a [*a]",
        "*a",
        "!!python/object/apply:os.system [id]",
        "!!binary x",
        "!!set {a}",
        "? a",
        ": ",
        "---",
        "--- a\n--- b",
    ),
    *(
        "2026-99-99",
        "2026-01-01",
        "<<: {a: 1}",
        "{<<: [1]}",
        "{[1]: 2}",
        "{a: 1, a: 2}",
        "'",
        '"',
        "`id`",
        "$(id)",
        "; id",
        "#",
    ),
    *(
        "lightning.pytorch.LightningModule",
        "torch.nn.Linear",
        "os.system",
        "builtins.eval",
        "recipes.digits.DigitsTask",
    ),
    *("recipes.digits", "recipes.nope.X", "recipes..X", ".x", "x.", "{class_path: os.system}", "{class_path: null}"),
    *("{class_path: recipes.digits.DigitsTask, init_args: {widths: x}}", "{init_args: {}}", "{class_path: [1]}", "int"),
    *(
        "http://[::1",
        "http://",
        "s3://",
        "https://u:p@h:99999/x.tar",
        "file:///etc/passwd",
        "http://127.0.0.1:1/\n.tar",
    ),
    *(
        "nope://x/y",
        "://",
        "1xddp,,2",
        "2xnope",
        "0-3%0",
        "3-1",
        "0-99999999999",
        "0-3:0",
        "3h50m",
        "-3h",
        "1e9d",
        "0s",
    ),
    *(_DEEP, "{" * 300, _ALIASES, "--help=x", "--version", "-c", "--config", "=", "a=b", "=b", "a=", "epoch", "step"),
)
"""Values in place of sound ones. Nothing that a network would have to answer."""


def settings() -> list[str]:
    """The dotted names of all settings of ``fit``, and those of the recipe's task."""
    from disttrain.commands.training import TrainingCLI, _settings

    class Names(TrainingCLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            raise _FoundError(sorted(_settings(parser)))

    try:
        Names(["fit"])
    except _FoundError as found:
        names = list(found.args[0])
    return [
        *(name for name in names if name not in TRAINING),
        *("model.init_args.widths", "model.dropout", "model.optimizer.lr", "model.schedule.warmup_steps", "model.nope"),
        *(
            "data.fields",
            "data.fields.image",
            "data.loader.threads",
            "trainer.parallel.strategy",
            "trainer.nope",
            "config",
        ),
    ]


class _FoundError(Exception):
    pass


def _edit_json(change: Callable[[Any, random.Random], Any]) -> Damage:
    """Replace one value of a JSON file, or of YAML that is read as such, by another."""

    def damage(path: Path, draw: random.Random) -> None:
        try:
            content = json.loads(path.read_text())
        except ValueError:
            try:
                content = yaml.safe_load(path.read_text())
            except (yaml.YAMLError, ValueError):
                content = None
        places: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, value in items:
                places.append((node, key))
                walk(value)

        walk(content)
        if not places:
            _random(path, draw)
        for _ in range(draw.choice((1, 1, 1, 3)) if places else 0):
            node, key = draw.choice(places)
            node[key] = change(node[key], draw)
            path.write_text(json.dumps(content), errors="surrogatepass")

    return damage


_JSON_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**45,
        2**70,
        -5,
        1.5,
        float("nan"),
        float("inf"),
        -1e308,
        "",
        "x",
        "1",
        "-1",
        [],
        {},
    ),
    *(
        [1],
        ["a"],
        [[]],
        {"a": 1},
        [None],
        "\x1b]0;x\x07",
        "\udcff",
        "a\nb",
        "[red]x[/red]",
        "a" * 5000,
        "../../x",
        "/dev/zero",
    ),
    *("<script>alert(1)</script>", "fifo", "9" * 5000, [[1, 2], [3]], {"": None}, "\u202ex"),
)


def _bytes(content: bytes) -> Damage:
    return lambda path, draw: path.write_bytes(content)


def _random(path: Path, draw: random.Random) -> None:
    path.write_bytes(draw.randbytes(draw.choice((1, 100, 5000))))


def _cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(max(1, path.stat().st_size)))


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 8))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _replace_number(path: Path, draw: random.Random) -> None:
    """One run of digits becomes another number; in binary files too."""
    content = path.read_bytes()
    found = list(re.finditer(rb"\d+", content))
    if not found:
        _random(path, draw)
        return
    place = draw.choice(found)
    other = draw.choice(
        (b"-1", b"9" * 5000, b"1e400", b"nan", b"0", b"99999999999999999999", b"", b"x", b"1.5", b"\xff")
    )
    path.write_bytes(content[: place.start()] + other + content[place.end() :])


def _insert(content: bytes) -> Damage:
    def damage(path: Path, draw: random.Random) -> None:
        old = path.read_bytes()
        at = draw.randrange(len(old) + 1)
        path.write_bytes(old[:at] + content + old[at:])

    return damage


def _instead(make: Callable[[Path], object]) -> Damage:
    def damage(path: Path, draw: random.Random) -> None:
        path.unlink()
        make(path)

    return damage


def _recode(encoding: str) -> Damage:
    return lambda path, draw: path.write_bytes(path.read_bytes().decode("latin-1").encode(encoding))


def _sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(3 * 2**30)


DAMAGES: tuple[tuple[str, Damage], ...] = (
    ("empty", _bytes(b"")),
    ("blank", _bytes(b"\n \n")),
    ("random", _random),
    ("cut", _cut),
    ("flipped", _flip),
    ("another number", _replace_number),
    ("another value", _edit_json(lambda old, draw: draw.choice(_JSON_VALUES))),
    ("another value still", _edit_json(lambda old, draw: draw.choice(_JSON_VALUES))),
    ("a value in a list", _edit_json(lambda old, draw: [old])),
    ("a value as text", _edit_json(lambda old, draw: str(old))),
    ("no values", _edit_json(lambda old, draw: None)),
    ("UTF-16", _recode("utf-16")),
    ("a byte order mark", lambda path, draw: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())),
    ("Latin-1", _insert("é".encode("latin-1"))),
    ("a NUL", _insert(b"\0")),
    ("an escape", _insert(b"\x1b[2J")),
    ("a carriage return", _insert(b"\r")),
    ("deep lists", _bytes(b"[" * 200_000 + b"]" * 200_000)),
    ("deep names", _bytes(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)),
    ("deep lines", _bytes(b"".join(b"%sa:\n" % (b" " * i) for i in range(1500)))),
    ("dashes", _bytes(b"- " * 100_000 + b"x\n")),
    ("a long number", _bytes(b'{"format": ' + b"9" * 6000 + b"}")),
    ("a bare format", _bytes(b'{"format": 1}')),
    ("a list", _bytes(b"[1, 2, 3]")),
    ("a text", _bytes(b'"x"')),
    ("null", _bytes(b"null")),
    ("NaN", _bytes(b"NaN")),
    ("nested aliases", _bytes(_ALIASES.encode())),
    ("a list in itself", _bytes(b"a: &a [*a]\n")),
    ("a name in itself", _bytes(b"a: &a {b: *a}\n")),
    ("an object", _bytes(b"a: !!python/object/apply:os.system [id]\n")),
    ("a date", _bytes(b"a: 2026-99-99\nb: 2026-01-01\n")),
    ("a list as a name", _bytes(b"[1, 2]: 3\n? {a: 1}\n: 2\n")),
    ("base 60", _bytes(b"a: " + b"59:" * 5000 + b"59\n")),
    ("merges", _bytes(b"<<: 3\n")),
    ("one long line", _bytes(b"x" * 3_000_000)),
    ("many lines", _bytes(b"x\n" * 1_000_000)),
    ("3 GiB of zeros", _instead(_sparse)),
    ("/dev/zero", _instead(lambda path: path.symlink_to("/dev/zero"))),
    ("/dev/null", _instead(lambda path: path.symlink_to("/dev/null"))),
    ("a FIFO", _instead(os.mkfifo)),
    ("a folder", _instead(lambda path: path.mkdir())),
    ("a loop", _instead(lambda path: path.symlink_to(path.name))),
    ("dangling", _instead(lambda path: path.symlink_to("nowhere"))),
    ("missing", _instead(lambda path: None)),
    ("twice", lambda path, draw: path.write_bytes(path.read_bytes() * 2)),
    ("another file", lambda path, draw: shutil.copy(path.parents[len(path.parents) - 1 - 3] / "small.tar", path)),
)
_STEP = "run/checkpoints/step-00000004"
_RESUME = ("fit", "--config", "run.yaml", "--trainer.max_steps=5")
READERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "run.yaml": (
        _FIT,
        ("doctor", "--config=run.yaml", "--timeout=1"),
        ("submit", "-c", "run.yaml", "--tasks-per-node=1", "--dry-run"),
        ("parity", "--config", "run.yaml", "--layouts=1x9", "--steps=2"),
    ),
    "other.yaml": ((*_FIT, "--config=other.yaml"), (*_FIT, "--trainer=other.yaml"), (*_FIT, "--model=other.yaml")),
    "site.yaml": (("submit", "-c", "run.yaml", "--tasks-per-node=1", "--dry-run", "--site=site.yaml"),),
    "run/run.json": (
        _RESUME,
        ("jobs", "run"),
        ("report", "run", "done"),
        ("submit", "-c", "run.yaml", "--tasks-per-node=1", "--dry-run"),
    ),
    "run/config.yaml": (("report", "run", "done"), _RESUME),
    "run/metrics.csv": (("report", "run"), ("jobs", "."), _RESUME),
    "run/events.jsonl": (_RESUME, ("report", "run")),
    "run/checkpoints/ATTEMPT": (_RESUME,),
    "run/checkpoints/LATEST": (_RESUME, ("checkpoints", "ls", "run")),
    f"{_STEP}/COMMITTED": (
        ("checkpoints", "ls", "run"),
        ("checkpoints", "verify", "run"),
        ("checkpoints", "prune", "run"),
        ("checkpoints", "export", _STEP, "o.pt"),
        ("jobs", "run"),
        _RESUME,
    ),
    f"{_STEP}/.metadata": (("checkpoints", "export", _STEP, "o.pt"), ("validate", "--config", "run.yaml"), _RESUME),
    f"{_STEP}/meta.pt": (_RESUME, ("validate", "--config", "run.yaml")),
    f"{_STEP}/__0_0.distcp": (("checkpoints", "export", _STEP, "o.pt"), ("validate", "--config", "run.yaml")),
    "weights.safetensors": ((*_FIT, "--initialize_from=weights.safetensors"),),
    "weights.pt": ((*_FIT, "--initialize_from=weights.pt"),),
    "data/train.json": (
        ("shards", "ls", "data/train.json"),
        ("shards", "verify", "data/train.json"),
        ("shards", "index", "data/train-000.tar", "--manifest=data/train.json"),
        (*_FIT, "--data.train=data/train.json"),
    ),
    "data/train-001.idx": (
        ("shards", "ls", "data/train.json", "--samples"),
        ("shards", "verify", "data/train.json"),
        _FIT,
    ),
    "data/train-001.tar": (
        ("shards", "stats", "data/train-001.tar", "--classes"),
        ("shards", "verify", "data/train-001.tar"),
        ("shards", "ls", "data/train-001.tar", "--samples"),
        _FIT,
    ),
    "table.csv": (("shards", "pack", "table.csv", "packed", "--target=target", "--task=classification"),),
    "packed0/train.json": (("shards", "pack", "table.csv", "packed0", "--target=target", "--task=classification"),),
}
"""What each file is read by."""
