"""The words of the published comparison."""

HEAD = """# The comparison

Which method finds known evidence, on which kind of model, and at what cost? {models} small models, at least {clips}
planted clips of each, and {pairs} clips of two classes for *class A against B*. [What the columns
mean](results_truth.md#how-to-read-the-tables); [methods and controls](comparison_guide.md). Made by

```console
python benchmarks/comparison_table.py
```

Each model counts the same, regardless of how many clips it has. **Intervals** are of 95 %, from a hierarchical
bootstrap: models are drawn first, with replacement, and then clips of each drawn model. So they say how much the
numbers would change with other models of this kind, not only with other clips. A cell is **bold** only if its
interval is beyond those of all other methods and of all controls. *Not clearly behind* are methods and controls whose
difference from the first, over the same draws, has an interval that holds 0. *Class A against B* asks whether the map
of class A prefers the evidence of A to that of B in the same clip; it is not measured on `order`, which has no such
clips. Insertion and deletion have 10 steps and the mean frame as baseline, which [agrees best with known
evidence](metrics.md#which-metric-can-be-trusted). `forwards` is the median time in plain forward passes, on one
thread of a busy CPU. """

SUMMARY = """
Numbers in this section are evidence against rivals, where .5 is chance, and the cost in forwards.

- **A video transformer: `STAA(clf)`**, {t[STAA (relevance)]:.2f} for {tf[STAA (relevance)]:.0f} forwards. Learned masks
  ({t[STEP (nested)]:.2f}, {tf[STEP (nested)]:.0f} forwards) and RISE ({t[RISE]:.2f}, {tf[RISE]:.0f}) are not clearly
  better and cost some 50 times as much; `VideoOcclusion` ({t[VideoOcclusion]:.2f}, {tf[VideoOcclusion]:.0f}) and
  Integrated Gradients ({t[IntegratedGradients]:.2f}, {tf[IntegratedGradients]:.0f}) are lower. The attention of the
  paper, `STAA(clf, mode="attention")` ({t[STAA]:.2f}), is not a map of a class: *class A against B* is at chance.
- **A 3D CNN: gradients cost least, hiding is right more often.** `GradCAM` at an early layer ({c[GradCAM]:.2f}) is as
  good as InputXGradient ({c[InputXGradient]:.2f}) and Integrated Gradients ({c[IntegratedGradients]:.2f}).
  `VideoOcclusion` ({c[VideoOcclusion]:.2f}), learned masks ({c[STEP (nested)]:.2f}) and RISE ({c[RISE]:.2f}) are above
  them, also at telling two classes apart. The last layer, as in the Grad-CAM paper, is not reliable on clips as small
  as these ({c[GradCAM (last)]:.2f}).
- **A video language model: `AnswerAttribution(vlm)`**, {l[AnswerAttribution]:.2f} for {lf[AnswerAttribution]:.0f}
  forwards. Learned masks ({l[STEP (nested)]:.2f}, {lf[STEP (nested)]:.0f}) are not clearly different. This is one
  model.
- **A network that explains itself: ST-ABN with a bottleneck.** Its gates have {b[AttentionBranch (gate)]:.2f} at
  the price of one forward, as much as RISE ({b[RISE]:.2f}, {bf[RISE]:.0f}), but they are of no class. This is one
  model.
- **Any model, and forwards do not matter: `SpatioTemporalPerturbation(f)`** ({a[STEP (nested)]:.2f}) **or RISE**
  ({a[RISE]:.2f}). They need no layer, are among the first by nearly every column, and masks have the best deletion.
  `VideoOcclusion` ({a[VideoOcclusion]:.2f}) is the simplest check.
- **Not alone:** `Saliency`, whose values have no sign, is good at *when* and at CNNs, but does not tell two classes
  apart. `InputXGradient` ({t[InputXGradient]:.2f} on transformers) does better at *class A against B*.
- **Controls:** the difference from the mean frame, which knows no model, reaches {a[model-free]:.2f} here, but far more
  *against all voxels* and in insertion. On data without rivals it can look as good as a method, so compare with it.

The order of the methods is less certain than their means look. With other models of the same kind, a method that is not
clearly behind could be first.
"""

LEFT_OUT = """
`GradCAM` of `swin-pattern` reads the norm after its patch embedding, because a norm is all that reads the embedding.
GradCAM finds no layer with a map in the video language model.

Not measured here: faithfulness, aopc, saco and monotonicity. They cost as many forwards as insertion and deletion for
each map, and [follow the truth less](metrics.md#which-metric-can-be-trusted). `iou`, `energy_pointing_game` and others
that need a threshold or a share are left out for the same reason. Of the methods of `benchmark.METHODS`, variants of
the same idea are left out, and the presets of the papers, whose masks take thousands of forwards
([learned masks](results_methods.md#learned-masks)).
"""
