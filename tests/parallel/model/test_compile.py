"""What can be said of compiling before anything is compiled."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from disttrain.callbacks.records.compile_report import describe
from disttrain.errors import ConfigError
from disttrain.parallel.model.compile import Compilation, compile_blocks
from tests.support.sameness import DropoutMLP

CPU = torch.device("cpu")


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.compile is blocks, but Linear has no blocks"):
        compile_blocks(nn.Linear(2, 2), CPU)


def test_a_machine_without_a_compiler_is_refused() -> None:
    from torch._inductor import config, cpp_builder

    try:
        with config.patch({"cpp.cxx": ("no-such-compiler",)}):
            cpp_builder.cpp_compiler_search.cache_clear()
            with pytest.raises(ConfigError, match=r"there is no C\+\+ compiler"):
                compile_blocks(DropoutMLP(), CPU)
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # from PyTorch's own imports
def test_names_and_classes_stay() -> None:
    model, plain = DropoutMLP(), DropoutMLP()
    compile_blocks(model, CPU)
    forward = model.blocks[0].forward
    compile_blocks(model, CPU)
    assert model.blocks[0].forward is forward, "compiled twice"
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [type(block) for block in model.blocks] == [type(block) for block in plain.blocks]


def test_breaks_are_told_by_reason() -> None:
    assert describe(Compilation(1)) == "compiled 1 graph without a break"
    found = Compilation(4, {"print": 2, "item": 1})
    assert describe(found) == "compiled 4 graphs with 3 breaks, which cost speed: print (2 x); item (1 x)"
