"""The data module: what names shards, what is refused and how, and what a checkpoint recognizes it by."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from disttrain.data.cache.shard_cache import CacheConfig
from disttrain.data.decode.fields import Field
from disttrain.data.index.shard_index import ShardIndex, write_manifest
from disttrain.data.loader.batches import COUNT, ID, KEY
from disttrain.data.loader.loaders import EvaluationLoader, LoaderConfig
from disttrain.data.module import ShardedDataModule, ShuffleConfig, sharded_data
from disttrain.data.remote.ranges import RetryConfig
from disttrain.errors import CheckpointError, ConfigError, DataError
from disttrain.trainer import Trainer
from tests.support.caches import shards_of
from tests.support.servers import RangeServer
from tests.support.shards import write_numbered


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """60 training samples in four shards, 13 for validation in one, 5 for test in one."""
    write_numbered(tmp_path, [20, 10, 5, 25])
    write_numbered(tmp_path, [13], name="val")
    write_numbered(tmp_path, [5], name="test")
    return tmp_path


def module(folder: Path, **changes: Any) -> ShardedDataModule:
    settings: dict[str, Any] = {
        "train": str(folder / "train-{000..003}.tar"),
        "val": str(folder / "val-*.tar"),
        "test": str(folder / "test-000.tar"),
        "global_batch_size": 12,
        "micro_batch_size": 4,
        "loader": LoaderConfig(threads=0),
    }
    return ShardedDataModule(**(settings | changes))


def trainer_of(folder: Path, data: ShardedDataModule) -> Trainer:
    """A trainer that has been given the data, before it has run anything."""
    trainer = Trainer(run_dir=str(folder / "run"), accelerator="cpu", progress_bar=False)
    vars(trainer)["datamodule"], data.trainer = data, trainer
    return trainer


def keys(loader: Any) -> list[str]:
    return [key for batch in loader for key in batch[KEY][: batch[COUNT]]]


def message(error: BaseException, words: list[str]) -> None:
    missing = [word for word in words if word not in str(error)]
    assert not missing, f"the message does not say {missing}:\n{error}"


def test_patterns_lists_and_manifests_name_the_same_data(folder: Path) -> None:
    paths = [str(folder / f"train-{i:03d}.tar") for i in range(4)]
    manifest = folder / "train.json"
    write_manifest(manifest, ShardIndex.open(paths).shards, name="train")
    found = []
    for spec in (
        str(folder / "train-{000..003}.tar"),
        str(folder / "train-*.tar"),
        str(manifest),
        paths,
        [paths[0], str(folder / "train-{001..002}.tar"), paths[3]],
    ):
        data = module(folder, train=spec)
        data.setup("fit")
        assert data.order is not None
        found.append((data.order.fingerprint(), keys(data.train_dataloader())))
    assert all(other == found[0] for other in found[1:]), "one data set under several names"
    assert (len(found[0][1]), len(set(found[0][1]))) == (60, 60)


def test_without_a_trainer(folder: Path) -> None:
    data = module(folder, seed=5, shuffle=ShuffleConfig(lanes=3, window=7))
    data.prepare_data()
    data.setup("fit")
    assert (data.global_batch_size, data.seed, data.steps_per_epoch) == (12, 5, 5)
    assert (data.order_config.lanes, data.order_config.window) == (3, 7)
    loader = data.train_dataloader()
    assert len(loader) == 5 * 3
    first = next(iter(loader))
    assert set(first) == {"x.npy", "cls", "__key__", "__id__", "__weight__", "__count__"}, "not every extension"
    assert data.order is not None
    assert first[ID].tolist() == data.order.sample_ids(0, 0, 1, (0, 4))[0].tolist()
    assert keys(data.val_dataloader()) == [f"val-{i:05d}" for i in range(13)]
    data.setup("test")
    assert keys(data.test_dataloader()) == [f"test-{i:05d}" for i in range(5)]
    data.setup("predict")
    assert keys(data.predict_dataloader()) == keys(data.test_dataloader()), "the test shards are predicted by default"
    assert len(data.reader("val").index) == 13


@pytest.mark.parametrize("asked", ["pattern", "manifest", "sizes", "table"])
def test_servers_are_asked_as_often_as_the_cache_is_to(
    server: RangeServer, tmp_path: Path, cache_home: Path, asked: str
) -> None:
    shards = shards_of(server)
    shutil.rmtree(cache_home)  # or the tables are known
    spec, sized = str(server.folder / "m.json"), 1 if asked == "table" else -1
    write_manifest(Path(spec), [replace(shard, size_bytes=sized * shard.size_bytes) for shard in shards], name="train")
    if asked in ("pattern", "manifest"):
        spec = f"{server.url}/train-{{000..007}}.tar" if asked == "pattern" else f"{server.url}/m.json"
    server.fail("m.json", *["status:500"] * 9)
    server.fail("train-000.tar", *["status:500"] * 9)
    cache = CacheConfig(str(tmp_path / "c"), retry=RetryConfig(attempts=3, base_seconds=0))
    with pytest.raises(DataError, match=r"HTTP 500: .*\(3 attempts in"):
        module(tmp_path, train=spec, val=None, cache=cache).setup("fit")


def test_each_stage_opens_its_own_shards_only(folder: Path) -> None:
    for stage, split in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        specs: dict[str, Any] = dict.fromkeys(("train", "val", "test", "predict"))
        data = module(folder, **(specs | {split: str(folder / "val-000.tar")}))
        data.setup(stage)
        assert len(data.reader(split).index) == 13
        assert data.order is None


def test_prepare_data_leaves_sidecars_and_setup_does_not(folder: Path) -> None:
    module(folder).setup("fit")
    assert not list(folder.glob("*.idx")), "every rank writes sidecars"
    module(folder).prepare_data()
    assert [path.name for path in sorted(folder.glob("*.idx"))] == [
        *(f"train-{i:03d}.idx" for i in range(4)),
        "val-000.idx",
    ]


def test_fields_by_extension_or_in_full(folder: Path) -> None:
    data = module(folder, fields={"x": "x.npy", "raw": Field("cls", decoder="bytes")})
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert tuple(batch["x"].shape) == (4, 3)
    assert batch["raw"] == [str(i % 4).encode() for i in batch[ID].tolist()]


def test_ranks_come_from_the_launcher_where_there_is_no_trainer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}.items():
        monkeypatch.setenv(name, value)
    data = module(folder)
    data.setup("fit")
    loader, validation = data.train_dataloader(), data.val_dataloader()
    assert (loader.rank, loader.plan.num_ranks, loader.plan.accumulation) == (2, 3, 1)
    assert data.order is not None
    assert next(iter(loader))[ID].tolist() == data.order.sample_ids(0, 0, 1, (8, 12))[0].tolist()
    assert isinstance(validation, EvaluationLoader)
    assert keys(validation) == []  # four micro batches, two for each of the first two ranks
    assert len(validation) == 2


def test_without_validation_shards(folder: Path) -> None:
    for nothing in (None, "", []):
        data = module(folder, val=nothing)
        trainer = trainer_of(folder, data)
        data.setup("fit")
        assert data.val_dataloader() == []
        assert trainer.limit_val_batches == 0
        with pytest.raises(DataError, match=r"data\.val names no shards"):
            data.setup("validate")


def test_a_trainer_is_told_the_accumulation(folder: Path) -> None:
    data = module(folder)
    trainer = trainer_of(folder, data)
    assert sharded_data(trainer) is data
    data.prepare_data()
    data.setup("fit")
    assert trainer.accumulate_grad_batches == 3
    assert trainer.limit_val_batches != 0
    data.setup("fit")
    assert trainer.accumulate_grad_batches == 3, "set up twice"


def test_the_position_is_the_trainers(folder: Path) -> None:
    data = module(folder)
    trainer = trainer_of(folder, data)
    data.setup("fit")
    batches = iter(data.train_dataloader())
    trainer.fit_loop.epoch_progress.current.completed = 2
    trainer.fit_loop.epoch_loop.batch_progress.current.ready = 4 * 3
    assert data.order is not None
    rest = [batch[ID].tolist() for batch in batches]
    assert rest == data.order.sample_ids(2, 4)[0].reshape(3, 4).tolist(), "not the fifth step of the third epoch"


def test_an_accumulation_set_by_hand_is_refused(folder: Path) -> None:
    data = module(folder)
    data.trainer = pl.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(ConfigError) as caught:
        data.setup("fit")
    message(caught.value, ["accumulate_grad_batches is 2", "on 1 ranks imply 3", "remove accumulate_grad_batches"])


def test_a_trainer_without_sharded_data(folder: Path) -> None:
    assert sharded_data(Trainer(run_dir=str(folder / "run"), accelerator="cpu", progress_bar=False)) is None


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"train": "{}/trian-{{000..003}}.tar"}, DataError, ["data.train", "trian-000.tar", "3 more", "train-000.tar"]),
        ({"train": "{}/train-*.zip"}, DataError, ["data.train", "no file matches"]),
        ({"train": "{}/none.json"}, DataError, ["data.train", "none.json", "shards index"]),
        ({"val": "{}/vol-000.tar"}, DataError, ["data.val", "vol-000.tar does not exist", "'val-000.tar'"]),
        ({"train": None}, DataError, ["data.train names no shards"]),
        ({"fields": {"x": "x.npz"}}, ConfigError, ["'x.npz'", "did you mean 'npy'?"]),
        (
            {"fields": {"x": "y.npy"}},
            DataError,
            ["data.train", "'x'", "'y.npy'", "cls, x.npy", "did you mean 'x.npy'?"],
        ),
        (
            {"micro_batch_size": 5},
            ConfigError,
            ["micro_batch_size 5", "12", "use micro_batch_size 1, 2, 3, 4, 6 or 12"],
        ),
        ({"global_batch_size": 64}, DataError, ["60 samples", "one global batch of 64", "at most 60"]),
        ({"shuffle": ShuffleConfig(lanes=5)}, ConfigError, ["lanes is 5", "global_batch_size 12"]),
    ],
)
def test_settings_that_cannot_work_are_refused(
    folder: Path, changes: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    changes = {name: value.format(folder) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(error) as caught:
        module(folder, **changes).setup("fit")
    message(caught.value, words)


def test_ranks_that_do_not_divide_the_global_batch_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "5", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        module(folder).setup("fit")
    message(
        caught.value, ["global_batch_size 12", "5 ranks", "1, 2, 3, 4, 6 or 12 ranks", "global_batch_size 10 or 15"]
    )


@pytest.mark.parametrize("split", ["train", "val", "test", "predict"])
def test_what_is_not_set_up_is_named(folder: Path, split: str) -> None:
    with pytest.raises(DataError, match=f"data.{split}"):
        module(folder).reader(split)


def test_what_needs_the_training_data_says_so(folder: Path) -> None:
    data = module(folder)
    with pytest.raises(DataError, match="not set up"):
        data.train_dataloader()
    with pytest.raises(DataError, match="not set up"):
        _ = data.steps_per_epoch


def saved_by(folder: Path, **changes: Any) -> dict[str, Any]:
    data = module(folder, **changes)
    data.setup("fit")
    return data.state_dict()


def test_a_checkpoint_of_the_same_order_is_accepted(folder: Path) -> None:
    data = module(folder, micro_batch_size=2)  # how it is cut does not matter
    data.setup("fit")
    data.load_state_dict(saved_by(folder))
    data.load_state_dict({})  # a checkpoint of someone else's data module
    assert module(folder).state_dict() == {}
    module(folder).load_state_dict(saved_by(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, ["seed was 1, is now 0"]),
        ({"global_batch_size": 20}, ["global_batch_size was 20, is now 12"]),
        ({"shuffle": ShuffleConfig(lanes=2)}, ["lanes was 2, is now 12"]),
        ({"shuffle": ShuffleConfig(window=8)}, ["window was 8, is now 16384"]),
        (
            {"train": "{}/train-{{000..002}}.tar"},
            ["started with 3 of these shards, and 1 was appended", "train-003.tar"],
        ),
        ({"train": "{}/train-{{001..003}}.tar"}, ["num_samples was 40, is now 60", "shards was"]),
        ({"train": "{}/train-{{001,000,002,003}}.tar"}, ["shards was"]),
    ],
)
def test_a_checkpoint_of_another_order_is_refused(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    changes = {name: value.format(folder) if isinstance(value, str) else value for name, value in changes.items()}
    saved = saved_by(folder, **changes)
    data = module(folder)
    data.setup("fit")
    with pytest.raises(CheckpointError) as caught:
        data.load_state_dict(saved)
    message(caught.value, [*words, "order of samples", "--resume never"])
    unchanged = {"seed", "window", "version"} - set(changes) - ({"window"} if "shuffle" in changes else set())
    named = [name for name in unchanged if f"{name} was" in str(caught.value)]
    assert not named, f"the message names {named}, which did not change:\n{caught.value}"


def test_a_checkpoint_of_another_version_of_the_order_is_refused(folder: Path) -> None:
    saved = saved_by(folder)
    saved["order"]["version"] = 0
    data = module(folder)
    data.setup("fit")
    with pytest.raises(CheckpointError, match="samples has format 0; this disttrain has format 1"):
        data.load_state_dict(saved)


@pytest.mark.parametrize(("size", "micro"), [(16, 16), (64, 32), (48, 24), (37, 1), (31, 31), (1, 1)])
def test_the_usual_micro_batch_divides_the_global_batch_and_does_not_depend_on_the_ranks(size: int, micro: int) -> None:
    data = ShardedDataModule(train="x.tar", global_batch_size=size)
    assert (data.micro_batch_size, data.evaluation_batch_size) == (micro, micro)


def test_it_is_cut_by_that_size(folder: Path) -> None:
    data = module(folder, micro_batch_size=None)
    data.setup("fit")
    assert data.plan is not None
    assert (data.plan.micro_batch_size, data.plan.accumulation) == (12, 1)
