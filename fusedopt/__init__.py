"""The optimizer step of PyTorch training as one fast, safe operation."""

# ruff: noqa: F403, F405

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "FusedASGD",
    "FusedAdEMAMix",
    "FusedAdadelta",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedAdamax",
    "FusedLAMB",
    "FusedLARS",
    "FusedLion",
    "FusedMuon",
    "FusedNAdam",
    "FusedOptimizer",
    "FusedRAdam",
    "FusedRMSprop",
    "FusedRprop",
    "FusedSGD",
    "FusedStableAdamW",
    "GradScaler",
    "Monitor",
    "NonFiniteGradientError",
    "NotALogError",
    "ParamTelemetry",
    "PeerError",
    "PendingTelemetry",
    "ReplicasDifferError",
    "RunLog",
    "Telemetry",
    "TooManySkipsError",
    "clip",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "consolidated_state_dict",
    "convert",
    "get_total_norm",
    "master_weights",
    "read_log",
    "reference",
    "shard_states",
    "step_together",
]

_MODULES = ("clip", "convert", "reference")
_WITHOUT_TORCH = {"NonFiniteGradientError": "fusedopt.core.nonfinite"}

if TYPE_CHECKING:
    from fusedopt._torch_api import *
else:

    def __getattr__(name: str) -> Any:
        """Imports torch and all public names as soon as one of them is used."""
        if name not in __all__:
            raise AttributeError(f"module 'fusedopt' has no attribute {name!r}")
        import importlib

        try:
            if name in _MODULES:
                return importlib.import_module(f"fusedopt.{name}")
            home = importlib.import_module(_WITHOUT_TORCH.get(name, "fusedopt._torch_api"))
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
            raise ModuleNotFoundError(
                f"fusedopt.{name} needs torch, which is not installed: `pip install torch`. "
                "fusedopt.arrays takes steps on NumPy arrays without it",
                name="torch",
            ) from None
        return globals().setdefault(name, getattr(home, name))

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
