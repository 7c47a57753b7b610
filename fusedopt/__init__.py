"""The optimizer step of PyTorch training as one fast, safe operation."""

from fusedopt import clip, convert, reference
from fusedopt.core.checks import NonFiniteGradientError
from fusedopt.core.masters import master_weights
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.core.replicas import ReplicasDifferError
from fusedopt.core.shard_states import consolidated_state_dict, shard_states
from fusedopt.core.skip_limit import TooManySkipsError
from fusedopt.core.together import step_together
from fusedopt.distributed import PeerError
from fusedopt.gradients.clip_grad import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from fusedopt.gradients.grad_scaler import GradScaler
from fusedopt.monitoring import Monitor, NotALogError, RunLog, read_log
from fusedopt.optimizers.adadelta import FusedAdadelta
from fusedopt.optimizers.adagrad import FusedAdagrad
from fusedopt.optimizers.adam import FusedAdam, FusedAdamW
from fusedopt.optimizers.adamax import FusedAdamax
from fusedopt.optimizers.ademamix import FusedAdEMAMix
from fusedopt.optimizers.asgd import FusedASGD
from fusedopt.optimizers.lion import FusedLion
from fusedopt.optimizers.nadam import FusedNAdam
from fusedopt.optimizers.radam import FusedRAdam
from fusedopt.optimizers.rmsprop import FusedRMSprop
from fusedopt.optimizers.rprop import FusedRprop
from fusedopt.optimizers.sgd import FusedSGD
from fusedopt.telemetry import ParamTelemetry, PendingTelemetry, Telemetry

__version__ = "0.1.0"

__all__ = [
    "FusedASGD",
    "FusedAdEMAMix",
    "FusedAdadelta",
    "FusedAdagrad",
    "FusedAdam",
    "FusedAdamW",
    "FusedAdamax",
    "FusedLion",
    "FusedNAdam",
    "FusedOptimizer",
    "FusedRAdam",
    "FusedRMSprop",
    "FusedRprop",
    "FusedSGD",
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
