"""`python -m fusedopt`: a self-check. `... plot LOG` and `... watch LOG` show a Monitor's log."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["plot"]:
        from fusedopt.monitoring import plot

        return plot.main(arguments[1:])
    if arguments[:1] == ["watch"]:
        from fusedopt.monitoring import watch

        return watch.main(arguments[1:])
    from fusedopt import selfcheck

    return selfcheck.main(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
