"""What docs/ shows runs, and the API page says something of every public name."""

import doctest
import inspect
import re
from pathlib import Path

import jax.numpy as jnp
import pdoc
import pytest

import omerge_jax as om

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def slug(heading):
    """Returns the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def blocks(page):
    """Returns the python blocks of a page as (readable id, first line, code)."""
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        prose = BLOCK.sub("", text[: match.start()])
        line = text.count("\n", 0, match.start()) + 2
        found.append((f"{page.stem}:{slug(HEADING.findall(prose)[-1])}", line, match[1]))
    return found


BLOCKS = [(page, *block) for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize(
    ("page", "line", "code"),
    [(page, line, code) for page, _, line, code in BLOCKS],
    ids=[name for _, name, _, _ in BLOCKS],
)
def test_block_runs_by_itself(page, line, code):
    # Blank lines in front, so that a traceback names the line of the page.
    exec(compile("\n" * (line - 1) + code, str(page), "exec"), {"__name__": "__main__"})


def test_every_composition_has_one_block_in_which_a_loss_falls():
    text = (ROOT / "docs" / "compositions.md").read_text()
    introduction, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    assert not BLOCK.search(introduction)
    assert sections
    for section in sections:
        (code,) = BLOCK.findall(section)
        assert re.search(r"^ *assert loss\(.+\) < ", code, re.MULTILINE), section[:40]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in map(slug, HEADING.findall(BLOCK.sub("", linked.read_text()))), target


def docstrings(page):
    """Returns the text of the docstring of every section of a page of pdoc, by name."""
    texts = {}
    for name, section in re.findall(r'<section id="(\w+)">(.*?)</section>', page, re.DOTALL):
        # The members of a class come after its own text.
        own = section.split('class="classattr"')[0]
        found = re.search(r'class="docstring">(.*?)</div>', own, re.DOTALL)
        texts[name] = re.sub(r"<[^>]+>", "", found[1]) if found else ""
    return texts


@pytest.fixture(scope="module")
def api_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    pdoc.render.configure(docformat="google")
    try:
        pdoc.pdoc("omerge_jax", output_directory=folder)
    finally:
        pdoc.render.configure()
    return docstrings((folder / "omerge_jax.html").read_text())


@pytest.mark.filterwarnings("ignore:Error parsing type annotation")
@pytest.mark.parametrize("name", om.__all__)
def test_the_api_page_documents(name, api_page):
    assert len(api_page[name].split()) >= 3, f"{name} has no docstring on the API page"


# A reader calls functions. Classes are made by the library, or are protocols to be implemented, and
# aliases of types have no call: what there is to show of them is in the examples of the functions.
FUNCTIONS = [name for name in om.__all__ if inspect.isfunction(getattr(om, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_runs_with_public_names_alone(name):
    public = {"jnp": jnp} | {name: getattr(om, name) for name in om.__all__}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(om, name), name, globs=public)
    assert test.examples, f"{name} has no example"
    assert doctest.DocTestRunner().run(test).failed == 0
