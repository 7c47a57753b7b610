"""Limits of the gradient norm that adapt themselves, for `max_grad_norm` of every optimizer.

    FusedAdamW(params, max_grad_norm=fusedopt.clip.ZScore())

`Percentile` and `ZScore` limit the global norm by the norms of the steps before; `PerTensor` limits
each parameter's gradient by its own; `Unit` each row of a gradient by that of its parameter. All do
so on the device, without waiting for it. A step that is skipped, or whose norm is inf, nan or 0,
never enters their statistics: a limit of 0 would be the last one.
"""

from fusedopt.reference.limits import AdaptiveClip, Percentile, PerTensor, Unit, ZScore

__all__ = ["AdaptiveClip", "PerTensor", "Percentile", "Unit", "ZScore"]
