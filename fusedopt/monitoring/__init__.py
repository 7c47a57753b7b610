"""Watching a run: telemetry written to a log, read back, drawn, and shown while it lasts."""

from fusedopt.monitoring.log_reader import NotALogError, RunLog, read_log
from fusedopt.monitoring.monitor import Monitor

__all__ = ["Monitor", "NotALogError", "RunLog", "read_log"]
