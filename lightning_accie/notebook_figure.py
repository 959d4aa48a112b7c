"""A figure that a notebook shows as a picture. Needs matplotlib."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that shows without ``%matplotlib inline``.

    Of itself a notebook knows how to show figures only once pyplot has made one.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
