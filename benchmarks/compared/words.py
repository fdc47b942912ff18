"""The words of the published comparison."""

HEAD = """# The comparison

Which method finds known evidence, on which kind of model, and at what cost? {models} small models, at least {clips}
planted clips of each, and {pairs} clips of two classes for *class A against B*. [What the columns
mean](results_truth.md#how-to-read-the-tables); [methods and controls](comparison_guide.md). Made by

```console
python benchmarks/comparison_table.py --discovered FOLDER
```

Each model counts the same, whatever the number of its clips. **Intervals** are of 95 %, from a hierarchical bootstrap:
models are drawn first, with replacement, and then clips of each drawn model. So they say how much the numbers would
change with other models of this kind, not only with other clips. A cell is **bold** only if its interval is beyond
those of all other methods and of all controls. *Not clearly behind* are methods and controls whose difference from the
first, over the same draws, has an interval that holds 0. *Class A against B* asks whether the map of class A prefers
the evidence of A to that of B in the same clip; it is not measured on `order`, which has no such clips. Insertion and
deletion have 10 steps and the mean frame as baseline, which [agrees best with known
evidence](metrics.md#which-metric-can-be-trusted). `forwards` is the median time in plain forward passes, on one thread
of a busy CPU.
"""

SUMMARY = """
To be written.
"""

LEFT_OUT = """
Not measured here: faithfulness, aopc, saco and monotonicity. They cost as many forwards as insertion and deletion for
each map, and [follow the truth less](metrics.md#which-metric-can-be-trusted). `iou`, `energy_pointing_game` and others
that need a threshold or a share are left out for the same reason. Of the methods of `benchmark.METHODS`, variants of
the same idea are left out, and the presets of the papers, whose masks take thousands of forwards
([learned masks](results_methods.md#learned-masks)).
"""
