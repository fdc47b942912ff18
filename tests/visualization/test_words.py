"""The words of an answer: the heat strip as a figure, and words, strip and maps in the player in a real browser."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from headless import Browser, driven

from captum_staa import VideoAttribution
from captum_staa.attr import AnswerMaps
from captum_staa.visualization import Frames, Style, overlay, show_words, to_html
from captum_staa.visualization.figure import DIVERGING

T, H, W = 6, 24, 32
TOLERANCE = 7  # as in test_html.py
UP, DOWN = "\ue013", "\ue015"
TOKENS = ("the", "dog", "<b>", "the")
RELIANCE = (0.01, 4.25, -0.5, 0.0)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (T, H, W, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def maps() -> AnswerMaps:
    """Four words; "dog" is strongest in frame 4."""
    joint = torch.randn(4, T, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    joint[1, 4] += 2
    whole = VideoAttribution.from_joint(joint)
    logs, reliance = torch.tensor([0.9, 0.8, 0.7, 0.6]).log(), torch.tensor(RELIANCE)
    return AnswerMaps(
        whole.joint, whole.spatial, whole.temporal, tokens=TOKENS, log_probabilities=logs, reliance=reliance
    )


def test_the_strip_has_a_row_per_word_on_its_own_scale_and_pale_rows_do_not_count(clip, maps):
    _, axes = show_words(maps, Frames(clip, fps=2), use_pyplot=False)
    rows = maps.joint.sum((2, 3)).numpy()
    expected = DIVERGING((rows / np.abs(rows).max(1, keepdims=True) + 1) / 2)
    expected[[0, 3], :, 3] = 0.25
    picture = axes.images[0].get_array()
    np.testing.assert_allclose(picture, expected)
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "the  +0.01",
        "dog  +4.25",
        "<b>  -0.50",
        "the  +0.00",
    ]
    assert axes.get_xticklabels()[0].get_text() == "0.00 s"
    positive = show_words(maps, sign="positive", use_pyplot=False)[1].images[0].get_array()
    sums = maps.joint.clamp(min=0).sum((2, 3)).numpy()
    np.testing.assert_allclose(positive[1], Style(sign="positive").colors(sums[1] / sums[1].max()))


def test_maps_of_something_else_and_other_clips_are_refused(clip, maps):
    with pytest.raises(TypeError, match="maps must be AnswerMaps, got VideoAttribution"):
        show_words(VideoAttribution.from_joint(maps.joint))
    with pytest.raises(ValueError, match="for each of 4 words, got 3 tokens"):
        to_html(replace(maps, tokens=TOKENS[:3]), clip)
    with pytest.raises(ValueError, match="as many frames as the clip"):
        show_words(maps, clip[:4])


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with driven(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.fixture(scope="module")
def page(tmp_path_factory, clip, maps) -> Path:
    path = tmp_path_factory.mktemp("page") / "answer.html"
    to_html(maps, clip, path, style=Style(sign="positive"), title="What is it?")
    return path


def chosen(browser: Browser) -> list[int]:
    script = "return [...document.querySelectorAll('.word')].map(word => word.getAttribute('aria-pressed'))"
    return [i for i, pressed in enumerate(browser.js(script)) if pressed == "true"]


def test_choosing_a_word_shows_its_map_timeline_and_reliance(browser, page, clip, maps):
    browser.open(page)
    assert browser.js("return [...document.querySelectorAll('.word')].map(word => word.textContent)") == list(TOKENS)
    assert chosen(browser) == [1] and browser.text("#now") == "frame 4"  # the word that relies most on the video
    script = "return document.getElementById('curve').getAttribute('d').match(/-?[\\d.]+/g).map(Number)"
    for word, reliance, probability in ((1, "+4.25", "0.800"), (2, "\u22120.50", "0.700"), (0, "+0.01", "0.900")):
        browser.click(f".word:nth-child({word + 1})")
        browser.wait(f"document.getElementById('note').textContent.includes('{reliance}')")
        note = browser.text("#note")
        assert f"\u201c{TOKENS[word]}\u201d: probability {probability}" in note
        assert ("does not need the video" in note) == (word == 0)
        expected = overlay(maps.joint[word], clip, style=Style(sign="positive")).picture(4).astype(int)
        assert np.abs(browser.pixels() - expected).max() <= TOLERANCE
        sums = maps.joint[word].clamp(min=0).sum((1, 2)).numpy()
        heights = np.array(browser.js(script)).reshape(-1, 2)[:, 1]
        np.testing.assert_allclose(heights, 95 - 90 * sums / sums.max(), atol=0.01)
    browser.press(UP)
    assert chosen(browser) == [0]
    browser.press(DOWN, DOWN)
    browser.wait("document.querySelectorAll('.word')[2].getAttribute('aria-pressed') === 'true'")


def test_the_strip_of_the_player_selects_word_and_frame(browser, page, maps):
    browser.open(page)
    script = (
        "return [...document.querySelectorAll('.row canvas')].map(canvas => "
        "[...canvas.getContext('2d').getImageData(0, 0, canvas.width, 1).data])"
    )
    cells = np.array(browser.js(script)).reshape(len(TOKENS), T, 4)[..., :3]
    sums = maps.joint.clamp(min=0).sum((2, 3)).numpy()
    expected = Style(sign="positive").colors(sums / sums.max(1, keepdims=True), bytes=True)[..., :3]
    assert np.abs(cells - expected.astype(int)).max() <= 4
    browser.drag(".row:nth-child(3) canvas", 0.3)
    browser.wait("document.querySelectorAll('.word')[2].getAttribute('aria-pressed') === 'true'")
    browser.wait("document.getElementById('now').textContent === 'frame 1'")
    pale = browser.js("return [...document.querySelectorAll('.row')].map(row => row.classList.contains('pale'))")
    assert pale == [True, False, False, True]


def test_the_chosen_word_of_a_long_answer_is_visible(browser, clip, maps, tmp_path):
    joint = maps.joint[[0, 1]].repeat_interleave(40, 0)
    whole = VideoAttribution.from_joint(joint)
    reliance = torch.zeros(80).index_fill(0, torch.tensor(70), 2.0)
    many = AnswerMaps(
        whole.joint,
        whole.spatial,
        whole.temporal,
        tokens=("somewhat",) * 80,
        log_probabilities=torch.zeros(80),
        reliance=reliance,
    )
    to_html(many, clip, tmp_path / "long.html")
    browser.open(tmp_path / "long.html")
    inside = (
        "return [['words', '.word'], ['rows', '.row']].map(([box, part]) => {"
        "const outer = document.getElementById(box).getBoundingClientRect();"
        "const inner = document.querySelectorAll(part)[70].getBoundingClientRect();"
        "return inner.top >= outer.top - 1 && inner.bottom <= outer.bottom + 1 && outer.height < 300})"
    )
    assert browser.js(inside) == [True, True]


def test_words_fit_a_small_screen_and_other_pages_have_none(browser, page, clip, maps, tmp_path):
    browser.open(page, (390, 844))
    assert browser.js("return document.documentElement.scrollWidth") <= 390
    to_html(maps.joint[0], clip, tmp_path / "plain.html")
    browser.open(tmp_path / "plain.html")
    assert browser.js("return ['spoken', 'strip', 'word-keys'].every(id => document.getElementById(id).hidden)")
