"""Blocks that run again in the backward pass: what they keep, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from disttrain.errors import ConfigError
from disttrain.parallel.recompute import checkpoint_blocks


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


def test_the_gradients_are_the_same_and_blocks_run_twice() -> None:
    plain, again = Model(), Model()
    names = list(again.state_dict())
    checkpoint_blocks(again)
    checkpoint_blocks(again)  # a second time changes nothing
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
    with pytest.raises(ConfigError, match="Linear has none"):
        checkpoint_blocks(nn.Linear(2, 2))
