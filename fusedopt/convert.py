"""Checkpoints for other libraries' optimizers, from an optimizer with states of fewer bits.

    torch.save(fusedopt.convert.to_torch(optimizer), "optimizer.pt")

The other way needs no function: `load_state_dict` takes torch's checkpoints.
"""

from fusedopt.core.convert import to_torch

__all__ = ["to_torch"]
