"""Limits of the gradient norm that adapt themselves, for `max_grad_norm` of every optimizer.

    FusedAdamW(params, max_grad_norm=fusedopt.clip.ZScore())

`Percentile` and `ZScore` limit the global norm by the norms of earlier steps. `PerTensor` limits
the norm of each gradient by its own earlier norms. `Unit` limits the norm of each row of a gradient
by the norm of the parameter's row. All work on the device, without waiting for it. Statistics
ignore a step that is skipped, or whose norm is inf, nan or 0: a limit of 0 would clip every later
gradient to 0.
"""

from fusedopt.reference.limits import AdaptiveClip, Percentile, PerTensor, Unit, ZScore

__all__ = ["AdaptiveClip", "PerTensor", "Percentile", "Unit", "ZScore"]
