"""Random numbers in training that do not depend on which rank draws them.

Before each micro batch, PyTorch's generators are seeded from (seed, optimizer step, index of the micro batch in the
global batch). So a micro batch at the same position of the same step draws the same dropout masks on any rank, with any
number of ranks, and after any resume; there is no generator state to save. Cost: a few microseconds per micro batch.
"""

from __future__ import annotations

import torch

_MASK = 2**64 - 1


def mix(*values: int) -> int:
    """Hash integers to 64 bits: SplitMix64's finalizer, chained (Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def seed_micro_batch(seed: int, step: int, micro_batch: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of ``device`` for one micro batch."""
    seed_generators(mix(seed, step, micro_batch), device)


def seed_generators(key: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of ``device``."""
    torch.default_generator.manual_seed(key)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(key)
