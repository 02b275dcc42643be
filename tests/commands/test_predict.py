"""The options of ``disttrain predict``: a mistake is one message, before any rank computes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.ranks import run_cli


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--format", "parqet"], ["format is 'parqet'", "'jsonl', 'parquet', 'tar'"]),
        (["--output", "there", "--samples_per_file", "5"], ["--output there does not say", "give --format"]),
        (["--output", "/dev/null/there.jsonl"], ["cannot be written to /dev/null/there.jsonl"]),
    ],
)
def test_a_mistake_is_one_message(digits: Path, tmp_path: Path, options: list[str], words: list[str]) -> None:
    common = ["predict", "--config", "recipes/digits.yaml", "--trainer.run_dir", str(tmp_path / "run")]
    data = [f"--data.test={digits}/test.json"]
    if "/dev" in options[-1]:  # found when the output is begun, for which there must be something to predict with
        fit = ["fit", *common[1:], *data, f"--data.train={digits}/train.json", f"--data.val={digits}/val.json"]
        short = ["--trainer.max_steps", "1", "--model.schedule.name", "constant"]
        run_cli(1, [*fit, *short], folder=tmp_path / "fit").ok()
    outcome = run_cli(2, [*common, *data, *options], folder=tmp_path / "logs")
    assert set(outcome.codes) == {2}, outcome.text
    assert outcome.outputs[0].count("disttrain: error (rank 0 of 2)") == 1, outcome.text
    assert outcome.outputs[1] == "", outcome.text
    assert "Traceback" not in outcome.text
    missing = [word for word in words if word not in outcome.outputs[0]]
    assert not missing, f"the message lacks {missing}:\n{outcome.text}"
