"""``disttrain checkpoints`` and ``fit --initialize_from``: what they print, write, keep and refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from disttrain.checkpoint.format.export import initialize, read_weights, write_weights
from disttrain.checkpoint.format.fence import claim
from disttrain.checkpoint.format.marker import About, Metric, committed
from disttrain.checkpoint.format.writer import write
from disttrain.cli import main
from disttrain.errors import CheckpointError
from disttrain.system.reading import read_run
from tests.checkpoint.make_format import META, tensors
from tests.support.ranks import run_cli
from tests.support.weights import differing, final_weights

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
LOSSES = {10: 0.5, 20: 0.25, 30: 0.75, 40: None, 50: 0.6}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Five checkpoints; the best is that of step 20."""
    directory = tmp_path / "run" / "checkpoints"
    attempt = claim(directory)
    for step, loss in LOSSES.items():
        metric = None if loss is None else Metric("val/loss", loss, "min")
        about = About(step, step // 10, attempt.run, attempt.number, metric)
        state = tensors()
        state["model"]["scale"] = torch.tensor(float(step))
        state["ema"] = {"scale": torch.tensor(step + 0.5)}
        write(directory, f"step-{step:08d}", tensors=state, meta=META, global_step=step, about=about)
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_ls_shows_what_is_there(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run_dir / "checkpoints" / "step-00000030" / "__0_0.distcp")
    (run_dir / "checkpoints" / "step-00000060").mkdir()
    assert main(["checkpoints", "ls", str(run_dir)]) == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("step-")}
    assert list(rows) == [f"step-{step:08d}" for step in LOSSES]
    assert "val/loss 0.25 (best)" in rows["step-00000020"]
    assert "(best)" not in rows["step-00000010"]
    assert rows["step-00000030"].split()[1:3] == ["30", "3"]
    assert "sizes" in rows["step-00000030"]
    assert "step-00000060 was never committed" in text.replace("\n", "")
    assert main(["checkpoints", "ls", str(run_dir), "--verify"]) == 0
    text = capsys.readouterr().out
    assert next(line for line in text.splitlines() if "DAMAGED" in line).split()[0] == "step-00000030"
    assert text.count("checksums") == 4


def test_verify_names_every_fault(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoints", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("all checksums match") == 5
    flip(run_dir / "checkpoints" / "step-00000030" / "meta.pt")
    (run_dir / "checkpoints" / "step-00000020" / ".metadata").unlink()
    assert main(["checkpoints", "verify", str(run_dir)]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fault: ")]
    assert len(told) == 2
    assert ".metadata is missing" in told[0]
    assert "meta.pt (" in told[1]
    assert main(["checkpoints", "verify", str(run_dir / "checkpoints" / "step-00000010")]) == 0


def test_looking_needs_no_torch(run_dir: Path) -> None:
    code = "import sys; from disttrain.cli import main; main(sys.argv[1:]); print('torch' in sys.modules)"
    for command in ("ls", "verify", "prune"):
        done = subprocess.run(
            [sys.executable, "-c", code, "checkpoints", command, str(run_dir)], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "False", f"{command} loads torch\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_export_writes_the_best_weights(run_dir: Path, tmp_path: Path, name: str) -> None:
    (run_dir / "run.json").write_text(json.dumps({"best": {"step": 50}}))  # what counts is what the markers say
    out = tmp_path / "new" / name
    assert main(["checkpoints", "export", str(run_dir), str(out)]) == 0
    loaded = load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert loaded.keys() == tensors()["model"].keys()
    assert loaded["scale"] == 20
    assert torch.equal(loaded["layer.weight"], tensors()["model"]["layer.weight"])
    assert [path.name for path in out.parent.iterdir()] == [name]
    assert main(["checkpoints", "export", str(run_dir), str(out)]) == 2, "a file was replaced unasked"
    assert main(["checkpoints", "export", str(run_dir), str(out), "--overwrite", "--which", "last", "--ema"]) == 0
    loaded = load_file(out) if out.suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert {name: value.item() for name, value in loaded.items()} == {"scale": 50.5}


def test_export_refuses_what_is_damaged_or_not_there(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_dir / "checkpoints" / "step-00000010"
    flip(path / "__0_0.distcp")
    for arguments, message in (
        ([str(path), "a.pt"], "is damaged"),
        ([str(tmp_path / "none"), "a.pt"], "there is no checkpoint or file at"),
        ([str(run_dir / "checkpoints" / "step-00000020"), "a.txt"], "does not end in a known suffix"),
    ):
        assert main(["checkpoints", "export", arguments[0], str(tmp_path / arguments[1])]) == 2
        assert message in capsys.readouterr().err
    plain = write(tmp_path / "c", "step-00000001", tensors=tensors(), meta=META, global_step=1)
    assert main(["checkpoints", "export", str(plain), str(tmp_path / "a.pt"), "--ema"]) == 2
    assert "has no 'ema' tensors" in capsys.readouterr().err
    assert not (tmp_path / "a.pt").exists()


def test_prune_keeps_by_the_rules(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def there() -> list[int]:
        return [entry.global_step for entry in committed(run_dir / "checkpoints")[0]]

    rules = ["checkpoints", "prune", str(run_dir), "--keep-last", "1", "--keep-best", "2", "--keep-every-steps", "40"]
    assert main([*rules, "--dry-run"]) == 0
    assert "would remove" in capsys.readouterr().out
    assert there() == [10, 20, 30, 40, 50]
    assert main(rules) == 0
    assert there() == [10, 20, 40, 50]
    assert main(["checkpoints", "prune", str(run_dir), "--keep-best", "0"]) == 0
    assert there() == [50]
    assert main(["checkpoints", "prune", str(run_dir), "--keep-last", "0"]) == 2
    assert main(["checkpoints", "prune", str(run_dir / "checkpoints" / "step-00000050")]) == 2
    assert there() == [50]


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_initialize_takes_the_weights_or_says_what_differs(tmp_path: Path) -> None:
    source, path = two_layers(), tmp_path / "w.safetensors"
    write_weights(path, source.state_dict())
    model = two_layers()
    taken = initialize(model, path)
    assert taken.complete
    assert not differing(dict(model.state_dict()), dict(source.state_dict()))

    other = {**source.state_dict(), "1.weight": torch.ones(2, 5), "2.bias": torch.ones(2)}
    del other["0.bias"]
    save_file(other, path)
    model, before = two_layers(), None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        initialize(model, path)
    for word in ("1 missing: 0.bias", "1 unexpected: 2.bias", "1.weight (shape (2, 5), expected (2, 4))"):
        assert word in str(caught.value), f"the message does not say {word!r}: {caught.value}"
    assert not differing(before, dict(model.state_dict())), "the model was changed all the same"
    taken = initialize(model, path, strict=False)
    assert (taken.loaded, taken.missing, taken.unexpected) == (["0.weight", "1.bias"], ["0.bias"], ["2.bias"])
    assert differing(before, dict(model.state_dict())) == ["0.weight", "1.bias"]


def test_a_tied_weight_may_be_there_once(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    write_weights(tmp_path / "w.safetensors", {"0.weight": torch.eye(3)})
    assert initialize(tied, tmp_path / "w.safetensors").complete
    assert torch.equal(tied[1].weight, torch.eye(3))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_weights_that_cannot_be_read_are_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (b"", b"no weights", b"\x80\x04cos\nsystem\n(S'true'\ntR."):
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_weights(path)
        assert str(path) in str(caught.value)
    torch.save({"a": 1}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="is not a state_dict: 'a' is of type int"):
        read_weights(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="no checkpoint or file at"):
        read_weights(tmp_path / "none.pt")


def test_a_run_begins_with_the_weights_of_another(digits: Path, tmp_path: Path) -> None:
    def fit(name: str, *more: str) -> str:
        arguments = [
            *("fit", "--model", "tests.support.tasks.PlainDigits", "--data.fields", "{image: image.npy, label: cls}"),
            *("--data.train", f"{digits}/train.json", "--data.global_batch_size", "32", "--data.micro_batch_size", "8"),
            *("--trainer.run_dir", str(tmp_path / name), "--trainer.progress_bar", "false", *more),
        ]
        outcome = run_cli(2, arguments, folder=tmp_path / f"{name}-logs")
        assert outcome.codes in ([0, 0], [2, 2]), outcome.text
        return outcome.text

    fit("first", "--trainer.max_steps", "3")
    out = tmp_path / "weights.safetensors"
    assert main(["checkpoints", "export", str(tmp_path / "first"), str(out)]) == 0
    # No weight moves: what the second run saves is what it began with.
    still = ("--model.lr", "1e-30", "--trainer.max_steps", "1", "--trainer.parallel.strategy", "fsdp")
    # From a file, from a run's folder, and from the folder of the run that makes room for it.
    for source, place in (
        (out, out),
        (tmp_path / "first", tmp_path / "first" / "checkpoints" / "step-00000003"),
        (tmp_path / "second", tmp_path / "second.2" / "checkpoints" / "step-00000001"),
    ):
        text = fit("second", *still, "--resume", "never", "--initialize_from", str(source))
        assert f"starting from the weights of {place}: 4 tensors loaded" in text
        assert not differing(final_weights(tmp_path / "first"), final_weights(tmp_path / "second"))
        events = [event["text"] for event in read_run(tmp_path / "second")["events"]]
        assert any(f"starting from the weights of {place}" in text for text in events)
    weights = load_file(out)
    save_file({**weights, "model.1.weight": torch.ones(2, 2)}, out)
    text = fit("second", *still, "--resume", "never", "--initialize_from", str(out))
    assert "1 mismatched: model.1.weight (shape (2, 2), expected " in text
    assert f"the older run was moved back to {tmp_path / 'second'}" in text
