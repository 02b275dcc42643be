"""Shards that hold one class each: batches as mixed, and models as good, as after a uniform shuffle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import nn

from disttrain.data.order.sample_order import Order, OrderConfig
from disttrain.data.pack.samples import stratified_split

Ids = NDArray[np.int64]


def uniform(num_samples: int, batch: int, seed: int = 0) -> Ids:
    """A uniform shuffle. ids: (step, sample)"""
    return np.random.default_rng(seed).permutation(num_samples)[: num_samples // batch * batch].reshape(-1, batch)


def entropy(labels: Ids) -> float:
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("batch", [64, 96, 256, 1024])
@pytest.mark.parametrize(("shards", "classes"), [(10, 10), (100, 10), (100, 100), (1000, 1000)])
def test_batches_of_class_sorted_shards_are_as_mixed_as_a_uniform_shuffles(
    shards: int, classes: int, batch: int
) -> None:
    order = Order([1000] * shards, OrderConfig(batch))
    labels = np.arange(order.num_samples) * classes // order.num_samples
    steps = np.unique(np.linspace(0, order.steps_per_epoch - 1, 40).astype(int)).tolist()
    ids = np.concatenate([order.sample_ids(0, step) for step in steps])
    ours = np.mean([entropy(row) for row in labels[ids]])
    theirs = np.mean([entropy(row) for row in labels[uniform(order.num_samples, batch)[:200]]])
    assert ours / theirs >= 0.95, f"label entropy {ours:.3f}, of a uniform shuffle {theirs:.3f}"


def accuracy(order: Callable[[int], Ids], seed: int, data: dict[str, torch.Tensor]) -> float:
    """Test accuracy of a small network after one pass in some order."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for ids in torch.from_numpy(order(seed)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(data["images"][ids]), data["labels"][ids]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((net(data["test_images"]).argmax(1) == data["test_labels"]).double().mean())


@pytest.fixture(scope="module")
def sorted_digits() -> dict[str, torch.Tensor]:
    """Noisy copies of four fifths of the digits, 2,000 of each class, sorted by class; and of the last fifth."""
    images, labels = load_digits(return_X_y=True)
    kept, held_out = stratified_split(labels.astype(np.int64), fractions=(0.8, 0.2), seed=0)
    ids = np.concatenate([np.resize(kept[labels[kept] == number], 2000) for number in range(10)])
    data = {}
    for name, chosen in (("", ids), ("test_", np.resize(held_out, 4000))):
        noisy = images[chosen] + np.random.default_rng(len(chosen)).normal(0, 4, (len(chosen), 64))
        data[f"{name}images"] = torch.from_numpy(((noisy - 5) / 6).astype(np.float32))
        data[f"{name}labels"] = torch.from_numpy(labels[chosen].astype(np.int64))
    return data


def test_a_model_trained_on_class_sorted_shards_is_as_good_as_after_a_uniform_shuffle(
    sorted_digits: dict[str, torch.Tensor],
) -> None:
    """100 shards of 200 samples of one class; the benchmark has larger ones, more orders and seeds."""
    shards, batch = [200] * 100, 64
    steps = sum(shards) // batch

    def ours(seed: int) -> Ids:
        return Order(shards, OrderConfig(batch, seed=seed)).sample_ids(0, 0, steps)

    orders = {
        "ours": ours,
        "uniform": lambda seed: uniform(sum(shards), batch, seed),
        "none": lambda seed: np.arange(steps * batch).reshape(steps, batch),
    }
    seeds = {"ours": range(4), "uniform": range(4), "none": range(1)}
    found = {name: [accuracy(order, s, sorted_digits) for s in seeds[name]] for name, order in orders.items()}
    means = {name: float(np.mean(values)) for name, values in found.items()}
    assert means["none"] < 0.5, f"sorted by class is no difficulty here: {found}"
    assert means["uniform"] > 0.85, f"the network does not learn: {found}"
    assert means["ours"] > means["uniform"] - 0.01, f"worse than a uniform shuffle by more than seeds differ: {found}"
