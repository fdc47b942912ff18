"""Tests of the documentation: links work, every page is listed, nothing is repeated, no name is missing."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from covering import in_one_case
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = {path: path.read_text("utf-8") for path in [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md"))]}
PACKAGES = ("attr", "baselines", "benchmark", "feature_masks", "io", "metrics", "models", "visualization")
PUBLIC = ["captum_staa", *(f"captum_staa.{package}" for package in PACKAGES)]


def prose(text: str) -> str:
    """Return a page without its code blocks and directives."""
    return re.sub(r"^(`{3,}|:{3,}).*?^\1\s*$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub and MyST create for headings down to the third level."""
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,3} (.+)$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


def broken(path: Path, text: str) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    missing = []
    for link in re.findall(r"\]\(<?([^)\s>]+)", re.sub(r"`[^`]*`", "", prose(text))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        known = text if target == path else PAGES.get(target)
        if not (target == path or target.exists()) or (anchor and (known is None or anchor not in anchors(known))):
            missing.append(link)
    return missing


def paragraphs(text: str) -> Iterator[str]:
    """Yield paragraphs of more than 25 words. Tables are left out, because their cells may repeat."""
    for block in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", prose(text)):
        lines = [line for line in block.strip().splitlines() if not line.startswith(("|", "#", "!["))]
        words = " ".join(lines).split()
        if len(words) > 25:
            yield " ".join(words)


def repeated(pages: dict[Path, str]) -> list[str]:
    """Return the paragraphs that occur more than once."""
    found = Counter(paragraph for text in pages.values() for paragraph in paragraphs(text))
    return [paragraph for paragraph, count in found.items() if count > 1]


def in_toctrees(pages: dict[Path, str]) -> Counter[str]:
    """Count how often each page is an entry of a table of contents."""
    trees = [tree for text in pages.values() for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.S | re.M)]
    lines = [line.strip() for tree in trees for line in tree.splitlines() if line.strip() and line[0] != ":"]
    return Counter(re.sub(r".*<(\w+)>$", r"\1", line) for line in lines)  # "title <page>" is a page with another title


def documented(text: str) -> list[object]:
    """Return the objects that a page of autodoc and autosummary directives documents."""
    lists = re.findall(r"^\.\. autosummary::\n((?:   .*\n|\n(?=   ))*)", text, re.MULTILINE)
    found = [resolved(name) for names in lists for name in re.findall(r"^   (\w[\w.]+)$", names, re.MULTILINE)]
    directive = r"^\.\. (?:auto|py:)(\w+):: (\S+)\n((?:   .*\n|\n(?=   ))*)"
    for kind, name, options in re.findall(directive, text, re.MULTILINE):
        thing = resolved(name)
        found.append(thing)
        if kind == "module":
            members = re.search(r":members:((?:[^:]|\n {6})*)", options)
            found += [getattr(thing, member.strip()) for member in members[1].split(",")] if members else []
    return found


def resolved(name: str) -> object:
    """Return the object of a dotted name. If a function and a module have the same name, return the function."""
    first, *rest = name.split(".")
    thing: object = importlib.import_module(first)
    for depth, part in enumerate(rest, start=1):
        if not hasattr(thing, part):
            importlib.import_module(".".join([first, *rest[:depth]]))
        thing = getattr(thing, part)
    return thing


def undocumented(modules: list[str], text: str) -> list[str]:
    """Return public classes, functions, dictionaries and modules that a page does not document."""
    shown = documented(text)
    missing = []
    for module in map(importlib.import_module, modules):
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            known = any(thing is other for other in shown)
            if isinstance(thing, ModuleType):
                known = known or thing.__name__ in modules
            if not known and isinstance(thing, (type, FunctionType, ModuleType, dict)):
                missing.append(f"{module.__name__}.{name}")
    return missing


def flat(text: str) -> str:
    return " ".join(text.split())


def cited(source: str) -> list[str]:
    """Return the quoted titles in the Reference sections of the docstrings of a module."""
    titles = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            _, _, reference = (ast.get_docstring(node) or "").partition("Reference:")
            titles += [flat(title) for title in re.findall(r'(?<!`)"([A-Z][^"`]{14,}?),?"', reference)]
    return titles


@in_one_case()
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_work(path):
    assert not broken(path, PAGES[path])


def test_every_page_is_in_one_table_of_contents():
    entries = in_toctrees({path: text for path, text in PAGES.items() if path.parent == DOCS})
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages <= entries.keys(), f"in no toctree: {sorted(pages - entries.keys())}"
    assert max(entries.values()) == 1


@in_one_case()
@pytest.mark.parametrize(
    ("word", "page"),
    [
        ("SlowFast", "your_model"),
        ("r3d_18", "your_model"),
        ("LSTM", "your_model"),
        ("Lightning", "your_model"),
        ("LoRA", "your_model"),
        ("sigmoid", "your_model"),
        ("SlowFast", "which_method"),
        ("frames", "which_method"),
        ("Qwen2.5-VL", "which_method"),
    ],
)
def test_what_readers_search_for_is_in_a_heading(word, page):
    """The search ranks words of headings first."""
    assert any(word in heading for heading in re.findall(r"^#+ (.+)$", prose(PAGES[DOCS / f"{page}.md"]), re.MULTILINE))


def test_no_paragraph_is_repeated():
    assert not repeated(PAGES)


def test_every_public_name_is_in_the_reference():
    assert not undocumented(PUBLIC, PAGES[DOCS / "api.md"])


def test_every_paper_is_in_the_bibliography_once():
    page = flat(PAGES[DOCS / "bibliography.md"]).lower()
    sources = {path: path.read_text("utf-8") for path in sorted((ROOT / "captum_staa").rglob("*.py"))}
    titles = {title.lower() for text in sources.values() for title in cited(text)}
    assert len(titles) > 25
    assert not {title: page.count(title) for title in titles if page.count(title) != 1}
    everything = [*sources.values(), *PAGES.values(), (ROOT / "CITATION.cff").read_text("utf-8")]
    numbers = {number for text in everything for number in re.findall(r"arxiv\D{1,12}(\d{4}\.\d{4,5})", text.lower())}
    assert len(numbers) > 20
    assert not {number: page.count(f"[arxiv {number}]") for number in numbers if f"[arxiv {number}]" not in page}


def test_every_picture_is_used_and_the_gallery_is_small():
    shown = {link for text in PAGES.values() for link in re.findall(r"\]\((?:docs/)?images/([^)]+)\)", text)}
    assert {path.name for path in (DOCS / "images").iterdir()} == shown
    assert sum(path.stat().st_size for path in (DOCS / "images").glob("gallery*")) < 2_000_000


@pytest.mark.parametrize("path", sorted((DOCS / "inventories").glob("*.inv")), ids=lambda path: path.stem)
def test_names_in_the_inventories_exist(path):
    names = [line.split()[0] for line in path.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert len(names) > 5
    assert all(resolved(name) is not None for name in names)


def test_all_formulas_can_be_rendered():
    pytest.importorskip("sphinx")
    sys.path.insert(0, str(DOCS))
    try:
        drawing = importlib.import_module("formulas").drawing
    finally:
        sys.path.remove(str(DOCS))
    pattern = r"\$\$(.+?)\$\$|(?<![\\\w$])\$([^$\n]+?)\$(?!\d)"
    found = [a or b for path, text in PAGES.items() if path.parent == DOCS for a, b in re.findall(pattern, prose(text))]
    assert len(found) > 60
    for tex in found:
        assert "<path d=" in drawing(tex)
    with pytest.raises(ValueError, match="nonsense"):
        drawing(r"\nonsense{x}")
    inside = [int(x) for x in re.findall(r"viewBox=\"\S+ \S+ (\d+)", drawing("x") + drawing("x + x"))]
    assert inside[0] < inside[1] / 2


def gallery() -> ModuleType:
    """Return the program that draws the gallery."""
    sys.path.insert(0, str(DOCS))
    try:
        return importlib.import_module("gallery")
    finally:
        sys.path.remove(str(DOCS))


SLOW = ("SpatioTemporalPerturbation", "VideoOcclusion", "RISE")  # hundreds of forwards per map


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in gallery().METHODS]
)
def test_maps_of_the_gallery_find_the_evidence(name):
    drawing = gallery()
    assert drawing.file_of(name).is_file()
    models, method = drawing.METHODS[name]
    for model in models:
        _, task, clf, clip, label = next(drawing.clips((model,)))
        assert float(drawing.scored(method(clf, clip, label), task).split()[1]) > 0.6


# Tests of the helper functions above.


@in_one_case()
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[a](staa.md)", []),
        ("[a](staa.md#focus)", []),
        ("[a](staa.md#fokus)", ["staa.md#fokus"]),
        ("[a](nowhere.md)", ["nowhere.md"]),
        ("![a](images/none.png)", ["images/none.png"]),
        ("# One\n[a](#one)", []),
        ("# One\n[a](#two)", ["#two"]),
        ("```\n[a](nowhere.md)\n```\n`[a](nowhere.md)` <https://x.org> [b](https://x.org#y)", []),
    ],
)
def test_broken_finds_broken_links(text, found):
    assert broken(DOCS / "page.md", text) == found


def test_other_helpers_find_faults():
    words = "word " * 26
    assert repeated({Path("a"): f"{words}\n\nother", Path("b"): f"- {words[:-5]}\n\n{words}"}) == [words.strip()]
    assert not repeated({Path("a"): f"```\n{words}\n```", Path("b"): f"{words}\n\n| {words} |"})
    trees = "```{toctree}\n:caption: a\n\nx\ny\n```\n```{toctree}\nThe X <x>\n```"
    assert in_toctrees({Path("a"): trees}) == {"x": 2, "y": 1}
    assert undocumented(["captum_staa.visualization"], ".. autofunction:: captum_staa.visualization.to_html\n")
    page = (
        ".. automodule:: captum_staa.feature_masks\n   :members: frames, segments, grid,\n      tubelets, supervoxels\n"
    )
    assert undocumented(["captum_staa.feature_masks"], page) == ["captum_staa.feature_masks.flow_tubes"]
    assert cited('"""A.\n\nReference:\n    Doe, "A Title of Some\n    Length", X 2020. ``"gradcam"``"""') == [
        "A Title of Some Length"
    ]


def test_every_committed_picture_can_be_read():
    """A program that is stopped while it draws leaves an empty file."""
    pictures = [path for path in sorted((DOCS / "images").iterdir()) if path.suffix in (".png", ".webp")]
    assert len(pictures) > 10
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
