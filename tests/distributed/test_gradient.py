"""Law 3: the gradient is that of ``sum(w * loss) / sum(w)`` over the global batch, however it is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from disttrain import OptimizerConfig, ParallelConfig, Task, Trainer
from disttrain.data.batches import COUNT, KEY, WEIGHT
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
    """The micro batches of one rank."""

    def __init__(self, rank: int, ranks: int, size: int) -> None:
        self.first, self.each, self.size = rank * GLOBAL // ranks, GLOBAL // ranks, size

    def __len__(self) -> int:
        return self.each // self.size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        whole = global_batch()
        for start in range(self.first, self.first + self.each, self.size):
            rows = slice(start, start + self.size)
            batch: dict[str, Any] = {name: value[rows] for name, value in whole.items()}
            yield {**batch, KEY: [str(i) for i in range(start, start + self.size)], COUNT: self.size}


def one_step(ranks: int, size: int, strategy: str, clip: float | None, out: str) -> None:
    """One step of gradient descent at rate 1; rank 0 saves the weights."""
    parallel = ParallelConfig(strategy=strategy)  # type: ignore[arg-type]
    trainer = Trainer(
        run_dir=str(Path(out).parent / "run"),
        max_steps=1,
        parallel=parallel,
        gradient_clip_norm=clip,
        progress_bar=False,
    )
    trainer.accumulate_grad_batches = GLOBAL // ranks // size
    task = TokenTask(optimizer=OptimizerConfig(name="sgd", lr=1.0))
    trainer.fit(task, train_dataloaders=Cut(trainer.global_rank, ranks, size))
    whole = whole_weights(trainer)
    if trainer.is_global_zero:
        torch.save(whole, out)


def expected(clip: float | None) -> dict[str, Tensor]:
    """The same step from the whole batch in one piece."""
    task, batch = TokenTask(), global_batch()
    weights = batch["token_weights"] * batch[WEIGHT][:, None].double()
    loss = (task.losses(task(batch), batch) * weights).sum() / weights.sum()
    loss.backward()
    # Not PyTorch's clip_grad_norm_, which divides by the norm plus 1e-6.
    norm = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]).norm()
    assert clip is None or norm > 2 * clip, "there is nothing to clip"
    scale = 1.0 if clip is None else clip / float(norm)
    return {name: (p - p.grad * scale).detach() for name, p in task.named_parameters() if p.grad is not None}


LAYOUTS = [(1, 12), (1, 2), (2, 3), (2, 6), (3, 2), (4, 1), (4, 3)]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("ranks", "size"), LAYOUTS)
def test_gradient_is_that_of_one_piece(tmp_path: Path, ranks: int, size: int, strategy: str) -> None:
    for clip in (None, 0.05):
        out = tmp_path / f"{clip}.pt"
        run_ranks(ranks, one_step, ranks, size, strategy, clip, str(out), folder=tmp_path / "logs").ok()
        got, wanted = torch.load(out, weights_only=True), expected(clip)
        for name, value in wanted.items():
            apart = float((got[name] - value).abs().max())
            assert apart <= 1e-12, f"{name} is {apart:.2e} off (clip {clip})"
