"""The result of a comparison: its numbers, and their tables, figures and report."""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, overload

from matplotlib.figure import Figure

from captum_staa.benchmark import figures, report
from captum_staa.benchmark.records import Row
from captum_staa.benchmark.results import Results


class Comparison(Results):
    """Result of :func:`compare`: scores of methods and controls on all clips, with tables, figures and a report.

    Attributes:
        rows: tidy rows, each with one number or with one reason why a number is missing. :func:`compare` returns a
            sequence that makes them when they are read, because a list of millions of rows needs gigabytes.
        methods: names in the order of the arguments, the controls last. Methods that do not apply are included.
        metrics: names in the order of the arguments.
        better: by metric: 1 if higher is better, -1 if lower is better, 0 if the metric only describes.
        settings: all settings that determine the numbers.
        answers: by clip, the class that is explained, and the class that the model predicts.
        curves: by method, then ``"insertion"`` or ``"deletion"``: ``(101,)``, the mean over clips of the probability of
            the target, at every hundredth of the clip.
        sheet: data of the first clip, for the contact sheet.
        interrupted: whether the comparison was stopped with Ctrl-C.
    """

    def __repr__(self) -> str:
        return f"Comparison(methods={self.methods}, metrics={self.metrics}, clips={len(self.clips)})"

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

    @overload
    def to_csv(self, path: None = None, *, overwrite: bool = False) -> str: ...
    @overload
    def to_csv(self, path: str | Path, *, overwrite: bool = False) -> None: ...
    def to_csv(self, path: str | Path | None = None, *, overwrite: bool = False) -> str | None:
        """Return or write tidy rows as CSV: clip, method, metric, value. Rows without a number hold the reason instead.

        Args:
            path: a file to write the text to, row by row; None returns it.
            overwrite: whether an existing file may be replaced.

        Returns:
            The text; None if it is written to a file, because the text of many clips needs gigabytes.
        """
        return report.streamed(report.csv_of(self), path, overwrite)

    @overload
    def to_json(self, path: None = None, *, overwrite: bool = False) -> str: ...
    @overload
    def to_json(self, path: str | Path, *, overwrite: bool = False) -> None: ...
    def to_json(self, path: str | Path | None = None, *, overwrite: bool = False) -> str | None:
        """Return or write settings, rows, means and ranks as JSON; numbers that are not finite are null.

        Arguments and result as in :meth:`to_csv`.
        """
        return report.streamed(report.json_of(self), path, overwrite)

    def to_markdown(self, path: str | Path | None = None, *, overwrite: bool = False, intervals: bool = True) -> str:
        """Return a Markdown table of methods by metrics.

        The best method of each metric is bold. The last column holds reasons for missing numbers.

        A dagger marks a method that keeps more than 80 % of its advantage on random weights. A double dagger marks one
        that keeps more than 80 % of it for another class. See :meth:`retained`.

        Args:
            path: a file to write the text to as well; None writes no file.
            overwrite: whether an existing file may be replaced.
            intervals: whether to show 95 % intervals next to the means.
        """
        return report.written(report.markdown_of(self, intervals), path, overwrite)

    def to_latex(self, path: str | Path | None = None, *, overwrite: bool = False, intervals: bool = False) -> str:
        """Return the same table as a LaTeX ``tabular`` that needs no packages. Arguments as in :meth:`to_markdown`."""
        return report.written(report.latex_of(self, intervals), path, overwrite)

    def _repr_html_(self) -> str:
        return report.html_of(self)

    def plot(self) -> dict[str, Figure]:
        """Return all figures that the results have data for, by name; a notebook displays them.

        Returns:
            ``"curves"``: insertion and deletion. ``"cost"``: time against localization of the evidence. ``"ranks"``:
            mean ranks by metric. ``"sheet"``: the maps of all methods for the first clip.
        """
        return report.Pictures(self._figures)

    def to_report(self, path: str | Path | None = None, *, overwrite: bool = False) -> str:
        """Return one self-contained HTML page with tables, figures, reasons and settings.

        Arguments as in :meth:`to_markdown`.
        """
        return report.written(report.page(self, self._figures), path, overwrite)

    @cached_property
    def _figures(self) -> report.Pictures:
        return report.Pictures(figures.drawn(self))
