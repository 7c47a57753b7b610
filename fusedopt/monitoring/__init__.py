"""Monitoring a run: writes telemetry to a log, reads it back, draws it, and shows it live."""

from fusedopt.monitoring.log_reader import NotALogError, RunLog, read_log
from fusedopt.monitoring.monitor import Monitor

__all__ = ["Monitor", "NotALogError", "RunLog", "read_log"]
