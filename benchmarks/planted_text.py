"""The text of docs/planted.md; benchmarks/planted_table.py adds the tables."""

# Formatted with the number of clips of each model, ``clips``, and that of slow methods, ``slow``.
INTRO = """# Planted evidence

Which method finds the evidence that a model has used? On real clips this is unknown. In planted
clips (`benchmark.PlantedClips`) we put the evidence in, so we know where and when it can be seen.

A clip has 16 frames of 48 x 48 pixels and four moving objects: patches of 12 x 12 pixels with the same contrast, the
same lifetime, and colors from the same distribution. One object shows the **evidence**, and only for some frames. At
other times, it shows something that looks like evidence and does not decide the class. The other objects show only
such things; they are **rivals**.

| task | evidence | rivals |
|---|---|---|
| `pattern`: bright-right, bright-bottom or bright-diagonal | a patch with a bright right half, a bright bottom half, or two bright quarters on the main diagonal | mirror images: bright on the left, at the top, on the other diagonal |
| `motion`: left or right | a plain patch that moves to the left or right | plain patches that move up or down at the same speeds |
| `order`: right-first or bottom-first | two objects: one is bright on the right for some frames, the other one at the bottom; the class is which comes first | patches that are bright on the left or at the top |

Evidence and rivals have the same contrast, color, speed and lifetime. So no detector of contrast, edges or motion can
tell them apart. One must know what decides the class, as the model does.

## Controls first

A method can score well for the wrong reason. Read these rows and columns before you compare methods:

- **best map without a model**: for each column, the best of the maps in `metrics.model_free_controls`. They detect
  contrast, edges, motion or the center of the clip, and never see the model. In the column *evidence against rivals*
  they should be at chance. If they are not, the column says nothing about any method.
- **random weights**: the score of the same method after all parameters of the model were drawn anew. A map that
  explains the model must become much worse. † marks methods that keep at least 80 % of their advantage over chance.
- **other class**: the score of the same method when it explains the class with the highest logit besides the right
  one. A map of the other class should not show this class's evidence as its own. ‡ marks methods that keep at least
  80 % of their advantage.
- **random** and **uniform**: maps without any information. They show chance in each column.
- **perfect tokens**: the planted truth itself, averaged over each token. No map that is made of tokens can be
  expected to be better. Only transformers have this row.
- **known objects removed**: how far the output falls when the background replaces one object, by a program that knows
  where the objects are. It shows how much evidence the model itself needs. In *all frames* in which an object shows
  the same thing, the answer is nearly always right. In *two frames* at a time it is not: the model has seen enough in
  the other frames of the window, so that no single frame is needed. A method that measures small parts of a clip, as
  most do, meets the same limit.

Methods with an advantage of less than .1 have no marks: their score alone says that they find little.

## How to read the tables

Each table is sorted by the first column. Clips were not used in training, and the right class is explained. Values
are means over {clips} clips of each model, or over {slow} clips for `VideoOcclusion` and `RISE`, which are slow.
Small differences say nothing. `SpatioTemporalPerturbation` has a [separate table](perturbation_table.md). Made by
`python benchmarks/planted_table.py`.

| column | question | chance |
|---|---|---|
| evidence against rivals | Does evidence score higher than rivals? AUROC of their voxels; the background is ignored (`metrics.evidence_against_rivals`) | .5 |
| in time | The same for frames: do the objects score higher in frames with evidence than in frames with rivals only? | .5 |
| against all voxels | Does evidence score higher than all other voxels? Most of these are background, so a detector of contrast does well here (`metrics.auroc`) | .5 |
| evidence first | In which part of the clips does the evidence have the highest mean of all objects? (`metrics.object_pointing`) | see *random* |
| class A against B | In clips with evidence of two classes: does the map for each class prefer the evidence of that class? (`metrics.class_discrimination`; not for `order`, whose classes share their evidence) | .5 |
| random weights, other class | *evidence against rivals* of the two controls of the method | .5 |
| forwards | processor time of one map, as a multiple of one forward pass | |

Maps are signed, because high values should mean evidence *for* the class. Where the table says *magnitude*, the
absolute value was taken. *Smoothed* means a Gaussian with a standard deviation of 1.5 frames and 6 pixels.

What these tables do not say: the models are small and the clips are simple. A method that fails here will hardly
explain a large model. A method that succeeds here has passed an easy test.
"""  # noqa: E501

HISTORY = """## What was wrong with the first benchmark

The first planted clips had one patch, or two events, that carried the evidence, and one plain object beside it. The
tables on them ranked methods by the AUROC of evidence against all other voxels. Two controls, added later, showed
that these tables did not measure explanations.

- **A map without any model solved the benchmark.** The evidence had the highest contrast of all, or was the only
  thing that changed. The absolute value of the clip, smoothed, reached AUROCs of .999 (joint), 1.00 (time) and .946
  (space) on `pattern`, .953, 1.00 and .810 on `motion`, and .998, .997 and .909 on `order`. The difference from the
  mean frame, smoothed, reached .998, 1.00 and .996 on `motion`, and nearly the same on the other tasks. No method in
  the old tables was as good as this second map.
- **A method did as well on random weights.** STAA's old default rule, `"product"`, multiplied the clip by its
  gradient and by attention. On a model with random weights it still reached a joint AUROC of .982. Most of its score
  came from the clip.
- **The old default was blind to the class.** In clips with evidence of two classes, its class discrimination was
  .502, where .5 means that the map does not depend on the class. The library called this map class-specific, which
  was wrong.

What changed:

- The clips were built again, with rivals. `tests/benchmark/test_planted.py` checks that maps without a model do not
  tell evidence from rivals. All shipped models were trained again on the new clips.
- New metrics compare evidence with rivals and one class with another: `evidence_against_rivals`, `object_pointing`
  and `class_discrimination`. `metrics.model_free_controls` has the maps without a model, and `benchmark.compare` runs
  methods on random weights and for another class.
- STAA's relevance has a new rule, [`"decomposition"`](staa.md#why-this-class-moderelevance-the-default): what each
  token adds to the class. The rules `"product"` and `"gradient"` were removed.
- All numbers that were measured on the first clips were removed from these pages, together with the choices that
  rested on them. Numbers come back when they have been measured again.

If you use planted clips to judge a method of your own, run these two controls before anything else.
"""
