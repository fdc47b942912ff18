"""`captum_staa._utils.captum` is the only module that imports private helpers of Captum, and they work as expected."""

from __future__ import annotations

import ast

import pytest
import torch
from source_files import MODULES, PACKAGE, imported_names

from captum_staa._utils import captum as captum_helpers


def test_every_name_exists():
    assert sorted(captum_helpers.__all__) == sorted(set(captum_helpers.__all__))
    assert all(hasattr(captum_helpers, name) for name in captum_helpers.__all__)


def test_no_other_module_imports_private_names_of_captum():
    others = []
    for path in MODULES:
        for line, name in imported_names(path, PACKAGE.parent):
            private = name.startswith("captum.") and any(part.startswith("_") for part in name.split("."))
            if path != PACKAGE / "_utils" / "captum.py" and (private or name.startswith("captum.log")):
                others.append(f"{path.relative_to(PACKAGE)}:{line}: {name}")
    assert not others


def test_every_name_is_used():
    used = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "captum_staa._utils.captum":
                used |= {alias.name for alias in node.names}
    assert used == set(captum_helpers.__all__)


def test_expansion_repeats_whole_batches():
    how = captum_helpers.ExpansionTypes.repeat
    assert captum_helpers._expand_target([3, 1], 2, expansion_type=how) == [3, 1, 3, 1]
    assert captum_helpers._expand_target(torch.tensor([3, 1]), 2, expansion_type=how).tolist() == [3, 1, 3, 1]
    assert captum_helpers._expand_target(2, 2, expansion_type=how) == 2
    assert captum_helpers._expand_target((0, 1), 2, expansion_type=how) == (0, 1)
    rows, text = captum_helpers._expand_additional_forward_args((torch.tensor([5, 6]), "text"), 2, expansion_type=how)
    assert rows.tolist() == [5, 6, 5, 6]
    assert text == "text"


def test_tensors_are_wrapped_into_tuples_and_back():
    x = torch.zeros(1)
    assert captum_helpers._is_tuple((x,))
    assert not captum_helpers._is_tuple(x)
    assert captum_helpers._format_output(False, (x,)) is x
    assert captum_helpers._format_output(True, (x,))[0] is x
    assert captum_helpers._format_additional_forward_args(None) is None
    assert captum_helpers._format_additional_forward_args(5) == (5,)


def test_select_targets_and_run_forward():
    output = torch.arange(6.0).view(2, 3)
    assert captum_helpers._select_targets(output, [2, 0]).tolist() == [2.0, 3.0]
    assert captum_helpers._run_forward(lambda x, k: k * x, output, 1, (10,)).tolist() == [10.0, 40.0]
    with pytest.raises(AssertionError):
        captum_helpers._select_targets(output, [0])


def test_log_usage_keeps_the_wrapped_function():
    @captum_helpers.log_usage(part_of_slo=True)
    def attribute(inputs: int) -> int:
        return inputs + 1

    assert attribute(1) == attribute.__wrapped__(1) == 2
