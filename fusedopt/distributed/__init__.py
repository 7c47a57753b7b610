"""Steps over several ranks: who counts what, and the one message that a step exchanges."""

from fusedopt.distributed.exchange import Exchange, PeerError
from fusedopt.distributed.local_view import LocalView, is_dtensor, local_of
from fusedopt.distributed.ranks import Ranks

__all__ = ["Exchange", "LocalView", "PeerError", "Ranks", "is_dtensor", "local_of"]
