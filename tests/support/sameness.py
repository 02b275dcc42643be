"""Tasks and micro batches for comparing layouts bit by bit: odd sizes, dropout, unequal weights, tied weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disttrain import OptimizerConfig, Task
from disttrain.data.loader.batches import COUNT, KEY, WEIGHT
from disttrain.optim import build_optimizer

SAMPLES, FEATURES, TOKENS, VOCABULARY = 3, 19, 6, 29


class DropoutMLP(nn.Module):
    """Layers of sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(FEATURES, 37), nn.LayerNorm(37), nn.ReLU(), nn.Dropout(0.2)),
                nn.Sequential(nn.Linear(37, 41), nn.GELU(), nn.Dropout(0.2)),
            ]
        )
        self.head = nn.Linear(41, 3)

    def shard_units(self) -> list[nn.Module]:
        """Each block by itself."""
        return list(self.blocks)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs)
        out: Tensor = self.head(inputs)
        return out


class TinyTransformer(nn.Module):
    """Two blocks; the embedding is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 12)
        layer = {"dim_feedforward": 22, "dropout": 0.1, "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(12, 2, **layer) for _ in range(2))  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(12)

    def shard_units(self) -> list[nn.Module]:
        """Each block by itself; the shared weights stay with the whole."""
        return list(self.blocks)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden)
        return F.linear(self.norm(hidden), self.embedding.weight)


class MLPTask(Task):
    """A loss a sample."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer=optimizer)
        torch.manual_seed(1)
        self.model = DropoutMLP()

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["inputs"])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.float(), batch["labels"], reduction="none")

    def loss_weights(self, batch: Any) -> Tensor:
        weights: Tensor = batch["weights"]
        return weights


class TransformerTask(MLPTask):
    """A loss a token, as many of them count as a sequence is long."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer)
        self.model = TinyTransformer()  # type: ignore[assignment]

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["tokens"][:, :-1])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        targets = batch["tokens"][:, 1:]
        return F.cross_entropy(outputs.float().transpose(1, 2), targets, reduction="none")

    def loss_weights(self, batch: Any) -> Tensor:
        weights: Tensor = batch["token_weights"]
        return weights


class RepeatedTask(MLPTask):
    """A block that runs twice in a forward pass."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer)
        self.model.blocks.append(nn.Linear(41, 41))

    def forward(self, batch: Any) -> Tensor:
        hidden = batch["inputs"]
        for block in [*self.model.blocks, self.model.blocks[-1]]:
            hidden = block(hidden)
        out: Tensor = self.model.head(hidden)
        return out


class ThawingTask(MLPTask):
    """Trains the second block and the head, and from the third step on the first block and the head."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer)
        self.model.blocks[0].requires_grad_(False)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """The blocks differ in their number of parameters."""
        if self.trainer.global_step == 2:
            self.model.blocks[0].requires_grad_(True)
            self.model.blocks[1].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class PlainModule(pl.LightningModule):
    """No Task: the mean of a micro batch, and Lightning's division by their number."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model, self.optimizer_config = DropoutMLP(), optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch["inputs"]), batch["labels"])

    def configure_optimizers(self) -> Any:
        return build_optimizer(self, self.optimizer_config)


TASKS: dict[str, Any] = {
    "mlp": MLPTask,
    "transformer": TransformerTask,
    "repeated": RepeatedTask,
    "plain": PlainModule,
    "thawing": ThawingTask,
}


class MicroBatches:
    """The micro batches of one rank over some steps; those of all ranks are the same for every layout.

    ``num_replicas`` and ``rank`` say which part it gives.
    """

    def __init__(self, rank: int, accumulation: int, *, micro_batches: int, steps: int) -> None:
        self.rank, self.accumulation, self.micro_batches, self.steps = rank, accumulation, micro_batches, steps
        self.num_replicas = micro_batches // accumulation

    def __len__(self) -> int:
        return self.accumulation * self.steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(self.steps):
            for place in range(self.accumulation):
                number = step * self.micro_batches + self.rank * self.accumulation + place
                yield micro_batch(number)


def micro_batch(number: int) -> dict[str, Any]:
    """A micro batch of unequal weights; every fifth ends with padding."""
    draw = torch.Generator().manual_seed(number)
    real = SAMPLES - (number % 5 == 0)
    lengths = torch.randint(1, TOKENS, (SAMPLES, 1), generator=draw)
    return {
        "inputs": torch.randn(SAMPLES, FEATURES, generator=draw),
        "labels": torch.randint(0, 3, (SAMPLES,), generator=draw),
        "weights": torch.rand(SAMPLES, generator=draw) * 3,
        "tokens": torch.randint(0, VOCABULARY, (SAMPLES, TOKENS), generator=draw),
        "token_weights": (torch.arange(TOKENS - 1) < lengths) * torch.rand(SAMPLES, 1, generator=draw),
        WEIGHT: (torch.arange(SAMPLES) < real).float(),
        KEY: [f"{number}-{sample}" for sample in range(SAMPLES)],
        COUNT: real,
    }
