"""Tests of the table of subjects: every Attribution class has an entry, and exemptions name existing tests."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import pytest
from captum.attr import Attribution, LLMAttribution
from covering import all_pairs, each_value, in_one_case

import captum_staa
import captum_staa.attr

from .models import MODELS
from .subjects import CAPTUMS, OURS, SUBJECTS


def exported() -> set[type[Attribution]]:
    """Return every Attribution class among the public names, except those that do not explain tensors."""
    names = [value for package in (captum_staa, captum_staa.attr) for value in vars(package).values()]
    classes = {value for value in names if isinstance(value, type) and issubclass(value, Attribution)}
    return {value for value in classes if not issubclass(value, LLMAttribution)}


def without_an_entry(classes: set[type[Attribution]]) -> list[str]:
    return sorted(cls.__name__ for cls in classes - {subject.method for subject in OURS})


def test_every_class_has_an_entry() -> None:
    assert not without_an_entry(exported()), "add it to SUBJECTS in subjects.py"
    assert captum_staa.STAA in exported()


def test_missing_entry_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    class Forgotten(Attribution):
        pass

    monkeypatch.setattr(captum_staa, "Forgotten", Forgotten, raising=False)
    assert without_an_entry(exported()) == ["Forgotten"]


def test_subjects_have_distinct_names() -> None:
    assert all(subject.ours for subject in OURS) and not any(subject.ours for subject in CAPTUMS)
    names = [subject.name for subject in SUBJECTS]
    assert len(set(names)) == len(names)
    assert all(subject.models and set(subject.models) <= set(MODELS) for subject in SUBJECTS)


def test_exemptions_name_existing_tests() -> None:
    """A misspelled or outdated name would exempt nothing."""
    tests = {
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and any("over(" in ast.unparse(mark) for mark in node.decorator_list)
    }
    assert len(tests) > 40
    for subject in SUBJECTS:
        assert set(subject.exempt) | set(subject.fails) <= tests, subject.name
        assert not set(subject.exempt) & set(subject.fails), subject.name
        assert all(len(reason) > 5 for reason in (*subject.exempt.values(), *subject.fails.values())), subject.name


def test_covering_sets_are_complete_and_small() -> None:
    columns = ["abcd", "xyz", (1, 2), "pqr"]
    rows, values = all_pairs(columns), each_value(columns)
    for a, b in itertools.combinations(range(4), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(columns[a], columns[b]))
    assert len(rows) < 20 and len(values) == 4
    assert all({row[i] for row in values} == set(column) for i, column in enumerate(columns))


def test_a_failure_in_one_case_names_its_row() -> None:
    @in_one_case()
    @pytest.mark.parametrize(("limit", "name"), [(3, "a"), (5, "b")])
    @pytest.mark.parametrize("number", [2, 4])
    def small(number: int, limit: int, name: str) -> None:
        assert number < limit

    with pytest.raises(AssertionError, match="'number': 4, 'limit': 3, 'name': 'a'"):
        small()
