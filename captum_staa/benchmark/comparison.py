"""The result of a comparison for users: numbers, tables, figures and a report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_staa.benchmark import figures, report, tables
from captum_staa.benchmark.records import Row
from captum_staa.benchmark.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Comparison(Results):
    """Result of :func:`compare`: scores of methods and controls, with tables, figures and a report.

    It also has all attributes and methods of :class:`Results`, such as ``rows``, ``means()``, ``ranks()``, ``trust()``,
    ``reasons()`` and ``retained()``.
    """

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with the columns clip, method, metric, value and reason.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas: Any = import_module("pandas")
        except ImportError as error:
            raise ImportError("pandas must be installed for a data frame. Run: pip install pandas") from error
        return pandas.DataFrame(self.rows, columns=list(Row._fields))

    def to_csv(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """Return tidy rows as CSV: clip, method, metric, value. Rows without a number hold the reason instead.

        Args:
            path: a file to write the text to as well; None writes no file.
            overwrite: whether an existing file may be replaced.
        """
        return tables.written(tables.csv_of(self), path, overwrite)

    def to_json(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """Return settings, rows, means and ranks as JSON; numbers that are not finite are null.

        Arguments as in :meth:`to_csv`.
        """
        return tables.written(tables.json_of(self), path, overwrite)

    def to_markdown(self, path: str | Path | None = None, *, overwrite: bool = False, intervals: bool = True) -> str:
        """Return a Markdown table of methods by metrics.

        The best method of each metric is bold. The last column holds reasons for missing numbers.

        A dagger marks a method that keeps more than 80 % of its advantage on random weights. A double dagger marks one
        that keeps more than 80 % of it for another class. See :meth:`retained`.

        Args:
            path: as in :meth:`to_csv`.
            overwrite: as in :meth:`to_csv`.
            intervals: whether to show 95 % intervals next to the means.
        """
        return tables.written(tables.markdown_of(self, intervals), path, overwrite)

    def to_latex(self, path: str | Path | None = None, *, overwrite: bool = False, intervals: bool = False) -> str:
        """Return the same table as a LaTeX ``tabular`` that needs no packages. Arguments as in :meth:`to_markdown`."""
        return tables.written(tables.latex_of(self, intervals), path, overwrite)

    def _repr_html_(self) -> str:
        return tables.html_of(self)

    def plot(self) -> dict[str, Figure]:
        """Return all figures that the results have data for, by name; a notebook displays them.

        Returns:
            ``"curves"``: insertion and deletion. ``"cost"``: time against localization of the evidence. ``"ranks"``:
            mean ranks by metric. ``"sheet"``: the maps of all methods for the first clip.
        """
        return report.Pictures(self._figures)

    def to_report(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """Return one self-contained HTML page with tables, figures, reasons and settings.

        Arguments as in :meth:`to_csv`.
        """
        return tables.written(report.page(self, self._figures), path, overwrite)

    @cached_property
    def _figures(self) -> report.Pictures:
        return report.Pictures(figures.drawn(self))
