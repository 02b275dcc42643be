"""Law 3: the gradient is that of ``sum(w * loss) / sum(w)`` over the global batch, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain import OptimizerConfig, ParallelConfig, Task, Trainer
from disttrain.data.loader.batches import COUNT, KEY, WEIGHT
from tests.support.ranks import run_ranks
from tests.support.weights import whole_weights

GLOBAL, TOKENS, FEATURES = 12, 7, 5


def global_batch() -> dict[str, Tensor]:
    """Twelve sequences of unequal length and weight, the last two of them padding: a short tail."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, TOKENS + 1, (GLOBAL,), generator=draw)
    return {
        "inputs": torch.randn(GLOBAL, TOKENS, FEATURES, generator=draw, dtype=torch.float64),
        "targets": torch.randn(GLOBAL, TOKENS, generator=draw, dtype=torch.float64),
        "token_weights": (torch.arange(TOKENS) < lengths[:, None]) * torch.rand(GLOBAL, 1, generator=draw).double(),
        WEIGHT: (torch.arange(GLOBAL) < GLOBAL - 2).float(),
    }


class TokenTask(Task):
    """A loss a token, weighted, in double precision."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        torch.manual_seed(1)
        self.model = nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 1)).double()

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["inputs"]).squeeze(-1)
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs - batch["targets"]).square()

    def loss_weights(self, batch: Any) -> Tensor:
        weights: Tensor = batch["token_weights"]
        return weights


class Cut:
    """The micro batches of one rank.

    Args:
        first: the first sample of the rank.
        sizes: the samples of its micro batches, one after the other.
        rank: the rank.
        num_replicas: how many there are.
    """

    def __init__(self, first: int, sizes: tuple[int, ...], rank: int, num_replicas: int) -> None:
        self.first, self.sizes, self.rank, self.num_replicas = first, sizes, rank, num_replicas

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        whole, start = global_batch(), self.first
        for size in self.sizes:
            rows = slice(start, start + size)
            batch: dict[str, Any] = {name: value[rows] for name, value in whole.items()}
            yield {**batch, KEY: [str(i) for i in range(start, start + size)], COUNT: size}
            start += size


Clip = tuple[str, float] | None
CLIPS: tuple[Clip, ...] = (None, ("norm", 0.05), ("value", 0.01))
STRATEGIES = {
    "ddp": ParallelConfig(),
    "fsdp": ParallelConfig(strategy="fsdp"),
    "hsdp": ParallelConfig(strategy="fsdp", replicate=2),
}


def one_step(sizes: list[tuple[int, ...]], strategy: str, folder: str) -> None:
    """For each way of clipping, one step of gradient descent at rate 1; rank 0 saves the weights."""
    for number, clip in enumerate(CLIPS):
        trainer = Trainer(
            run_dir=str(Path(folder) / f"run-{number}"),
            max_steps=1,
            parallel=STRATEGIES[strategy],
            progress_bar=False,
            **({} if clip is None else {f"gradient_clip_{clip[0]}": clip[1]}),  # type: ignore[arg-type]
        )
        rank = trainer.global_rank
        trainer.accumulate_grad_batches = len(sizes[rank])
        task = TokenTask(optimizer=OptimizerConfig(name="sgd", lr=1.0))
        trainer.fit(task, train_dataloaders=Cut(sum(map(sum, sizes[:rank])), sizes[rank], rank, len(sizes)))
        whole = whole_weights(trainer)
        if trainer.is_global_zero:
            torch.save(whole, Path(folder) / f"{number}.pt")


def expected(clip: Clip) -> dict[str, Tensor]:
    """The same step from the whole batch in one piece."""
    task, batch = TokenTask(), global_batch()
    weights = batch["token_weights"] * batch[WEIGHT][:, None].double()
    loss = (task.losses(task(batch), batch) * weights).sum() / weights.sum()
    loss.backward()
    # Not PyTorch's clip_grad_norm_, which divides by the norm plus 1e-6.
    gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    every = torch.cat([gradient.flatten() for gradient in gradients.values()])
    how, bound = clip or ("norm", 0.0)
    assert clip is None or (every.norm() if how == "norm" else every.abs().max()) > 2 * bound, "nothing to clip"
    scale = bound / float(every.norm()) if clip is not None and how == "norm" else 1.0
    limit = bound if how == "value" else torch.inf
    return {
        name: (p - (gradients[name] * scale).clamp(-limit, limit)).detach()
        for name, p in task.named_parameters()
        if name in gradients
    }


LAYOUTS = [(1, 12), (1, 2), (2, 3), (2, 6), (3, 2), (4, 1), (4, 3)]


def check(tmp_path: Path, sizes: list[tuple[int, ...]], strategy: str) -> None:
    """A step on so many ranks is that of one piece, however it is clipped."""
    run_ranks(len(sizes), one_step, sizes, strategy, str(tmp_path), folder=tmp_path / "logs").ok()
    for number, clip in enumerate(CLIPS):
        got, wanted = torch.load(tmp_path / f"{number}.pt", weights_only=True), expected(clip)
        for name, value in wanted.items():
            apart = float((got[name] - value).abs().max())
            assert apart <= 1e-12, f"{name} is {apart:.2e} off (clip {clip})"


@pytest.mark.parametrize(
    ("ranks", "size", "strategy"),
    [*((*layout, name) for layout in LAYOUTS for name in ("ddp", "fsdp")), (4, 3, "hsdp")],
)
def test_gradient_is_that_of_one_piece(tmp_path: Path, ranks: int, size: int, strategy: str) -> None:
    check(tmp_path, [(size,) * (GLOBAL // ranks // size)] * ranks, strategy)


@pytest.mark.parametrize(
    ("sizes", "strategy"), [([(7, 1, 4)], "ddp"), ([(5, 3), (3, 1)], "ddp"), ([(1, 2), (6, 3)], "fsdp")]
)
def test_micro_batches_may_be_of_unequal_size(tmp_path: Path, sizes: list[tuple[int, ...]], strategy: str) -> None:
    """With a loader of one's own; on one rank, and from rank to rank."""
    check(tmp_path, sizes, strategy)
