"""``sync_batchnorm``: statistics, gradients and running statistics of one process that has all ranks' samples."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from disttrain.parallel.model.sync_batchnorm import sync_batch_norms
from disttrain.system.reading import read_run
from tests.support.ranks import run_cli, run_ranks
from tests.support.weights import differing, distance, final_weights


def build(kind: str) -> nn.Module:
    """Two layers with batch norms, in double precision."""
    torch.manual_seed(3)
    if kind == "flat":
        layers = [nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=None)]
    else:
        layers = [nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Tanh(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3)]
    return nn.Sequential(*layers).double()


def batch(kind: str) -> tuple[Tensor, Tensor]:
    """Nine samples far from zero, and weights of the outputs that make every gradient another."""
    draw = torch.Generator().manual_seed(4)
    shape = (9,) if kind == "flat" else (9, 2, 2)
    inputs = torch.randn(9, 5, *shape[1:], generator=draw, dtype=torch.float64) * 3 + 50
    return inputs, torch.randn(9, 3, *shape[1:], generator=draw, dtype=torch.float64)


def compare_in(kind: str) -> None:
    """Each of three ranks runs a share of unequal size; rank sums are compared with PyTorch's own on the whole."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plain = build(kind)
    synced = copy.deepcopy(plain)
    assert sync_batch_norms(synced) == sync_batch_norms(synced) == 2
    assert list(synced.state_dict()) == list(plain.state_dict())
    assert repr(synced) == repr(plain)
    assert all(isinstance(a, type(b)) for a, b in zip(synced, plain, strict=True))
    inputs, weights = batch(kind)
    mine = slice(*[(0, 4), (4, 5), (5, 9)][rank])
    for _ in range(2):
        whole, own = inputs.clone().requires_grad_(), inputs[mine].clone().requires_grad_()
        expected, got = plain(whole), synced(own)
        (expected * weights).sum().backward()
        (got * weights[mine]).sum().backward()
        assert whole.grad is not None
        assert own.grad is not None
        torch.testing.assert_close(got, expected[mine], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own.grad, whole.grad[mine], rtol=1e-8, atol=1e-10)
    for (name, a), b in zip(plain.named_parameters(), synced.parameters(), strict=True):
        assert b.grad is not None
        dist.all_reduce(b.grad)
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    for (name, a), b in zip(plain.named_buffers(), synced.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
        bits = [torch.empty_like(b) for _ in range(3)]
        dist.all_gather(bits, b)
        assert all(torch.equal(one, b) for one in bits), f"{name} differs between ranks"
    plain.eval(), synced.eval()
    assert torch.equal(plain(inputs), plain(inputs))
    torch.testing.assert_close(synced(inputs), plain(inputs), rtol=1e-9, atol=1e-9)
    dist.destroy_process_group()


def test_a_module_with_synced_norms_can_be_pickled(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    module(torch.randn(4, 2))
    sync_batch_norms(module)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert sync_batch_norms(loaded) == 1
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), loaded.buffers(), strict=True))


@pytest.mark.parametrize("kind", ["flat", "images"])
def test_three_unequal_ranks_are_one_process(tmp_path: Path, kind: str) -> None:
    run_ranks(3, compare_in, kind, folder=tmp_path).ok()


@pytest.mark.slow
def test_runs_are_those_of_larger_micro_batches_and_resume_to_the_bit(digits: Path, tmp_path: Path) -> None:
    """Two ranks of 8 samples, under DDP and FSDP, train as one process of 16."""

    def fit(name: str, ranks: int, size: int, parallel: str, *more: str) -> None:
        arguments = [
            *("fit", "--model", "tests.support.tasks.BatchNormDigits", "--data.fields"),
            *("{image: image.npy, label: cls}", "--data.global_batch_size", "16"),
            *(f"--data.{split}={digits}/{split}.json" for split in ("train", "val", "test")),
            *("--data.micro_batch_size", str(size), "--trainer.parallel", parallel, "--trainer.max_steps", "12"),
            *(
                "--trainer.run_dir",
                str(tmp_path / name),
                "--checkpoint.every_steps",
                "4",
                "--checkpoint.save",
                "sync",
                *more,
            ),
        ]
        run_cli(ranks, arguments, folder=tmp_path / f"{name}-logs")

    fit("alone", 1, 16, "{strategy: ddp}")
    alone = final_weights(tmp_path / "alone")
    fit("ddp", 2, 8, "{strategy: ddp, sync_batchnorm: true}")
    assert distance(alone, final_weights(tmp_path / "ddp")) <= 1e-5
    fit("apart", 2, 8, "{strategy: ddp}")
    assert distance(alone, final_weights(tmp_path / "apart")) > 1e-4, "the statistics do not matter here"
    fsdp = "{strategy: fsdp, sync_batchnorm: true}"
    killed = ["--trainer.callbacks+=tests.support.callbacks.KillAt", "--trainer.callbacks.step=10"]
    fit("fsdp", 2, 8, fsdp)
    assert distance(alone, final_weights(tmp_path / "fsdp")) <= 1e-5
    fit("killed", 2, 8, fsdp, *killed, "--trainer.callbacks.micro_batch=0")
    fit("killed", 2, 8, fsdp)
    assert read_run(tmp_path / "killed")["attempts"][-1]["from_step"] == 8
    assert not differing(final_weights(tmp_path / "fsdp"), final_weights(tmp_path / "killed"))
