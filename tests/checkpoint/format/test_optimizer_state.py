"""Optimizer state as tensors and plain values: what is kept, what is refused, and what a resume takes from this run."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain.checkpoint.format.contents import split_off_extra
from disttrain.checkpoint.format.optimizer_state import Filling, agreed_groups, named_state, restore_groups, split
from disttrain.errors import CheckpointError
from tests.support.optimizers import Fates, Odd, checkpoint, data, fit
from tests.support.ranks import run_ranks
from tests.support.weights import differing, final_weights


def moved(optimizer: Any, into: Any, module: nn.Module, other: nn.Module, of_mu: tuple[str, ...] = ()) -> None:
    """Load an optimizer's state into another one, as a checkpoint would, which may say something else of ``mu``."""
    tensors, plain = split(named_state(optimizer, module), "optimizer 0")
    if of_mu:
        ((_, _, (_, values)),) = plain["entries"]
        values[0] = ("mu", of_mu)
    index = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    now = named_state(into, other)["param_groups"]
    filling = Filling(
        into,
        other,
        index=index,
        kept={name: parameter.dtype for name, parameter in module.named_parameters()},
        entries=plain["entries"],
        groups=agreed_groups(Path("c"), "AdamW", plain["param_groups"], now),
    )
    assert filling.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        filling.tensors[name].copy_(tensor)
    filling.finish()


def stepped(module: nn.Module, optimizer: Any) -> Any:
    """After a step with gradients of 1."""
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("fused", [False, True])
def test_this_run_chooses_the_kernels(fused: bool) -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    saved = stepped(one, torch.optim.AdamW(one.parameters(), fused=fused, foreach=not fused, weight_decay=0.0))
    into = torch.optim.AdamW(other.parameters(), fused=not fused, foreach=fused, weight_decay=0.0)
    moved(saved, into, one, other)
    assert into.param_groups[0]["fused"] is (not fused)
    assert into.param_groups[0]["foreach"] is fused
    if not fused:  # what a loss scaler or the guard of updates needs
        into.found_inf = torch.ones(())  # type: ignore[attr-defined]
        before = other.weight.detach().clone()
        stepped(other, into)
        assert torch.equal(other.weight, before), "the fused kernel does not look at found_inf"
    saved.add_param_group({"params": [bias := nn.Parameter(torch.ones(2))], "lr": 0.5})
    one.register_parameter("added", bias)
    other.register_parameter("added", nn.Parameter(torch.ones(2)))
    with pytest.warns(UserWarning, match="parameter group with added"):
        restore_groups(into, other, named_state(saved, one)["param_groups"])
    assert into.param_groups[1]["lr"] == 0.5
    assert [into.param_groups[1][name] for name in ("fused", "foreach")] == [not fused, fused]


@pytest.mark.parametrize("saved_as_tensor", [False, True])
def test_a_learning_rate_has_the_form_of_this_run(saved_as_tensor: bool) -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    rates: list[Any] = [torch.tensor(0.25), 0.125]
    rates = rates if saved_as_tensor else rates[::-1]
    saved = stepped(one, torch.optim.AdamW(one.parameters(), lr=rates[0], foreach=False))
    into = torch.optim.AdamW(other.parameters(), lr=rates[1], foreach=False)
    moved(saved, into, one, other)
    found = into.param_groups[0]["lr"]
    assert type(found) is type(rates[1])
    assert float(found) == float(rates[0])
    stepped(other, into)


def test_state_keeps_its_types_whatever_pytorch_casts() -> None:
    one, other = (nn.Linear(3, 2).to(torch.bfloat16) for _ in range(2))
    saved, into = stepped(one, Odd(one.parameters())), Odd(other.parameters())
    saved.state["all"] = {"label": "kept", "table": torch.arange(3)}
    moved(saved, into, one, other)
    here, there = saved.state[one.weight], into.state[other.weight]
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert type(there[name]) is type(value), name
    assert there["mode"] == "heavy"
    assert there["wide"].dtype == torch.float64
    assert there["seen"][0][0] == 1
    assert torch.equal(there["seen"][0][1], here["seen"][0][1])
    assert into.calls == 1
    assert into.state["all"]["label"] == "kept"
    assert torch.equal(into.state["all"]["table"], torch.arange(3))


@pytest.mark.parametrize("device", [(), ("cpu",), ("cuda",)])  # an older checkpoint, one of this machine, one of a GPU
def test_state_beside_that_of_parameters_comes_back(device: tuple[str, ...]) -> None:
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    saved, into = (torch.optim.SGD(module.parameters(), momentum=0.9) for module in (one, other))
    stepped(one, saved).state["all"] = {"mu": torch.tensor(0.5), "rows": [torch.arange(3)]}
    moved(saved, into, one, other, of_mu=("tensor", *device))
    assert torch.equal(into.state["all"]["mu"], torch.tensor(0.5))
    assert torch.equal(into.state["all"]["rows"][0], torch.arange(3))
    assert torch.equal(into.state[other.weight]["momentum_buffer"], saved.state[one.weight]["momentum_buffer"])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({1, 2}, r"optimizer 0, state 'odd' of weight is of type set"),
        ([1, [object()]], r"state 'odd' of weight\[1\]\[0\] is of type object"),
        ({(1, 2): 3}, "of type dict with a key of type tuple"),
        (torch.eye(2).to_sparse(), "of type Tensor of layout torch.sparse_coo"),
        (torch.float32, "of type dtype"),
    ],
)
def test_state_that_cannot_be_saved_is_refused_by_name_and_type(value: Any, words: str) -> None:
    module = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters())
    optimizer.state[module.weight] = {"odd": value}
    with pytest.raises(CheckpointError, match=words) as caught:
        split(named_state(optimizer, module), "optimizer 0")
    assert caught.value.hint


def test_settings_and_parameters_that_cannot_be_saved_are_refused() -> None:
    module = nn.Linear(3, 2)
    group = {"params": list(module.parameters()), "rule": max}
    with pytest.raises(CheckpointError, match=r"optimizer 0, parameter group 0\.rule \(of type builtin_function"):
        split(named_state(torch.optim.SGD([group]), module), "optimizer 0")
    with pytest.raises(CheckpointError, match=r"SGD holds a parameter of shape \(7,\) that does not belong to Linear"):
        named_state(torch.optim.SGD([*module.parameters(), nn.Parameter(torch.ones(7))]), module)
    optimizer = torch.optim.SGD(module.parameters())
    optimizer.state[nn.Parameter(torch.ones(2))] = {"momentum_buffer": torch.ones(2)}
    with pytest.raises(CheckpointError, match="state for a parameter that is in none of its parameter groups"):
        named_state(optimizer, module)
    with pytest.raises(CheckpointError, match=r"layer\._extra_state\.0 \(of type object\)"):
        split_off_extra({"layer._extra_state": [object()]})


ADAMW = functools.partial(torch.optim.AdamW, lr=0.05)


class Saving(Fates):
    """Saves before the first step."""

    def on_train_start(self) -> None:
        run_dir = Path(self.trainer.default_root_dir)
        self.trainer.save_checkpoint(run_dir.with_name("first") / "checkpoints" / "step-00000000")


def resume_format_2(folder: Path) -> None:
    """Its parameter without a gradient could not be loaded by what wrote it."""
    path = folder / "old" / "checkpoints" / "step-00000005"
    shutil.copytree(Path(__file__).parents[1] / "trained" / "2" / path.name, path)
    fit(Fates(ADAMW), folder / "whole", data(folder), every=13)
    fit(Fates(ADAMW), folder / "resumed", data(folder), resume=path, every=13)
    assert not differing(final_weights(folder / "whole"), final_weights(folder / "resumed"))


def save_before_the_first_step(folder: Path) -> None:
    """And resume from it."""
    whole = fit(Fates(ADAMW), folder / "whole", data(folder), every=13)
    saved = fit(Saving(ADAMW), folder / "saved", data(folder), every=13)
    resumed = fit(Fates(ADAMW), folder / "resumed", data(folder), every=13, resume=checkpoint(folder / "first", 0))
    for trainer in (saved, resumed):
        assert not differing(final_weights(folder / "whole"), final_weights(Path(trainer.default_root_dir)))
        ours, theirs = trainer.optimizers[0].state_dict(), whole.optimizers[0].state_dict()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_checkpoint_of_format_2_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    run_ranks(1, resume_format_2, tmp_path, folder=tmp_path / "logs").ok()


def test_a_save_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    run_ranks(1, save_before_the_first_step, tmp_path, folder=tmp_path / "logs").ok()
