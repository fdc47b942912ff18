"""The player in a real browser."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from headless import Browser, driven

from captum_staa.visualization import Frames, Style, overlay, to_html
from captum_staa.visualization.figure import METHODS
from captum_staa.visualization.overlay import on_one_scale

T, H, W = 6, 24, 32
TOLERANCE = 7  # of 255: the page stores one byte per cell, and color maps are steep
LEFT, RIGHT, HOME, END = "\ue012", "\ue014", "\ue011", "\ue010"  # WebDriver codes of keys


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    with driven(tmp_path_factory.mktemp("profile")) as session:
        yield session


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """(T, H, W, 3): random colors, so that all frames differ."""
    return np.random.default_rng(0).integers(0, 255, (T, H, W, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def maps() -> dict[str, np.ndarray]:
    """Two signed explanations of different sizes and units; "first" is strongest in frame 2."""
    random = np.random.default_rng(1)
    first = random.normal(size=(T, 16, 20))
    first[2] += 3
    return {"first": first, "second, </script><b>": 1000 * random.normal(size=(T, 6, 8)) ** 3}


CROP = (2.5, 4, 18, 20.5)


@pytest.fixture(scope="module")
def page(tmp_path_factory, clip, maps) -> Path:
    path = tmp_path_factory.mktemp("page") / "player.html"
    to_html(
        maps,
        Frames(clip, CROP, indices=range(10, 10 + 5 * T, 5), fps=25),
        path,
        play_fps=20,
        truth=[(1, 2)],
        predictions=[("waving", 0.75), ("<i>clapping</i>", 0.25)],
        target="<i>clapping</i>",
        title="Why & <how>?",
    )
    return path


def drawn(clip, maps, frame: int, **options) -> np.ndarray:
    return overlay(maps, Frames(clip, CROP), style=Style(**options)).picture(frame).astype(int)


SIGNS = ["absolute_value", "positive", "negative", "all"]


@pytest.mark.parametrize("method", METHODS)
def test_page_draws_the_same_pixels_as_python(browser, page, clip, maps, method):
    """For every sign and both explanations; storing one byte per cell causes some rounding."""
    browser.open(page)
    for number, values in enumerate(maps.values(), start=1):
        browser.choose("explanation", str(number))
        browser.choose("method", method)
        for sign in SIGNS:
            if sign == "all" and method in ("masked_image", "alpha_scaling"):
                assert browser.js("return document.querySelector('#sign [value=all]').disabled")
                continue
            browser.choose("sign", sign)
            expected = drawn(clip, values, 2, method=method, sign=sign)
            off = np.abs(browser.pixels() - expected)
            assert off.max() <= TOLERANCE, f"{sign}, explanation {number}"
            assert off.mean() < 0.5
    assert np.array_equal(browser.pixels("clip"), clip[2])


def test_two_classes_beside_each_other_share_a_scale(browser, clip, maps, tmp_path):
    classes = {"waving": maps["first"], "<i>clapping</i>": -3 * maps["first"]}
    predictions = [("jumping", 0.5), ("<i>clapping</i>", 0.3), ("waving", 0.2)]
    page = tmp_path / "two.html"
    frames, style = Frames(clip, CROP), Style(outlier_perc=0, sign="positive")
    to_html({"a method": classes, "another": maps["first"]}, frames, page, style=style, predictions=predictions)
    browser.open(page)
    shown = "return [...document.querySelectorAll('#stage figure')].filter(f => !f.hidden).map(f => f.innerText.trim())"
    assert browser.js(shown) == ["clip", "waving", "<i>clapping</i>"]
    frame = int(browser.text("#now").split()[1])
    assert frame == int(np.abs([np.maximum(part, 0).sum((1, 2)) for part in classes.values()]).max(0).argmax())
    for sign in SIGNS:
        browser.choose("sign", sign)
        drawn = on_one_scale(list(classes.values()), frames, replace(style, sign=sign))
        for canvas, expected in zip(("explained", "explained1"), drawn, strict=True):
            assert np.abs(browser.pixels(canvas) - expected.picture(frame).astype(int)).max() <= TOLERANCE, sign
    assert "in all frames and classes" in browser.text("#scale")
    browser.choose("sign", "positive")
    script = "return document.getElementById(arguments[0]).getAttribute('d').match(/-?[\\d.]+/g).map(Number)"
    sums = np.array([np.maximum(part, 0).sum((1, 2)) for part in classes.values()])
    for curve, values in zip(("curve", "curve1"), sums, strict=True):
        heights = np.array(browser.js(script, curve)).reshape(-1, 2)[:, 1]
        np.testing.assert_allclose(heights, 95 - 90 * values / sums.max(), atol=0.01)  # one axis for both
    strokes = browser.js("return ['curve', 'curve1'].map(id => document.getElementById(id).style.stroke)")
    bars = browser.js("return [...document.querySelectorAll('#bars .length')].map(b => b.style.background)")
    assert bars == ["", *reversed(strokes)] and strokes[0] != strokes[1]
    browser.choose("explanation", "2")
    assert browser.js(shown) == ["clip", "another"]
    assert browser.js("return document.getElementById('curve1').getAttribute('d')") == ""
    assert np.abs(browser.pixels() - overlay(maps["first"], frames, style=style).picture(frame)).max() <= TOLERANCE


def test_map_larger_than_the_picture_keeps_both_signs(browser, clip, tmp_path):
    """Noise around zero, whose mean over 4 x 4 cells is almost zero."""
    maps = np.random.default_rng(2).choice([-1.0, 1.0], size=(T, 4 * H, 4 * W))
    to_html(maps, clip, tmp_path / "fine.html", style=Style(outlier_perc=0, method="heat_map"))
    browser.open(tmp_path / "fine.html")
    for sign in SIGNS:
        browser.choose("sign", sign)
        frame = int(browser.text("#now").split()[1])
        style = Style(outlier_perc=0, method="heat_map", sign=sign)
        expected = overlay(maps, clip, style=style).picture(frame).astype(int)
        assert np.abs(browser.pixels() - expected).max() <= TOLERANCE, sign


def test_page_begins_with_the_strongest_frame(browser, page):
    browser.open(page)
    assert browser.text("#now") == "frame 20, 0.80 s"
    assert browser.js("return document.title") == browser.text("h1") == "Why & <how>?"
    assert browser.js("return [...document.querySelectorAll('#explanation option')].map(o => o.text)") == [
        "first",
        "second, </script><b>",
    ]


def test_keys_step_play_and_pause(browser, page, clip, maps):
    browser.open(page)
    browser.press(RIGHT)
    assert browser.text("#now") == "frame 25, 1.00 s"
    assert np.abs(browser.pixels() - drawn(clip, maps["first"], 3)).max() <= TOLERANCE
    browser.press(LEFT, LEFT)
    assert browser.text("#now") == "frame 15, 0.60 s"
    browser.press(END, RIGHT)  # stays at the last frame
    assert browser.text("#now") == "frame 35, 1.40 s"
    browser.press(HOME, LEFT)
    assert browser.text("#now") == "frame 10, 0.40 s"
    browser.press(" ")
    assert browser.text("#play") == "pause"
    browser.wait("document.getElementById('now').textContent.startsWith('frame 30')")
    browser.wait("document.getElementById('now').textContent.startsWith('frame 10')")  # repeats
    browser.press(" ")
    assert browser.text("#play") == "play"
    before = browser.text("#now")
    browser.js("return new Promise(done => setTimeout(done, 200))")
    assert browser.text("#now") == before


def test_focused_control_handles_keys(browser, page):
    browser.open(page)
    browser.js("document.getElementById('opacity').focus()")
    browser.press(LEFT)
    assert browser.text("#now") == "frame 20, 0.80 s"
    assert float(browser.js("return document.getElementById('opacity').value")) == pytest.approx(0.69)
    browser.js("document.getElementById('on').focus()")
    browser.press(" ")  # presses that button
    assert browser.text("#now") == "frame 25, 1.00 s"
    assert browser.text("#play") == "play"
    browser.press(LEFT)
    assert browser.text("#now") == "frame 20, 0.80 s"


def test_buttons_and_timeline_support_clicks_and_drags(browser, page):
    browser.open(page)
    browser.click("#on")
    assert browser.text("#now") == "frame 25, 1.00 s"
    browser.click("#back")
    browser.click("#back")
    assert browser.text("#now") == "frame 15, 0.60 s"
    browser.drag("#timeline", 0.75)
    assert browser.text("#now") == "frame 30, 1.20 s"
    browser.drag("#timeline", 0.75, 0.4, 0.1)
    assert browser.text("#now") == "frame 10, 0.40 s"
    browser.click("#play")
    assert browser.text("#play") == "pause"
    browser.drag("#timeline", 0.5)
    assert browser.text("#play") == "play"  # selecting a frame pauses the player


def test_opacity_slider_changes_the_overlay(browser, page, clip, maps):
    browser.open(page)
    for share in (0.0, 0.3, 1.0):
        browser.js(
            "const o = document.getElementById('opacity'); o.value = arguments[0];"
            "o.dispatchEvent(new Event('input', {bubbles: true}))",
            share,
        )
        expected = drawn(clip, maps["first"], 2, alpha_overlay=share)
        assert np.abs(browser.pixels() - expected).max() <= TOLERANCE


def test_timeline_curve_shows_sums_per_frame(browser, page, maps):
    browser.open(page)
    script = "return document.getElementById('curve').getAttribute('d').match(/-?[\\d.]+/g).map(Number)"
    for sign, values in (("positive", np.maximum(maps["first"], 0)), ("all", maps["first"])):
        browser.choose("sign", sign)
        points = np.array(browser.js(script)).reshape(-1, 2)
        np.testing.assert_allclose(points[:, 0], (np.arange(T) + 0.5) / T * 1000, atol=1e-3)
        sums = values.sum((1, 2))
        span = max(sums.max(), 0) - min(sums.min(), 0)
        np.testing.assert_allclose(points[:, 1], 95 - 90 * (sums - min(sums.min(), 0)) / span, atol=0.01)
    shaded = browser.js("const box = document.getElementById('truth').getBBox(); return [box.x, box.width]")
    np.testing.assert_allclose(shaded, [1000 / T, 2 * 1000 / T], atol=0.01)
    assert "shaded: frames with evidence" in browser.text("#unit")


def test_labels_are_escaped_and_explained_class_is_marked(browser, page):
    browser.open(page)
    assert browser.js("return document.querySelectorAll('main b, main i').length") == 0
    assert browser.text("#bars").split("\n") == ["waving", "75.0%", "<i>clapping</i>", "25.0%"]
    assert browser.js("return [...document.querySelectorAll('#bars .length')].map(b => b.className)") == [
        "length",
        "length explained",
    ]


def test_controls_have_accessible_names_and_focus(browser, page):
    browser.open(page)
    tree = browser("POST", "/goog/cdp/execute", {"cmd": "Accessibility.getFullAXTree", "params": {}})["nodes"]
    controls = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in tree
        if any(p["name"] == "focusable" and p["value"]["value"] for p in node.get("properties", []))
    ]
    named = {(role, name) for role, name in controls if role != "RootWebArea"}
    assert all(name for _, name in named), controls
    roles = {("button", "previous frame"), ("button", "play"), ("button", "next frame"), ("slider", "frame")}
    assert named >= roles | {("checkbox", "show original clip")}
    assert browser.js("return document.getElementById('timeline').getAttribute('aria-valuetext')") == "frame 20, 0.80 s"
    browser.press("\ue004")  # tab
    ring = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.js(ring) == "solid"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1200, 900), (390, 844)])
def test_page_fits_the_screen_in_light_and_dark_mode(browser, page, tmp_path, size, scheme):
    browser.open(page, size, scheme)
    picture = browser.screenshot()
    assert picture.size == size
    corner = np.array(picture)[-3:, :3].mean()
    assert corner > 240 if scheme == "light" else corner < 40
    assert browser.js("return document.documentElement.scrollWidth") <= size[0]  # no horizontal scrolling
    small = browser.js(
        """return [...document.querySelectorAll('button, select, label, figcaption, output, p, dt')]
           .filter(e => e.offsetParent && parseFloat(getComputedStyle(e).fontSize) < 13).length"""
    )
    assert small == 0
    assert browser.js("return document.getElementById('beside').hidden") == (size[0] < 600)
    explained = browser.js("return document.getElementById('explained').getBoundingClientRect().toJSON()")
    assert explained["width"] > 300
    x, y = explained["x"] + explained["width"] * (CROP[1] + 10) / W, explained["y"] + explained["height"] * 0.5
    assert (
        np.ptp(np.array(picture)[int(y) - 60 : int(y) + 60, int(x) - 60 : int(x) + 60].reshape(-1, 3), axis=0).min()
        > 50
    )


def test_page_loads_no_external_resources_and_logs_no_errors(browser, page):
    browser("POST", "/se/log", {"type": "browser"})  # clears the log of earlier tests
    browser.open(page)
    browser.press(RIGHT, " ", " ")
    fetched = browser.js("return performance.getEntriesByType('resource').map(e => e.name.slice(0, 10))")
    assert [name for name in fetched if name != "data:image"] == []
    assert browser("POST", "/se/log", {"type": "browser"}) == []
    source = page.read_text("utf-8")
    assert re.findall(r"https?://\S+", source) == []
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', source)
    assert policy is not None
    assert policy[1].startswith("default-src 'none'")


def test_notebook_shows_the_player(browser, clip, maps, tmp_path):
    """Two iframes in one document, as in a notebook with two cells."""
    shown = to_html(maps["first"], Frames(clip, CROP))._repr_html_()
    (tmp_path / "notebook.html").write_text(f"<!doctype html>{shown}{shown}", encoding="utf-8")
    browser("POST", "/url", {"url": (tmp_path / "notebook.html").as_uri()})
    for frame in (0, 1):
        browser("POST", "/frame", {"id": frame})
        browser.wait("document.body.dataset.ready === 'yes'")
        assert browser.text("#now") == "frame 2"
        assert browser.js("return document.getElementById('choose').hidden")  # only one explanation
        browser("POST", "/frame", {"id": None})
