"""The private helpers of Captum that come through `_captum` exist, do what is relied on, and come no other way."""

from __future__ import annotations

import ast

import pytest
import torch
from test_project import MODULES, PACKAGE, imported_names

from captum_staa import _captum


def test_every_name_is_there():
    assert sorted(_captum.__all__) == sorted(set(_captum.__all__))
    assert all(hasattr(_captum, name) for name in _captum.__all__)


def test_nothing_private_of_captums_comes_another_way():
    found = []
    for path in MODULES:
        for line, name in imported_names(path, PACKAGE.parent):
            private = name.startswith("captum.") and any(part.startswith("_") for part in name.split("."))
            if path.name != "_captum.py" and (private or name.startswith("captum.log")):
                found.append(f"{path.relative_to(PACKAGE)}:{line}: {name}")
    assert not found


def test_no_name_is_kept_that_nobody_uses():
    used = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "captum_staa._utils.captum":
                used |= {alias.name for alias in node.names}
    assert used == set(_captum.__all__)


def test_expansion_repeats_batch_after_batch():
    how = _captum.ExpansionTypes.repeat
    assert _captum._expand_target([3, 1], 2, expansion_type=how) == [3, 1, 3, 1]
    assert _captum._expand_target(torch.tensor([3, 1]), 2, expansion_type=how).tolist() == [3, 1, 3, 1]
    assert _captum._expand_target(2, 2, expansion_type=how) == 2
    assert _captum._expand_target((0, 1), 2, expansion_type=how) == (0, 1)
    rows, word = _captum._expand_additional_forward_args((torch.tensor([5, 6]), "word"), 2, expansion_type=how)
    assert rows.tolist() == [5, 6, 5, 6]
    assert word == "word"


def test_tuples_come_and_go():
    x = torch.zeros(1)
    assert _captum._format_tensor_into_tuples(x)[0] is x
    assert _captum._is_tuple((x,))
    assert not _captum._is_tuple(x)
    assert _captum._format_output(False, (x,)) is x
    assert _captum._format_output(True, (x,))[0] is x
    assert _captum._format_additional_forward_args(None) is None
    assert _captum._format_additional_forward_args(5) == (5,)


def test_targets_select_and_forwards_run():
    output = torch.arange(6.0).view(2, 3)
    assert _captum._select_targets(output, [2, 0]).tolist() == [2.0, 3.0]
    assert _captum._run_forward(lambda x, k: k * x, output, 1, (10,)).tolist() == [10.0, 40.0]
    with pytest.raises(AssertionError):
        _captum._select_targets(output, [0])


def test_log_usage_leaves_the_function_within_reach():
    @_captum.log_usage(part_of_slo=True)
    def attribute(inputs: int) -> int:
        return inputs + 1

    assert attribute(1) == attribute.__wrapped__(1) == 2
