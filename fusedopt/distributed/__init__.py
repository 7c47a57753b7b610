"""Steps over several ranks: who counts what, and the one message that a step exchanges."""

from fusedopt.distributed.exchange import Exchange, PeerError
from fusedopt.distributed.local_view import (
    LocalView,
    check_placements,
    check_sharded_grad,
    counted_chunks,
    is_dtensor,
    local_of,
    placed_as,
    whole,
    without_partial,
)
from fusedopt.distributed.ranks import Ranks

__all__ = [
    "Exchange",
    "LocalView",
    "PeerError",
    "Ranks",
    "check_placements",
    "check_sharded_grad",
    "counted_chunks",
    "is_dtensor",
    "local_of",
    "placed_as",
    "whole",
    "without_partial",
]
