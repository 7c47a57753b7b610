"""All public names of `fusedopt`. They need torch: `fusedopt` loads them when one is used."""

# ruff: noqa: F401, F403

from fusedopt import clip, convert, reference
from fusedopt.core.masters import master_weights
from fusedopt.core.nonfinite import NonFiniteGradientError
from fusedopt.core.optimizer import FusedOptimizer
from fusedopt.core.replicas import ReplicasDifferError
from fusedopt.core.shard_states import consolidated_state_dict, shard_states
from fusedopt.core.skip_limit import TooManySkipsError
from fusedopt.core.together import step_together
from fusedopt.distributed import PeerError
from fusedopt.gradients.clip_grad import clip_grad_norm_, clip_grads_with_norm_, get_total_norm
from fusedopt.gradients.grad_scaler import GradScaler
from fusedopt.monitoring import Monitor, NotALogError, RunLog, read_log
from fusedopt.optimizers import *
from fusedopt.telemetry import ParamTelemetry, PendingTelemetry, Telemetry
