"""Arguments of ``disttrain fit`` that kill ranks with SIGKILL."""

from __future__ import annotations


def killed_at(step: int, micro_batch: int = 0, *, rank: int | None = None, once: bool = False) -> list[str]:
    """Kill a rank, or all of them, at the start of a micro batch of the step after ``step``."""
    name = "--trainer.callbacks"
    which = [] if rank is None else [f"{name}.rank={rank}"]
    return [
        f"{name}+=tests.support.callbacks.KillAt",
        f"{name}.step={step}",
        f"{name}.micro_batch={micro_batch}",
        *which,
        f"{name}.once={str(once).lower()}",
    ]
