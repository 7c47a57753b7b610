"""Checkpoints for other libraries' optimizers, from an optimizer with states of fewer bits.

    torch.save(fusedopt.convert.to_torch(optimizer), "optimizer.pt")

The other way needs no function: `load_state_dict` takes torch's checkpoints and recognizes those of
bitsandbytes, torchao, FlashOptim, TransformerEngine and apex.
"""

from fusedopt.core.convert import to_bitsandbytes, to_torch, to_torchao

__all__ = ["to_bitsandbytes", "to_torch", "to_torchao"]
