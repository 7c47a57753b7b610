"""Telemetry: measurements of the last steps, kept in rings on the devices, read by name."""

from fusedopt.telemetry.rings import PARAM_COLUMNS, STEP_COLUMNS, Rings
from fusedopt.telemetry.rows import ParamTelemetry, PendingTelemetry, Telemetry

__all__ = [
    "PARAM_COLUMNS",
    "STEP_COLUMNS",
    "ParamTelemetry",
    "PendingTelemetry",
    "Rings",
    "Telemetry",
]
