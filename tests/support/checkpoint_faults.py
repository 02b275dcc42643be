"""Bad checkpoints and bad ways to name, read and write them: cases for the page of faults."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from disttrain.checkpoint.format.marker import FORMAT
from tests.support.faults import READ_ONLY, SMALL_DISK, Case, Scene, can_mount, scene
from tests.support.servers import S3, s3_server

CHECKPOINT = "run/checkpoints/step-00000004"
FIT = "fit --config run.yaml"
NAMED = f"{FIT} --resume {CHECKPOINT}"
INITIALIZE = f"{FIT} --initialize_from weights.safetensors"
EXPORT = "checkpoints export run weights.safetensors"
COPIES = "--checkpoint.mirror.url s3://models/run"


@cache
def _template() -> Path:
    """A run folder with one checkpoint, trained once."""
    kept = Path(tempfile.mkdtemp(prefix="disttrain-faults-"))
    atexit.register(shutil.rmtree, kept, ignore_errors=True)
    with scene() as made:
        made.run("fit", "--config", "run.yaml")
        shutil.copytree(made.folder / "run", kept / "run")
    return kept / "run"


def trained(made: Scene) -> Path:
    """A run that was interrupted after its checkpoint; gives that."""
    shutil.copytree(_template(), made.folder / "run")
    record(made, status="running")
    return made.folder / CHECKPOINT


def record(made: Scene, **entries: object) -> None:
    """Change the run's record."""
    path = made.folder / "run" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def spoiled(change: Callable[[Path], object]) -> Callable[[Scene], object]:
    """A run whose checkpoint's directory is changed."""
    return lambda made: change(trained(made))


def tensors(path: Path) -> Path:
    """The file of tensors."""
    return next(path.glob("*.distcp"))


def flip(path: Path) -> None:
    """A byte changes on the disk."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def with_marker(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """Change files, and have the marker list them as they are then: what somebody does who wants to deceive."""

    def forge(path: Path) -> None:
        from disttrain.checkpoint.format.checksum import sum_of
        from disttrain.checkpoint.format.marker import check, write_marker
        from disttrain.system.files import open_directory

        found = check(path)
        change(path)
        with open_directory(path) as opened:
            write_marker(opened, found.about, {name: sum_of(path / name) for name in found.files})

    return forge


def newer(path: Path) -> None:
    """The marker says that it is of a later version."""
    marker = path / "COMMITTED"
    text = marker.read_text().replace(f'"format": {FORMAT}', '"format": 9')
    assert '"format": 9' in text
    marker.write_text(text)


class _Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch crafted-code-ran",)


def crafted(name: str) -> Callable[[Path], object]:
    """A file that would run a command when it is unpickled."""

    def craft(path: Path) -> None:
        import pickle

        import torch

        if name == ".metadata":
            (path / name).write_bytes(pickle.dumps(_Runs()))
        else:
            torch.save({"format": 2, "x": _Runs()}, path / name)

    return craft


def another_run(made: Scene) -> None:
    """The checkpoint of another run lies in this one's folder."""
    path = trained(made)

    def rename(path: Path) -> None:
        marker = json.loads((path / "COMMITTED").read_text())
        import zlib

        del marker["crc32"]
        marker["run"] = "f" * 12
        own = f"{zlib.crc32(json.dumps(marker, sort_keys=True).encode()):08x}"
        (path / "COMMITTED").write_text(json.dumps({**marker, "crc32": own}))

    rename(path)


def weights(change: str = "", file: str = "weights.safetensors") -> Callable[[Scene], object]:
    """A file of the model's weights, with a mistake."""

    def write(made: Scene) -> None:
        import torch
        from safetensors.torch import save_file

        path = trained(made)
        from disttrain.checkpoint.format.reader import read_model

        held = read_model(path)
        shutil.rmtree(made.folder / "run")
        first = min(held)
        if change == "missing":
            del held[first]
        elif change == "unexpected":
            held["model.head.extra"] = torch.zeros(2)
        elif change == "shape":
            held[first] = torch.zeros(3, 2)
        elif change == "names":
            held = {name.replace("model.", "net.", 1): value for name, value in held.items()}
        if change == "crafted":
            torch.save({"a": _Runs()}, made.folder / file)
        elif change == "numbers":
            torch.save({"step": 4, "lr": 0.1}, made.folder / file)
        else:
            save_file(held, made.folder / file)
        if change == "cut":
            os.truncate(made.folder / file, 500)

    return write


def disk(read_only: bool = False) -> Callable[[Scene], object]:
    """The run folder lies on a file system of 32 KiB."""

    def mount(made: Scene) -> None:
        (made.folder / "run").mkdir()
        made.environment[SMALL_DISK] = str(made.folder / "run")
        if read_only:
            made.environment[READ_ONLY] = "1"

    return mount


def copies(bucket: str = "models", then: Callable[[Scene], object] = lambda made: None) -> Callable[[Scene], object]:
    """S3 with a bucket."""

    def serve(made: Scene) -> None:
        server = made.stack.enter_context(s3_server())
        server.make(bucket)
        made.environment |= {
            "AWS_ENDPOINT_URL": server.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_SHARED_CREDENTIALS_FILE": "none",
            "AWS_CONFIG_FILE": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        then(made)

    return serve


def copied(made: Scene) -> None:
    """A run has left its checkpoints in the bucket."""
    made.run("fit", "--config", "run.yaml", *COPIES.split())


GROUPS = {
    "Checkpoints": [
        Case("A checkpoint has no marker", NAMED, spoiled(lambda path: (path / "COMMITTED").unlink())),
        Case("A marker is damaged", NAMED, spoiled(lambda path: flip(path / "COMMITTED")), slow=True),
        Case("A file of a checkpoint was cut off", NAMED, spoiled(lambda path: os.truncate(tensors(path), 100))),
        Case("A file of a checkpoint is missing", NAMED, spoiled(lambda path: tensors(path).unlink()), slow=True),
        Case("A byte of a checkpoint has changed", NAMED, spoiled(lambda path: flip(tensors(path)))),
        Case("A checkpoint is of a newer format", NAMED, spoiled(newer), slow=True),
        Case(
            "A checkpoint's state would run code",
            NAMED,
            spoiled(with_marker(crafted("meta.pt"))),
        ),
        Case("A checkpoint's index would run code", NAMED, spoiled(with_marker(crafted(".metadata")))),
        Case("A checkpoint belongs to another run", FIT, another_run),
        Case(
            "A record belongs to another run",
            FIT,
            lambda made: (trained(made), record(made, id="f" * 12)),
            slow=True,
        ),
        Case("A checkpoint does not exist", f"{FIT} --resume run/checkpoints/step-00000008", trained, slow=True),
        Case("A checkpoint to resume is a file", f"{FIT} --resume run.yaml", slow=True),
        Case("A checkpoint to resume is a URL", f"{FIT} --resume s3://models/run"),
        Case(
            "A run folder holds no checkpoint",
            f"{FIT} --resume run",
            spoiled(shutil.rmtree),
            slow=True,
        ),
        Case("A run has not been trained", "test --config run.yaml --data.test data/val-000.tar", slow=True),
        Case(
            "A checkpoint to evaluate does not exist",
            "test --config run.yaml --data.test data/val-000.tar --checkpoint_path run/last.ckpt",
            trained,
            slow=True,
        ),
    ],
    "Resuming with other settings": [
        Case("The model has different shapes", f"{NAMED} --model.widths '[16]'", trained),
        Case("The model has different layers", f"{NAMED} --model.widths '[8, 8]'", trained, slow=True),
        Case("The optimizer is different", f"{NAMED} --model.optimizer.name sgd", trained, slow=True),
        Case("The order of samples is different", f"{NAMED} --data.global_batch_size 16", trained, slow=True),
        Case("No checkpoint would be kept", f"{FIT} --checkpoint.keep_last 0", slow=True),
        Case("The monitored metric does not exist", f"{FIT} --checkpoint.monitor val/los", slow=True),
    ],
    "Writing checkpoints": [
        Case("The run folder cannot be made", f"{FIT} --trainer.run_dir /dev/null/run", slow=True),
        Case("The run folder is read-only", FIT, disk(read_only=True), needs=can_mount(), slow=True),
        Case("The disk is full", f"{FIT} --model.widths '[64]'", disk(), needs=can_mount()),
        Case("Copies go to an unsupported URL", f"{FIT} --checkpoint.mirror.url http://host/models"),
        Case("The bucket for copies does not exist", f"{FIT} {COPIES}", copies("modles"), needs=S3),
        Case(
            "The folder for copies belongs to another run",
            f"{FIT} {COPIES} --trainer.run_dir other --resume never",
            copies(then=copied),
            needs=S3,
            slow=True,
        ),
    ],
    "Weights": [
        Case("A file of weights does not exist", INITIALIZE, slow=True),
        Case("A file of weights is a URL", f"{FIT} --initialize_from s3://models/run", slow=True),
        Case("A file of weights is not a weights file", f"{FIT} --initialize_from run.yaml", slow=True),
        Case("A file of weights was cut off", INITIALIZE, weights("cut"), slow=True),
        Case("Weights are missing", INITIALIZE, weights("missing"), slow=True),
        Case("Weights are unexpected", INITIALIZE, weights("unexpected"), slow=True),
        Case("Weights have another shape", INITIALIZE, weights("shape")),
        Case(
            "Weights have none of the model's names",
            f"{INITIALIZE} --initialize_strict false",
            weights("names"),
            slow=True,
        ),
        Case(
            "A file of weights would run code",
            f"{FIT} --initialize_from weights.pt",
            weights("crafted", "weights.pt"),
            slow=True,
        ),
        Case(
            "A file of weights holds other things",
            f"{FIT} --initialize_from weights.pt",
            weights("numbers", "weights.pt"),
            slow=True,
        ),
    ],
    "Commands for checkpoints": [
        Case("A path to list is wrong", "checkpoints ls runs/nope"),
        Case("A URL to list holds no checkpoints", "checkpoints ls s3://models/run", copies(), needs=S3),
        Case(
            "A changed byte is found by verify",
            "checkpoints verify run",
            spoiled(lambda path: flip(tensors(path))),
            code=1,
        ),
        Case("A damaged checkpoint is exported", EXPORT, spoiled(lambda path: flip(tensors(path)))),
        Case("A file to export to exists", EXPORT, lambda made: (trained(made), weights_there(made))),
        Case("A file to export to has an unknown suffix", "checkpoints export run weights.onnx", trained),
        Case("A folder to export to cannot be made", "checkpoints export run /dev/null/weights.pt", trained),
        Case("There is no moving average to export", f"{EXPORT} --ema", trained),
        Case("A run to export from does not exist", "checkpoints export nope weights.safetensors"),
        Case("A folder to prune is not a run folder", "checkpoints prune data"),
        Case("The newest checkpoint would not be kept", "checkpoints prune run --keep-last 0", trained),
    ],
}


def weights_there(made: Scene) -> None:
    """Somebody's file has the name."""
    (made.folder / "weights.safetensors").write_bytes(b"")
