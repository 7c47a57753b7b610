"""A figure that a notebook shows. It needs matplotlib, which `fusedopt` itself does not import."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """IPython asks any object for its `_repr_png_`; a `Figure` made without pyplot has none."""

    def _repr_png_(self) -> bytes:
        png = io.BytesIO()
        self.savefig(png, format="png")
        return png.getvalue()
