"""Blocks that run again in the backward pass: what they keep, and what they leave alone."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from disttrain.errors import ConfigError
from disttrain.parallel.model.activation_checkpointing import checkpoint_blocks


class Counted(nn.Module):
    """A block that counts its runs and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.runs = nn.Linear(6, 6), 0

    def forward(self, inputs: Tensor, *, scale: float = 1.0) -> Tensor:
        self.runs += 1
        return nn.functional.dropout(self.linear(inputs).tanh(), 0.5) * scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Counted(), Counted()])

    def shard_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(self, inputs: Tensor) -> Tensor:
        for block in self.blocks:
            inputs = block(inputs, scale=2.0)
        return inputs.sum()


def gradients(model: Model) -> list[Tensor]:
    torch.manual_seed(7)
    model(torch.ones(3, 6)).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def saved_bytes(model: Model) -> int:
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        model(torch.ones(3, 6))
    return sum(sizes)


KINDS: list[Literal["blocks", "selective"]] = ["blocks", "selective"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_the_same_and_blocks_run_twice(kind: Literal["blocks", "selective"]) -> None:
    plain, again = Model(), Model()
    names = list(again.state_dict())
    checkpoint_blocks(again, kind)
    checkpoint_blocks(again, kind)  # a second time changes nothing
    expected, got = gradients(plain), gradients(again)
    assert len(got) == 4
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert [block.runs for block in again.blocks] == [2, 2]
    assert list(again.state_dict()) == names
    assert all(type(block) is Counted for block in again.blocks)


def test_less_is_kept() -> None:
    again = Model()
    checkpoint_blocks(again)
    assert saved_bytes(again) < saved_bytes(Model())


def test_without_gradients_blocks_run_once() -> None:
    model = Model()
    checkpoint_blocks(model)
    with torch.no_grad():
        model(torch.ones(3, 6))
    assert [block.runs for block in model.blocks] == [1, 1]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="blocks, but Linear has no blocks"):
        checkpoint_blocks(nn.Linear(2, 2))


def flops(model: nn.Module, batch: Tensor) -> int:
    torch.manual_seed(7)
    with FlopCounterMode(display=False) as counter:
        model(batch).sum().backward()
    return int(counter.get_total_flops())


def test_selective_runs_no_matrix_product_again() -> None:
    plain, blocks, selective = Model(), Model(), Model()
    checkpoint_blocks(blocks, "blocks")
    checkpoint_blocks(selective, "selective")
    batch = torch.ones(3, 6)
    assert flops(plain, batch) == flops(selective, batch) < flops(blocks, batch)
    assert saved_bytes(selective) < saved_bytes(Model())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_convolutions_have_the_same_gradients(
    kind: Literal["blocks", "selective"], dropout: float
) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.mix, self.conv = nn.Linear(8, 24), nn.Conv1d(8, 8, 3, padding=1)

        def forward(self, inputs: Tensor) -> Tensor:
            q, k, v = self.mix(inputs).view(2, 5, 2, 12).transpose(1, 2).chunk(3, dim=-1)
            out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
            out = nn.functional.dropout(out.transpose(1, 2).reshape(2, 5, 8), 0.5)
            return nn.functional.dropout(self.conv(out.mT).mT.relu(), 0.2)

    def gradients_of(recompute: bool) -> list[Tensor]:
        model = nn.Sequential(Attention(), Attention())
        model.shard_units = lambda: list(model)  # type: ignore[assignment]
        if recompute:
            checkpoint_blocks(model, kind)
        torch.manual_seed(7)
        model(torch.linspace(-1, 1, 80).view(2, 5, 8)).square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients_of(False)
    assert len(plain) == 8
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients_of(True), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_count_a_batch_once(kind: Literal["blocks", "selective"]) -> None:
    def trained(recompute: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 1))
        model.shard_units = lambda: [model[0]]  # type: ignore[assignment]
        if recompute:
            checkpoint_blocks(model, kind)
        for _ in range(2):
            model(torch.randn(5, 3, generator=torch.Generator().manual_seed(1))).sum().backward()
        return {**model.state_dict(), **{f"{name}.grad": p.grad for name, p in model.named_parameters()}}

    plain, again = trained(False), trained(True)
    assert int(plain["0.1.num_batches_tracked"]) == 2
    assert [name for name in plain if not torch.equal(plain[name], again[name])] == []
