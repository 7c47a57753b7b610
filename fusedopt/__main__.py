"""`python -m fusedopt`: shows what this build has, and compares it with the reference.

`python -m fusedopt plot LOG` and `... watch LOG` show the log of a Monitor.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from fusedopt import front_ends


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if find_spec("torch") is None:
        return front_ends.report_without_torch()
    from fusedopt.monitoring import plot, watch
    from fusedopt.self_check import self_check

    commands = {"plot": plot.main, "watch": watch.main}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    return self_check(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
