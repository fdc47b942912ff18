"""What the tests of the comparison share."""

from __future__ import annotations

from captum_staa.benchmark import PlantedClips, compare

PLANTED = PlantedClips(seed=12, n=20)


FAST = [  # all but those that take many forwards
    "STAA",
    "STAA(attention)",
    "STAA(attention-last)",
    "STAA(released)",
    "VideoFeatureAblation(frames)",
    "GradCAM",
    "GradCAM(hirescam-first)",
    "GradCAM(layercam-first)",
    "Saliency",
    "InputXGradient",
    "GuidedBackprop",
    "DeepLift",
    "LayerGradCam",
    "FeatureAblation(frames)",
]


def table(found) -> dict[tuple[str, str, str], float]:
    return {row[:3]: row.value for row in found.rows if not row.reason}


def silent(*args, **options):
    return compare(*args, show_progress=False, **options)
