"""Kernels that add in no fixed order: found in the graph of a loss, refused or replaced, without a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from disttrain import Trainer
from disttrain.errors import ConfigError
from disttrain.parallel import determinism
from disttrain.parallel.determinism import check_ordered_sums, unordered_sums, use_deterministic_kernels
from disttrain.parallel.reduction.summation import SummationMixin

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def leaf(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape).numel()).view(shape).requires_grad_()


INDEX = torch.tensor([0, 1, 1])
CASES: dict[str, tuple[Callable[[], Tensor], list[str]]] = {
    "layers": (lambda: F.cross_entropy(F.layer_norm(F.gelu(leaf(3, 4) @ leaf(4, 4)), (4,)), INDEX), []),
    "convolutions": (lambda: F.max_pool2d(F.conv2d(leaf(1, 1, 8, 8), leaf(1, 1, 3, 3)), 2), []),
    "embedding": (lambda: F.embedding(INDEX, leaf(3, 2)), []),
    "attention": (lambda: F.scaled_dot_product_attention(leaf(1, 1, 4, 8), leaf(1, 1, 4, 8), leaf(1, 1, 4, 8)), []),
    "index": (lambda: leaf(3)[INDEX], []),
    "bilinear": (lambda: F.interpolate(leaf(1, 1, 4, 4), scale_factor=2, mode="bilinear"), ["UpsampleBilinear2D"]),
    "nearest": (lambda: F.interpolate(leaf(1, 1, 4, 4), scale_factor=2), []),
    "antialias": (lambda: F.interpolate(leaf(1, 1, 4, 4), 2, mode="bicubic", antialias=True), ["UpsampleBicubic2DAa"]),
    "gather": (lambda: leaf(3).gather(0, INDEX) + leaf(3).index_select(0, INDEX), ["Gather", "IndexSelect"]),
    "scatter": (lambda: torch.zeros(3).scatter_add(0, INDEX, leaf(3)).cumsum(0), ["Cumsum", "ScatterAdd"]),
    "grid": (lambda: F.grid_sample(leaf(1, 1, 4, 4), leaf(1, 2, 2, 2), align_corners=False), ["GridSampler2D"]),
    "pool": (lambda: F.adaptive_avg_pool2d(leaf(1, 1, 6, 6), 3), ["AdaptiveAvgPool2D"]),
    "ctc": (
        lambda: F.ctc_loss(leaf(5, 1, 3).log_softmax(2), torch.tensor([[1]]), torch.tensor([5]), torch.tensor([1])),
        ["CtcLoss"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_they_are_found_in_the_graph(name: str) -> None:
    make, found = CASES[name]
    assert unordered_sums(make().sum()) == found
    assert unordered_sums(torch.ones(())) == []


@pytest.mark.parametrize(
    "name",
    [
        *("ScaledDotProductFlashAttentionBackward0", "ScaledDotProductEfficientAttentionBackward0"),
        *("ScaledDotProductCudnnAttentionBackward0", "IndexAddBackward0", "ReplicationPad2DBackward0"),
    ],
)
def test_the_names_of_nodes_that_only_a_device_makes(name: str) -> None:
    assert determinism._UNORDERED.fullmatch(name)
    assert hasattr(torch._C._functions, name) or name.startswith("ScaledDot"), "PyTorch calls it otherwise"


def test_the_tree_is_refused_on_cuda_alone_and_without_deterministic_kernels_alone() -> None:
    loss = CASES["gather"][0]().sum()
    check_ordered_sums(loss, torch.device("cpu"))
    check_ordered_sums(CASES["layers"][0](), CUDA)
    with pytest.raises(ConfigError, match=r"reduction is tree.*Gather, IndexSelect.*\n.*trainer.deterministic"):
        check_ordered_sums(loss, CUDA)
    torch.use_deterministic_algorithms(True)
    check_ordered_sums(loss, CUDA)


def test_a_strategy_looks_at_its_first_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strategy(SummationMixin):
        root_device = CUDA
        _sums: Any = object()

    with pytest.raises(ConfigError, match="Cumsum"):
        Strategy().backward(CASES["scatter"][0]().sum(), None)


def test_it_is_set_before_cuda_starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The Trainer on a device: the variable is there before anything asks the device for what it can do."""
    seen: list[Any] = []

    def starts(**options: Any) -> bool:
        seen.append((os.environ.get(VARIABLE), torch.are_deterministic_algorithms_enabled()))
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", starts)
    with pytest.raises(KeyboardInterrupt):
        Trainer(run_dir=str(tmp_path), precision="bf16-mixed", deterministic=True, progress_bar=False)
    assert seen == [(":4096:8", True)]
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark


def test_what_comes_too_late_or_against_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":0:0")
    with pytest.raises(ConfigError, match=r"CUBLAS_WORKSPACE_CONFIG is ':0:0'"):
        use_deterministic_kernels("cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv(VARIABLE, ":16:8")
    use_deterministic_kernels("cuda")
    assert os.environ[VARIABLE] == ":16:8"
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(ConfigError, match="has used CUDA already"):
        use_deterministic_kernels("cuda")
    use_deterministic_kernels("cpu")
    assert VARIABLE not in os.environ
