"""A language model of two blocks with dropout and tied weights, its task, and shards of unequal sentences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from disttrain import OptimizerConfig, Task
from disttrain.parallel.model.tensor_parallel import ShardedDropout
from tests.support.shards import npy, write_shard

VOCABULARY, TOKENS, WIDTH, HEADS = 31, 8, 16, 4


class Attention(nn.Module):
    """Causal self-attention over as many heads as this rank has."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        # A bias of the keys changes nothing: its gradient is rounding alone, which Adam would scale up.
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        # (samples, tokens, heads * size) to (samples, heads, tokens, size)
        q, k, v = (
            layer(hidden).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = self.dropout(scores.masked_fill(future, float("-inf")).softmax(-1))
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a layer of neurons, each added to what comes in."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(dropout)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.inner_dropout = nn.Dropout(dropout)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout1(self.attention(self.norm1(hidden)))
        neurons = self.inner_dropout(F.gelu(self.up(self.norm2(hidden))))
        out: Tensor = hidden + self.dropout2(self.down(neurons))
        return out


class LanguageModel(nn.Module):
    """The embedding is the output layer too.

    Args:
        dropout: probability of zeroing a number.
        sequence_parallel: whether tensor parallelism cuts the tokens where it does not cut the layers.
    """

    def __init__(self, dropout: float, sequence_parallel: bool) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.empty(TOKENS, WIDTH))
        self.begin = nn.Identity()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.end = nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw what belongs to no layer."""
        nn.init.normal_(self.positions, std=0.02)

    def shard_units(self) -> list[nn.Module]:
        """Each block by itself; the shared weights stay with the whole."""
        return list(self.blocks)

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Heads and neurons are divided."""
        columns = ("attention.query", "attention.key", "attention.value", "up")
        plan: dict[str, ParallelStyle] = {f"blocks.*.{name}": ColwiseParallel() for name in columns}
        plan["blocks.*.attention.dropout"] = ShardedDropout(1)
        plan["blocks.*.inner_dropout"] = ShardedDropout(-1)
        if not self.sequence_parallel:
            return plan | {f"blocks.*.{name}": RowwiseParallel() for name in ("attention.out", "down")}
        rows = RowwiseParallel(output_layouts=Shard(1))
        gathered = {"input_layouts": (Shard(1),), "desired_input_layouts": (Replicate(),)}
        return plan | {
            "begin": PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1)),
            "blocks.*.norm1": SequenceParallel(),
            "blocks.*.norm2": SequenceParallel(),
            "blocks.*.attention": PrepareModuleInput(**gathered),
            "blocks.*.up": ColwiseParallel(input_layouts=Shard(1)),
            "blocks.*.attention.out": rows,
            "blocks.*.down": rows,
            "blocks.*.dropout1": ShardedDropout(1),
            "blocks.*.dropout2": ShardedDropout(1),
            "norm": SequenceParallel(),
            "end": PrepareModuleInput(**gathered, use_local_output=True),
        }

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of the next tokens, shape (samples, tokens, vocabulary)."""
        hidden = self.begin(self.embedding(tokens) + self.positions)
        for block in self.blocks:
            hidden = block(hidden)
        return F.linear(self.end(self.norm(hidden)), self.embedding.weight)


class LanguageTask(Task):
    """Predicts the next token; as many of them count as a sentence has."""

    def __init__(self, optimizer: OptimizerConfig, dropout: float = 0.1, sequence_parallel: bool = False) -> None:
        super().__init__(optimizer=optimizer)
        self.model = LanguageModel(dropout, sequence_parallel)

    def forward(self, batch: Any) -> Tensor:
        out: Tensor = self.model(batch["tokens"][:, :-1])
        return out

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs.float().transpose(1, 2), batch["tokens"][:, 1:], reduction="none")

    def loss_weights(self, batch: Any) -> Tensor:
        places = torch.arange(TOKENS, device=batch["length"].device)
        return (places < batch["length"][:, None]).float()


def write_sentences(folder: Path) -> Path:
    """Shards of a made-up language, in which a token depends on the two before it: train (3), val and test."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, sizes in {"train": (90, 70, 96), "val": (33,), "test": (37,)}.items():
        for shard, size in enumerate(sizes):
            samples = []
            for number in range(size):
                tokens = list(draw.integers(0, VOCABULARY, 2))
                while len(tokens) <= TOKENS:
                    tokens.append((3 * tokens[-1] + 5 * tokens[-2] + draw.integers(0, 3)) % VOCABULARY)
                length = int(draw.integers(1, TOKENS + 1))
                fields = {"tokens.npy": npy(np.array(tokens, dtype=np.int64)), "length.cls": str(length).encode()}
                samples.append({"__key__": f"{split}-{shard}-{number:03d}", **fields})
            write_shard(folder / f"{split}-{shard}.tar", samples)
    return folder


class UnfilledTask(LanguageTask):
    """A parameter that no initializer fills."""

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__(optimizer)
        self.scale = nn.Parameter(torch.ones(WIDTH))


class MisnamedPlan(LanguageTask):
    """A plan with a name that the model does not have."""

    def tensor_plan(self) -> dict[str, ParallelStyle]:
        """Names what is not there."""
        return {"blocks.*.feed_forward": ColwiseParallel()}
