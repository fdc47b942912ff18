"""A comparison as its user has it: numbers, tables, pictures and a report."""

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
    """Methods beside each other, with controls that lack the model, the class, or both; :func:`compare` makes it.

    It has all of :class:`Results`, too: ``rows``, ``means()``, ``ranks()``, ``trust()``, ``reasons()``,
    ``retained()``.
    """

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with the columns clip, method, metric, value and reason.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            pandas: Any = import_module("pandas")
        except ImportError as error:
            raise ImportError("a data frame needs pandas, which is not installed: pip install pandas") from error
        return pandas.DataFrame(self.rows, columns=list(Row._fields))

    def to_csv(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """Tidy rows with the columns clip, method, metric, value; in rows without a number, the reason is the value.

        Args:
            path: where to write it as well; None writes nothing.
            overwrite: whether an existing file may be replaced.
        """
        return tables.written(tables.csv_of(self), path, overwrite)

    def to_json(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """Settings, rows, means and ranks; what is not finite is null. Arguments as for :meth:`to_csv`."""
        return tables.written(tables.json_of(self), path, overwrite)

    def to_markdown(self, path: str | Path | None = None, *, overwrite: bool = False, intervals: bool = True) -> str:
        """Methods by metrics, the best of each metric in bold, reasons in the last column.

        A dagger marks a method that keeps more than 80 % of its advantage on random weights, a double dagger one that
        keeps it for another class; see :meth:`retained`.

        Args:
            path, overwrite: as for :meth:`to_csv`.
            intervals: whether to give the 95 % intervals beside the means.
        """
        return tables.written(tables.markdown_of(self, intervals), path, overwrite)

    def to_latex(self, path: str | Path | None = None, *, overwrite: bool = False, intervals: bool = False) -> str:
        """The same as a LaTeX ``tabular``, without any package."""
        return tables.written(tables.latex_of(self, intervals), path, overwrite)

    def _repr_html_(self) -> str:
        return tables.html_of(self)

    def plot(self) -> dict[str, Figure]:
        """All pictures that there is something to draw of, by name; a notebook shows them.

        Returns:
            ``"curves"``, insertion and deletion; ``"cost"``, what time buys of the truth; ``"ranks"``, mean ranks by
            metric; ``"sheet"``, the methods' maps of the first clip.
        """
        return report.Pictures(self._figures)

    def to_report(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """One HTML page with tables, pictures, reasons and settings in it; it loads nothing from anywhere."""
        return tables.written(report.page(self, self._figures), path, overwrite)

    @cached_property
    def _figures(self) -> report.Pictures:
        return report.Pictures(figures.drawn(self))
