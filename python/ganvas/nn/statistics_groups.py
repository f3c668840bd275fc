"""Several batches through BatchNorm in one forward, each with statistics of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from ganvas.nn.fused import FusedSequential, runs_fused
from ganvas.nn.run import uses_batch_statistics


@contextmanager
def statistics_groups(module: nn.Module, groups: int) -> Iterator[None]:
    """Within the block ``module`` takes a batch for ``groups`` equal consecutive ones with statistics of their own.

    ``torch.cat([module(a), module(b)])`` and, within ``statistics_groups(module, 2)``, ``module(torch.cat([a, b]))``
    give the same outputs, gradients and running statistics (updated once per group, in order). One forward costs
    less than two, and a discriminator that sees real and generated images in one forward works under
    DistributedDataParallel.

    Layers other than BatchNorm see the whole batch: one that mixes samples (minibatch discrimination) mixes the groups.

    Raises:
        ValueError: ``groups`` is less than 1, or ``module`` has a norm that would mix the groups; it is named.
    """
    if groups < 1:
        raise ValueError(f"groups must be at least 1; got {groups}")
    if groups > 1 and (reason := supports_statistics_groups(module)) is not None:
        raise ValueError(f"module cannot keep {groups} statistics groups apart: {reason}")
    # Only instances that had a number of their own (an enclosing block's) get one back; the class says 1.
    fused = [child for child in module.modules() if isinstance(child, FusedSequential)]
    before = [child.__dict__.get("statistics_groups") for child in fused]
    for child in fused:
        child.statistics_groups = groups
    try:
        yield
    finally:
        for child, number in zip(fused, before):
            if number is None:
                child.__dict__.pop("statistics_groups", None)
            else:
                child.statistics_groups = number


def supports_statistics_groups(module: nn.Module) -> str | None:
    """None, or which norm of ``module`` would, in the present mode, mix the groups."""
    if _depends_on_batch(module):
        return f"the module itself is a {type(module).__name__}, outside of a FusedSequential"
    for parent_name, parent in module.named_modules():
        takes_apart = runs_fused(parent)
        for name, child in parent.named_children():
            if _depends_on_batch(child) and not (takes_apart and isinstance(child, _BatchNorm)):
                full_name = f"{parent_name}.{name}" if parent_name else name
                return (
                    f"{full_name} ({type(child).__name__}) takes its statistics from the whole batch; only a BatchNorm "
                    f"that is a FusedSequential's child can take them group by group, its parent is a "
                    f"{type(parent).__name__}"
                )
    return None


def _depends_on_batch(module: nn.Module) -> bool:
    """Statistics of the batch in the output (BatchNorm), or in the running statistics (also InstanceNorm's)."""
    if isinstance(module, _InstanceNorm):
        return module.training and module.track_running_stats
    return isinstance(module, _BatchNorm) and uses_batch_statistics(module)
