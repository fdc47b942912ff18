"""The text of docs/planted.md; benchmarks/planted_table.py adds the tables."""

# Formatted with the number of clips of each model, ``clips``, and that of slow methods, ``slow``.
INTRO = """# Planted evidence

Which method finds the evidence that a model has used? On real clips this is unknown. In planted clips
(`benchmark.PlantedClips`) the evidence is put in, so its place and time are known.

A clip has 16 frames of 48 x 48 pixels and four moving patches of 12 x 12 pixels, with the same contrast, lifetime
and distribution of colors. One shows the **evidence**, and only for some frames. At other times, it shows something
similar that does not decide the class. The other patches show only such things; they are **rivals**.

| task | evidence | rivals |
|---|---|---|
| `pattern`: bright-right, bright-bottom or bright-diagonal | a patch with a bright right half, a bright bottom half, or two bright quarters on the main diagonal | mirror images: bright on the left, at the top, on the other diagonal |
| `motion`: left or right | a plain patch that moves to the left or right | plain patches that move up or down at the same speeds |
| `order`: right-first or bottom-first | two objects: one is bright on the right for some frames, the other one at the bottom; the class is which comes first | patches that are bright on the left or at the top |

So no detector of contrast, edges or motion can tell evidence from rivals. One must know what decides the class.

## Controls first

A method can score well for the wrong reason. Read these rows and columns before you compare methods:

- **best map without a model**: for each column, the best of `metrics.model_free_controls`, which detect contrast,
  edges, motion or the center. Where they are not at chance, a column says nothing about methods.
- **random weights**: the same method with random parameters. † marks methods that keep at least 80 %
  of their advantage over chance.
- **other class**: the same method for the class with the highest logit besides the right one. ‡ marks methods that
  keep at least 80 %. Methods with an advantage of less than .1 have no marks.
- **random** and **uniform** show chance in each column.
- **perfect tokens**: the truth averaged over each token, the best that a map of tokens can be expected to be.
- **known objects removed**: the fall of the output when the background replaces one object, by a program that knows
  where the objects are: how much evidence the model itself needs. In *all frames* in which an object shows the
  same, the answer is nearly always right; in *two frames* at a time it is not, because the other frames are enough.
  Methods that hide small parts meet the same limit.

## How to read the tables

The right class is explained, in clips that were not used in training. Values are means over {clips} clips of each
model, or over {slow} for `VideoOcclusion` and `RISE`, which are slow; small differences say nothing. Maps are
signed, unless the table says *magnitude*. *Smoothed* means a Gaussian with a standard deviation of 1.5 frames and 6
pixels. `SpatioTemporalPerturbation` has a [separate table](perturbation_table.md). Made by `python
benchmarks/planted_table.py`; `docs/planted/` has all numbers of each model.

| column | question | chance |
|---|---|---|
| evidence against rivals | Does evidence score higher than rivals? AUROC of their voxels, without the background (`metrics.evidence_against_rivals`) | .5 |
| in time | Do objects score higher in frames with evidence than in frames with rivals only? | .5 |
| against all voxels | Does evidence score higher than all other voxels? Most are background, so a detector of contrast does well (`metrics.auroc`) | .5 |
| evidence first | In which part of the clips has the evidence the highest mean of all objects? (`metrics.object_pointing`) | see *random* |
| class A against B | In clips with evidence of two classes: does the map of each prefer its own? (`metrics.class_discrimination`; not for `order`, whose classes share their evidence) | .5 |
| random weights, other class | *evidence against rivals* of the two controls of the method | .5 |
| forwards | processor time of one map, as a multiple of one forward pass | |

The models are small and the clips are simple. A method that fails here will hardly explain a large model. A method
that succeeds here has passed an easy test.
"""  # noqa: E501

HISTORY = """## What was wrong with the first benchmark

In the first planted clips, the evidence had the highest contrast or was all that changed, and methods were ranked
by the AUROC of evidence against all other voxels. Two controls showed that this does not measure explanations. A
map without any model, the difference from the mean frame, reached .996 to 1.00 on `motion`, more than any method.
And STAA's rule of that time, which multiplied clip, gradient and attention, reached .982 on random weights, with a
class discrimination of .502, which is chance. So the clips now have rivals, the metrics compare evidence with
rivals and one class with another, that rule is gone, and all numbers of the first clips were removed. If you judge
a method of your own on planted clips, run these two controls before anything else.
"""
