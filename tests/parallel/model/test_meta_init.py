"""Initial values of models that were built on the meta device: keyed by name and seed, complete or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from disttrain.errors import ConfigError
from disttrain.parallel.model.meta_init import initialize, starts_on_meta
from tests.support.sameness import TinyTransformer

CPU = torch.device("cpu")


def build(make: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    """Build on the meta device, then initialize."""
    with torch.device("meta"):
        module = make()
    initialize(module, CPU, seed=seed)
    return module


def differing(a: nn.Module, b: nn.Module) -> set[str]:
    other = b.state_dict()
    return {name for name, value in a.state_dict().items() if not torch.equal(value, other[name])}


def test_values_are_those_of_name_and_seed() -> None:
    state = torch.get_rng_state()
    one = build(TinyTransformer)
    assert torch.equal(torch.get_rng_state(), state), "the generator's state was changed"
    torch.rand(5)
    assert not differing(one, build(TinyTransformer))
    drawn = {name for name, value in one.state_dict().items() if value.std() > 0}
    assert differing(one, build(TinyTransformer, seed=4)) == drawn
    assert "blocks.0.self_attn.in_proj_weight" in drawn
    assert "blocks.0.self_attn.out_proj.bias" not in drawn  # the attention sets it to 0 after its child drew it
    weights = one.state_dict()
    assert not torch.equal(weights["blocks.0.linear1.weight"], weights["blocks.1.linear1.weight"])
    # As torch.nn draws them: uniform over +-1/sqrt(inputs).
    assert 0.9 / 12**0.5 < float(weights["blocks.0.linear1.weight"].abs().max()) <= 1 / 12**0.5


class Tied(nn.Module):
    """The output layer shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)
        self.head = nn.Linear(4, 50)
        self.head.weight = self.embedding.weight


def test_shared_weights_stay_shared_and_are_the_first_ones() -> None:
    tied = build(Tied)
    assert tied.head.weight is tied.embedding.weight
    alone = build(lambda: nn.ModuleDict({"embedding": nn.Embedding(50, 4)}))
    assert torch.equal(tied.embedding.weight, alone["embedding"].weight)


class Rotary(nn.Module):
    """A buffer that is not saved, one with a value from the start, and weights of a parent over its child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(3, 3)
        self.register_buffer("angles", torch.arange(4.0), persistent=False)
        self.register_buffer("scale", torch.full((2,), 7.0, device="cpu"))
        self.register_buffer("count", torch.tensor(0))

    def init_weights(self) -> None:
        self.angles = torch.arange(4.0)
        self.count.zero_()
        with torch.no_grad():
            self.child.weight.mul_(100)


def test_buffers_and_parents_that_change_their_children() -> None:
    module = build(Rotary)
    assert module.angles.tolist() == [0, 1, 2, 3]
    assert module.scale.tolist() == [7, 7]
    assert int(module.count) == 0
    child = build(lambda: nn.ModuleDict({"child": nn.Linear(3, 3)}))
    assert torch.equal(module.child.weight, child["child"].weight * 100)


def test_half_precision_is_the_rounded_single_precision() -> None:
    rounded = build(lambda: nn.Linear(5, 5).to(torch.bfloat16))
    assert torch.equal(rounded.weight, build(lambda: nn.Linear(5, 5)).weight.to(torch.bfloat16))


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.token = nn.Linear(2, 2), nn.Parameter(torch.zeros(2))


class Partly(Token):
    def reset_parameters(self) -> None:
        """Forgets the token."""


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones(2, dtype=torch.bool))

    def reset_parameters(self) -> None:
        """Forgets the mask."""


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), torch.tensor(3.0)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Token, "nothing initializes inner.token of ModuleDict"),
        (Partly, "nothing initializes inner.token of ModuleDict"),
        (Masked, "nothing initializes inner.mask of ModuleDict"),
        (Loose, "inner.scale of ModuleDict is a tensor on the meta device that is neither"),
    ],
)
def test_what_would_have_no_value_is_refused_by_name(kind: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(lambda: nn.ModuleDict({"inner": kind()}))


def test_a_model_elsewhere_than_the_configuration_says_is_refused() -> None:
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    assert starts_on_meta(empty, wanted=True, fitting=True)
    assert not starts_on_meta(nn.Linear(2, 2), wanted=True, fitting=False)  # filled by an earlier fit
    with pytest.raises(ConfigError, match=r"weight of Linear is on the meta device, and parallel.meta_init is false"):
        starts_on_meta(empty, wanted=False, fitting=True)
    with pytest.raises(ConfigError, match=r"parallel.meta_init is true, and weight of Linear is not on the meta"):
        starts_on_meta(nn.Linear(2, 2), wanted=True, fitting=True)
