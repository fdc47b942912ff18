"""The answer of a video language model: its words beside their attributions, and a heat strip of words and frames."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from captum_staa._utils.checks import check_choice
from captum_staa.attr import AnswerMaps
from captum_staa.result import VideoAttribution
from captum_staa.visualization.figure import DEFAULT_STYLE, LABEL_SIZE, SIGNS, Sign, new_figure
from captum_staa.visualization.frames import Frames, Pixels
from captum_staa.visualization.saliency import Maps

NEEDED = 0.05  # nats: words that rely less on the video are pale, because their map does not count
PALE = 0.25  # opacity of their rows
ROW = 0.28  # height of a row in inches


def show_words(
    maps: AnswerMaps,
    frames: Frames | Pixels | None = None,
    *,
    sign: Sign = "all",
    title: str | None = None,
    fig_size: tuple[float, float] | None = None,
    plt_fig_axis: tuple[Figure, Axes] | None = None,
    use_pyplot: bool = True,
) -> tuple[Figure, Axes]:
    """Draw a heat strip: a row for each word of an answer, a column for each frame of the clip.

    Each row has its own scale, because the contributions to different words are not comparable. Rows of words that
    rely on the video by less than 0.05 nats are pale: their map does not count.

    Example:
        >>> import torch
        >>> joint = torch.rand(2, 4, 8, 8)
        >>> whole = VideoAttribution.from_joint(joint)
        >>> numbers = {"log_probabilities": torch.tensor([0.0, -0.1]), "reliance": torch.tensor([0.0, 3.0])}
        >>> maps = AnswerMaps(whole.joint, whole.spatial, whole.temporal, tokens=("a", "dog"), **numbers)
        >>> figure, axes = show_words(maps, use_pyplot=False)
        >>> [label.get_text() for label in axes.get_yticklabels()]
        ['a  +0.00', 'dog  +3.00']

    Args:
        maps: what :meth:`~captum_staa.AnswerAttribution.attribute_answer` returned.
        frames: the clip, as :class:`~captum_staa.visualization.Frames` or uint8 ``(T, H, W, 3)``, for the time axis;
            None draws positions in the clip.
        sign: attributions to sum over the pixels of a frame, as in :class:`~captum_staa.visualization.Style`.
        title: title of the figure.
        fig_size: width and height of the figure in inches; None fits the number of words.
        plt_fig_axis: figure and axes to draw on; None creates new ones.
        use_pyplot: whether to create the figure with pyplot. The figure is not shown.

    Returns:
        The figure and the axes.

    Raises:
        TypeError: ``maps`` are not :class:`~captum_staa.attr.AnswerMaps`.
        ValueError: an argument is invalid, or the clip and the maps differ in the number of frames.
    """
    check_choice("sign", sign, SIGNS)
    words = words_of(maps)
    clip = None if frames is None else Frames.of(frames)
    rows = np.stack([Maps.of(part, clip).per_frame(sign) for part in word_maps(maps).values()])  # (n, T)
    shares, colors = on_own_scale(rows), DEFAULT_STYLE.colors_of(sign)
    low = -1.0 if sign == "all" else 0.0
    picture = colors((shares - low) / (1 - low))
    picture[[not word["needed"] for word in words], :, 3] = PALE

    figure, axes = new_figure(plt_fig_axis, use_pyplot, fig_size or (9, 1.3 + ROW * len(words)))
    axes.imshow(picture, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(words)), [f"{word['text']}  {word['reliance']:+.2f}" for word in words])
    axes.set_ylabel("word, reliance in nats", fontsize=LABEL_SIZE)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    if clip is None:
        axes.set_xlabel("frame")
    else:
        names = clip.captions()
        ticks = [int(tick) for tick in axes.get_xticks() if 0 <= tick < len(names)]
        axes.set_xticks(ticks, [names[tick] for tick in ticks])
    axes.tick_params(labelsize=LABEL_SIZE, length=0)
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title)
    bar = figure.colorbar(ScalarMappable(Normalize(low, 1), colors), ax=axes, shrink=0.8, aspect=12, pad=0.01)
    bar.set_label("share of the row's largest", fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=LABEL_SIZE)
    bar.outline.set_visible(False)
    return figure, axes


def words_of(maps: AnswerMaps) -> list[dict[str, Any]]:
    """Return text, probability and reliance of each token, and whether the token needs the video."""
    if not isinstance(maps, AnswerMaps):
        raise TypeError(
            f"maps must be AnswerMaps, got {type(maps).__name__}. Pass what attribute_answer of AnswerAttribution "
            f"returned."
        )
    if maps.log_probabilities is None or maps.reliance is None or len(maps.tokens) != len(maps.joint):
        raise ValueError(
            f"maps must have tokens, log_probabilities and reliance for each of {len(maps.joint)} words, got "
            f"{len(maps.tokens)} tokens. Pass what attribute_answer of AnswerAttribution returned."
        )
    numbers = zip(maps.tokens, maps.log_probabilities.exp().tolist(), maps.reliance.tolist(), strict=True)
    return [
        {"text": text, "probability": probability, "reliance": reliance, "needed": abs(reliance) >= NEEDED}
        for text, probability, reliance in numbers
    ]


def word_maps(maps: AnswerMaps) -> dict[str, VideoAttribution]:
    """Return the maps of each token by its number and text; a text may occur more than once."""
    return {
        f"{i + 1}. {text}": VideoAttribution(maps.joint[i, None], maps.spatial[i, None], maps.temporal[i, None])
        for i, text in enumerate(maps.tokens)
    }


def on_own_scale(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return each row divided by its largest magnitude; rows of zeros stay zero."""
    largest = np.abs(rows).max(1, keepdims=True)
    return np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
