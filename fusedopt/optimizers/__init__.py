"""The optimizers, a small file per family: the formula in plain torch, and the classes."""
