"""The float32 weights that an optimizer trains, by the names of its parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.core.optimizer import FusedOptimizer, check_optimizer
from fusedopt.reference.formats import param_values
from fusedopt.reference.groups import distinct_params, named_params


@torch.no_grad()
def master_weights(optimizer: FusedOptimizer) -> dict[str, Tensor]:
    """Copies of the weights that an optimizer trains: of the masters, where parameters have some.

    Args:
        optimizer: any of fusedopt's. After `shard_states`, this rank's share is returned.

    Returns:
        By the parameter's name, or else its place ("parameter 0 of param group 0"), a tensor of the
        parameter's shape on its device: float32, or float64 for a float64 parameter.

    Raises:
        TypeError: the optimizer is another library's.
    """
    check_optimizer("master_weights", optimizer)
    optimizer._follow_names()
    groups = {id(param): group for group, param in distinct_params(optimizer.param_groups)}
    return {
        name: param_values(groups[id(param)], param, optimizer.state.get(param))
        for param, name in named_params(optimizer.param_groups)
        if optimizer._keeps(param)
    }
