"""How a rank that ran out of memory takes part in the collectives of a step that it no longer computes.

Under DDP (:class:`DDPLockstep`) the collectives are the buckets of gradients, which go out as the parameters' hooks
fire: a backward pass through the parameters alone, with zeros, fires those that are left. Under FSDP
(:class:`FSDPLockstep`) every block gathers its parameters before it runs, forward and backward, and scatters its
gradients after; the hooks of FSDP2 are called block by block without the blocks. That needs blocks which run once each
in a forward pass, in one order; where the order is not known yet from an earlier pass, it is the order in which the
module holds them.

Cost while all goes well: a Python call a trained parameter in a backward pass (DDP), a few a block (FSDP).
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_iter
from torch.utils.hooks import RemovableHandle

from disttrain.errors import ConfigError
from disttrain.parallel.fsdp_internals import UnitDriver, fsdp_modules


class DDPLockstep:
    """For DDP, and for one rank alone.

    Args:
        strategy: whose ``model`` is wrapped in DDP by the time :meth:`start` is called.
        module: what is trained.
    """

    def __init__(self, strategy: Any, module: pl.LightningModule) -> None:
        self._strategy, self._module = strategy, module
        self._wrapped: nn.Module | None = None
        self._trained: list[nn.Parameter] = []
        self._fired: set[int] = set()
        self._handles: list[RemovableHandle] = []

    def start(self) -> None:
        """Watch which parameters have their gradients."""
        self._wrapped = self._strategy.model
        self._trained = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        if isinstance(self._strategy.model, DistributedDataParallel):
            fired = self._fired
            self._handles = [
                p.register_post_accumulate_grad_hook(lambda parameter: fired.add(id(parameter)))  # type: ignore[no-untyped-call]
                for p in self._trained
            ]

    def begin(self) -> None:
        """A micro batch begins. DDP was built again if layers were frozen or thawed."""
        if self._strategy.model is not self._wrapped:
            self.close()
            self.start()
        self._fired.clear()

    def learn(self) -> None:
        """There is nothing to learn."""

    def finish_forward(self) -> None:
        """A forward pass has no collectives but the broadcast of buffers, which comes first."""

    def empty_loss(self) -> Tensor:
        """Zero; connected to all parameters in the micro batch that reduces their gradients."""
        return self._zero(self._trained if self._reduces() else [])

    def finish_backward(self) -> None:
        """Fire the hooks that have not fired."""
        if self._reduces():
            rest = [parameter for parameter in self._trained if id(parameter) not in self._fired]
            torch.autograd.backward(self._zero(rest))

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _reduces(self) -> bool:
        model = self._strategy.model
        return isinstance(model, DistributedDataParallel) and bool(model.require_backward_grad_sync)

    def _zero(self, parameters: list[nn.Parameter]) -> Tensor:
        zero = torch.zeros((), device=self._module.device, requires_grad=True)
        return sum((parameter.sum().float() * 0.0 for parameter in parameters), start=zero * 1.0)


class FSDPLockstep:
    """For FSDP.

    Args:
        module: what is trained; sharded by the time :meth:`start` is called.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._blocks: list[FSDPModule] = []  # in the order in which they run, as far as it is known
        self._known = False
        self._calls_itself = True  # whether the training step calls the module, which FSDP2 counts as one more unit
        self._wants_gradient: dict[FSDPModule, bool] = {}  # whether a block's inputs do
        self._handles: list[RemovableHandle] = []
        self._driver: UnitDriver | None = None

    def start(self) -> None:
        """Watch the blocks."""
        units = fsdp_modules(self._module)
        self._driver = UnitDriver(units)
        self._blocks = [unit for unit in units if unit is not self._root()]
        for block in self._blocks:
            assert isinstance(block, nn.Module)
            self._handles.append(block.register_forward_pre_hook(self._note_inputs, with_kwargs=True))

    def begin(self) -> None:
        """A micro batch begins."""
        self._units().begin(self._root())

    def learn(self) -> None:
        """Know the order of the blocks from a forward pass that went well."""
        if self._known:
            return
        ran = self._ran()
        if len(set(ran)) != len(ran) or set(ran) != set(self._blocks):
            raise ConfigError(
                "data.micro_batch_size is auto, and a sharded block runs twice or not at all in a forward pass, so that"
                " a rank without memory could not keep step with the others",
                mend="leave the block out of shard_units(), or set data.micro_batch_size to a number",
            )
        self._blocks, self._known = ran, True
        self._calls_itself = self._root() in self._units().ran(self._root())

    def finish_forward(self) -> None:
        """Gather the blocks that have not run, one after the other."""
        ran = set(self._units().ran(self._root()))
        for unit in [*self._blocks, self._root()] if self._calls_itself else self._blocks:
            if unit not in ran:
                self._units().pass_by(unit)

    def empty_loss(self) -> Tensor:
        """Zero, whose backward pass drives the blocks."""
        leaf = torch.zeros((), device=self._module.device, requires_grad=True)
        loss: Tensor = _Drive.apply(leaf, self)  # type: ignore[no-untyped-call]
        return loss

    def finish_backward(self) -> None:
        """Drive the blocks that are left."""
        self._units().forget_callback(self._root())
        torch.autograd.backward(self.empty_loss())

    def drive(self) -> None:
        """What FSDP2 does in a backward pass, for the blocks that are left. Called inside of one."""
        units, root = self._units(), self._root()
        units.queue_callback(root)
        order = [root, *reversed(self._ran())]
        for block, following in zip(order, [*order[1:], None], strict=True):
            if block in units.reduced:
                continue
            units.gather(block)
            if following is not None and following not in units.reduced:
                units.begin_gathering(following)
            # Those whose inputs want no gradient are reduced at the end of the pass, after the root.
            units.give_zeros(block, reduce=block is not root and self._takes_gradient(block))

    def close(self) -> None:
        """Watch no more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _units(self) -> UnitDriver:
        assert self._driver is not None
        return self._driver

    def _root(self) -> FSDPModule:
        assert isinstance(self._module, FSDPModule)
        return self._module

    def _ran(self) -> list[FSDPModule]:
        """The blocks whose forward pass is over, in order."""
        root = self._root()
        return [unit for unit in self._units().ran(root) if unit is not root]

    def _takes_gradient(self, block: FSDPModule) -> bool:
        # Of a block that has never run: the first one's inputs are the data, unless parameters come before it.
        default = block is not self._blocks[0] or self._units().is_trained(self._root())
        return self._wants_gradient.get(block, default)

    def _note_inputs(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            assert isinstance(block, FSDPModule)
            values = tree_iter((args, kwargs))
            self._wants_gradient[block] = any(isinstance(v, Tensor) and v.requires_grad for v in values)


class _Drive(torch.autograd.Function):
    """Zero, in whose backward pass the blocks are driven."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, lockstep: FSDPLockstep) -> Tensor:
        ctx.lockstep = lockstep
        return leaf.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.lockstep.drive()
        return grad, None
