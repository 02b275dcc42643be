"""Tensor parallelism on real ranks: weights, samples, metrics and predictions are those of one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from disttrain.callbacks.records.sample_ledger import read_ledger
from disttrain.run.metrics_file import read_metrics
from disttrain.system.reading import read_run
from tests.support.kills import killed_at
from tests.support.language import write_sentences
from tests.support.ranks import Outcome, run_cli
from tests.support.weights import differing, distance, final_weights

STEPS = 12
SGD = "{name: sgd, lr: 0.1, momentum: 0.9}"
ADAMW = "{name: adamw, lr: 3.0e-3, weight_decay: 0.1}"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of sentences."""
    return write_sentences(tmp_path_factory.mktemp("sentences"))


def arguments(command: str, run_dir: Path, data: Path, parallel: str, *more: str) -> list[str]:
    """Of a command on the language model, with the task's settings and those of the layout."""
    return [
        *(command, "--model", "tests.support.language.LanguageTask"),
        *("--data.train", f"{data}/train-{{0..2}}.tar", "--data.val", f"{data}/val-0.tar"),
        *("--data.test", f"{data}/test-0.tar", "--data.fields", "{tokens: tokens.npy, length: length.cls}"),
        *("--data.global_batch_size", "32", "--data.micro_batch_size", "8", "--trainer.run_dir", str(run_dir)),
        *("--trainer.parallel", parallel, *more),
    ]


def fit(run_dir: Path, data: Path, ranks: int, parallel: str, *more: str) -> Outcome:
    """Train, with a ledger and a checkpoint every 4 steps."""
    optimizer = () if any(word.startswith("--model.optimizer") for word in more) else ("--model.optimizer", SGD)
    words = (
        *optimizer,
        "--trainer.max_steps",
        str(STEPS),
        "--checkpoint.every_steps",
        "4",
        "--checkpoint.save",
        "sync",
        *more,
    )
    ledger = "--trainer.callbacks+=disttrain.callbacks.SampleLedger"
    return run_cli(
        ranks,
        arguments("fit", run_dir, data, parallel, *words, ledger),
        folder=run_dir.parent / f"{run_dir.name}-logs",
    )


@pytest.fixture(scope="module")
def alone(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run_dir = tmp_path_factory.mktemp("tensor") / "alone"
    fit(run_dir, sentences, 1, "{strategy: ddp}").ok()
    return run_dir


@pytest.mark.parametrize(
    ("ranks", "parallel", "more"),
    [
        pytest.param(2, "{strategy: fsdp, tensor: 2}", (), marks=pytest.mark.slow),
        pytest.param(4, "{strategy: fsdp, tensor: 2}", (), marks=pytest.mark.slow),
        (4, "{strategy: fsdp, tensor: 2}", ("--model.sequence_parallel", "true")),
        pytest.param(4, "{strategy: fsdp, tensor: 4, activation_checkpointing: blocks}", (), marks=pytest.mark.slow),
    ],
)
def test_a_run_is_that_of_one_process(
    sentences: Path, tmp_path: Path, alone: Path, ranks: int, parallel: str, more: tuple[str, ...]
) -> None:
    run_dir = tmp_path / "run"
    fit(run_dir, sentences, ranks, parallel, *more).ok()

    apart = distance(final_weights(alone), final_weights(run_dir))
    assert apart <= 1e-5, f"weights are {apart:.2e} apart"
    assert read_ledger(alone / "ledger") == read_ledger(run_dir / "ledger")
    expected, result = read_run(alone)["result"], read_run(run_dir)["result"]
    assert expected.keys() == result.keys()
    for name, value in expected.items():
        assert result[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.slow
def test_clipping_and_adamw(sentences: Path, tmp_path: Path) -> None:
    more = ("--model.optimizer", ADAMW, "--trainer.gradient_clip_norm", "0.5", "--trainer.log_every_steps", "1")
    fit(tmp_path / "alone", sentences, 1, "{strategy: ddp}", *more).ok()
    fit(tmp_path / "run", sentences, 4, "{strategy: fsdp, tensor: 2}", *more, "--model.sequence_parallel=true").ok()
    apart = distance(final_weights(tmp_path / "alone"), final_weights(tmp_path / "run"))
    assert apart <= 1e-4, f"weights are {apart:.2e} apart"
    norms = [_norms(tmp_path / name) for name in ("alone", "run")]
    assert len(norms[0]) == STEPS
    assert min(norms[0]) > 0.5, "nothing was clipped"
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def _norms(run_dir: Path) -> list[float]:
    return [value for _, value in read_metrics(run_dir / "metrics.csv")["train/grad_norm"]]


@pytest.mark.slow
def test_killed_and_resumed_in_other_layouts(sentences: Path, tmp_path: Path, alone: Path) -> None:
    moved = tmp_path / "moved"
    fit(moved, sentences, 4, "{strategy: fsdp, tensor: 2}", *killed_at(5))
    fit(moved, sentences, 2, "{strategy: ddp}", *killed_at(9))
    fit(moved, sentences, 2, "{strategy: fsdp, tensor: 2}").ok()
    assert [attempt["from_step"] for attempt in read_run(moved)["attempts"]] == [0, 4, 8]
    apart = distance(final_weights(alone), final_weights(moved))
    assert apart <= 1e-5, f"weights are {apart:.2e} apart"
    assert read_ledger(alone / "ledger") == read_ledger(moved / "ledger")

    again = tmp_path / "again"
    fit(again, sentences, 4, "{strategy: fsdp, tensor: 2}").ok()
    straight = final_weights(again)
    killed = tmp_path / "killed"
    fit(killed, sentences, 4, "{strategy: fsdp, tensor: 2}", *killed_at(7))
    fit(killed, sentences, 4, "{strategy: fsdp, tensor: 2}").ok()
    assert not differing(straight, final_weights(killed))


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
def test_the_tree_gives_one_tensor_degree_the_same_bits(
    sentences: Path, tmp_path: Path, sequence_parallel: str
) -> None:
    more = ("--model.optimizer", ADAMW, "--trainer.gradient_clip_norm", "0.5", "--trainer.max_steps", "6")
    parallel = "{strategy: fsdp, tensor: 2, reduction: tree}"
    for name, ranks, killed in (("two", 2, []), ("four", 4, killed_at(5))):
        words = (*more, "--model.sequence_parallel", sequence_parallel)
        if killed:
            fit(tmp_path / name, sentences, ranks, parallel, *words, *killed)
        fit(tmp_path / name, sentences, ranks, parallel, *words).ok()
    different = differing(final_weights(tmp_path / "two"), final_weights(tmp_path / "four"))
    assert not different, f"other bits in {different}"


def test_predictions_are_written_once(sentences: Path, tmp_path: Path, alone: Path) -> None:
    written = []
    for ranks, parallel in ((1, "{strategy: ddp}"), (4, "{strategy: fsdp, tensor: 2}")):
        output = tmp_path / f"{ranks}.jsonl"
        more = ("--model.optimizer", SGD, "--checkpoint_path", str(alone), "--output", str(output))
        run_cli(ranks, arguments("predict", alone, sentences, parallel, *more), folder=tmp_path / f"{ranks}").ok()
        written.append([json.loads(line) for line in output.read_text().splitlines()])
    one, four = written
    assert [row["key"] for row in one] == [row["key"] for row in four]
    assert len(one) == 37
    for ours, theirs in zip(one, four, strict=True):
        torch.testing.assert_close(torch.tensor(theirs["output"]), torch.tensor(ours["output"]), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_initial_weights_made_on_the_meta_device_are_the_same(sentences: Path, tmp_path: Path) -> None:
    for name, ranks, parallel in (("one", 1, "{strategy: ddp"), ("four", 4, "{strategy: fsdp, tensor: 2")):
        fit(tmp_path / name, sentences, ranks, f"{parallel}, meta_init: true}}", "--trainer.max_steps", "2").ok()
    apart = distance(final_weights(tmp_path / "one"), final_weights(tmp_path / "four"))
    assert apart <= 1e-6, f"weights are {apart:.2e} apart"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_parameter_that_nothing_fills_is_one_clear_error(sentences: Path, tmp_path: Path, strategy: str) -> None:
    words = ("--model", "tests.support.language.UnfilledTask", "--model.optimizer", SGD)
    parallel = f"{{strategy: {strategy}, meta_init: true}}"
    outcome = run_cli(2, arguments("fit", tmp_path / "run", sentences, parallel, *words), folder=tmp_path / "logs")
    assert set(outcome.codes) == {2}, outcome.text
    assert "nothing initializes scale of" in outcome.text.replace("\n", " ")
    assert "Traceback" not in outcome.text


@pytest.mark.parametrize(
    ("task", "tensor", "words"),
    [
        ("tests.support.tasks.PlainDigits", 2, "does not say how to divide its layers"),
        ("tests.support.language.MisnamedPlan", 2, "names 'blocks.*.feed_forward', which matches no module of it"),
        ("tests.support.language.LanguageTask", 3, "parallel.tensor 3 does not divide out_features 16 of blocks.0"),
        ("tests.support.language.LanguageTask", 5, "does not equal 2 ranks"),
    ],
)
def test_what_does_not_fit_is_refused(sentences: Path, tmp_path: Path, task: str, tensor: int, words: str) -> None:
    ranks = tensor if tensor == 3 else 2
    parallel = f"{{strategy: fsdp, tensor: {tensor}}}"
    more = ("--model", task, *(("--model.optimizer", SGD) if "Plain" not in task else ()))
    outcome = run_cli(ranks, arguments("fit", tmp_path / "run", sentences, parallel, *more), folder=tmp_path / "logs")
    assert set(outcome.codes) == {2}, outcome.text
    assert words in outcome.text.replace("\n", " "), outcome.text
    assert "Traceback" not in outcome.text
