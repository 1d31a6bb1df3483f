"""The examples in the docstrings of all that is public run, and nothing public that can be called is without one."""

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from delta_jax.interop import load_pretrained, save_pretrained

DOCS = Path(__file__).parents[1] / "docs"
CHECKPOINT = Path(__file__).parent / "interop" / "checkpoints" / "qwen3_5_text"
PACKAGES = [
    "delta_jax",
    "delta_jax.data",
    "delta_jax.data.tasks",
    "delta_jax.evaluation",
    "delta_jax.evaluation.harness",
    "delta_jax.inference",
    "delta_jax.interop",
    "delta_jax.layers",
    "delta_jax.models",
    "delta_jax.ops",
    "delta_jax.parallel",
    "delta_jax.testing",
    "delta_jax.training",
]


def callables(package: str) -> Iterator[tuple[str, Any]]:
    """What a package exports and defines itself that can be called; no exceptions, protocols or names of types."""
    module = importlib.import_module(package)
    for name in module.__all__:
        thing = getattr(module, name)
        if not (inspect.isfunction(thing) or inspect.isclass(thing)) or getattr(thing, "_is_protocol", False):
            continue
        if not (inspect.isclass(thing) and issubclass(thing, Exception)) and hasattr(thing, "__module__"):
            yield name, thing


def examples(package: str) -> list[doctest.DocTest]:
    """The examples of each of them, with the names that docs/reference/index.md promises."""
    known: dict[str, Any] = {"jax": jax, "jnp": jnp, "nnx": nnx, "np": np, "optax": optax}
    for other in (*PACKAGES, package):  # a name that two packages have is that of the one described
        module = importlib.import_module(other)
        known |= {name: getattr(module, name) for name in module.__all__}
    finder, found = doctest.DocTestFinder(recurse=False), []
    for name, thing in callables(package):
        tests = [test for test in finder.find(thing, f"{package}.{name}", globs=dict(known)) if test.examples]
        assert tests, f"{package}.{name} has no example in its docstring"
        found += tests
    return sorted(found, key=lambda test: test.name != "delta_jax.training.train")  # others read its run


@pytest.mark.parametrize("package", PACKAGES)
def test_examples_of_docstrings(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, which the examples of a package share."""
    monkeypatch.chdir(tmp_path)
    if package in ("delta_jax.interop", "delta_jax.training"):  # a published checkpoint, in one file
        save_pretrained(load_pretrained(CHECKPOINT), "qwen3_5")
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for test in examples(package):
        if test.name == "delta_jax.parallel.tpu_topology" and find_spec("libtpu") is None:
            continue
        if test.name == "delta_jax.parallel.gpu_topology" and find_spec("jax_plugins") is None:
            continue
        runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)
    assert runner.tries > 0


PAGES = sorted(
    page.relative_to(DOCS).as_posix()
    for page in DOCS.rglob("*.md")
    if "```python\n" in page.read_text() and page.parent.name != "reference" and page.name != "padding.md"
)


@pytest.mark.parametrize("page", PAGES)
def test_code_of_pages(page: str) -> None:
    """The blocks of a page go on from one another; what they claim they assert themselves."""
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    scope: dict[str, Any] = {"__name__": "__main__"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, block in enumerate(blocks):
            exec(compile(block, f"{page}, block {number}", "exec"), scope)


def test_the_site_has_every_page_and_every_package() -> None:
    """`mkdocs build --strict` itself is `make docs`; here it is enough that nothing public is without a page."""
    reference = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    described = set(re.findall(r"^::: (\S+)$", reference, re.MULTILINE))
    assert described == set(PACKAGES) - {"delta_jax"}  # whose names are those of delta_jax.ops
    assert set(importlib.import_module("delta_jax").__all__) - {"__version__"} <= set(
        importlib.import_module("delta_jax.ops").__all__
    )
