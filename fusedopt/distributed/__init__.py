"""Steps over several ranks: who counts what, and the one message that a step exchanges."""

from fusedopt.distributed.exchange import Exchange, PeerError, announce, find_ranks
from fusedopt.distributed.local_view import (
    LocalView,
    check_placements,
    counted_chunks,
    is_dtensor,
    is_placed_as,
    local_of,
    not_sharded,
    placed_as,
    whole,
    without_partial,
)
from fusedopt.distributed.ranks import Ranks, has_dtensors, replica_of
from fusedopt.distributed.shards import first_element, is_cut_alike, like
from fusedopt.distributed.share import Share

__all__ = [
    "Exchange",
    "LocalView",
    "PeerError",
    "Ranks",
    "Share",
    "announce",
    "check_placements",
    "counted_chunks",
    "find_ranks",
    "first_element",
    "has_dtensors",
    "is_cut_alike",
    "is_dtensor",
    "is_placed_as",
    "like",
    "local_of",
    "not_sharded",
    "placed_as",
    "replica_of",
    "whole",
    "without_partial",
]
