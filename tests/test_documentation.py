"""The examples of the README and of the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gradpress

README = Path(__file__).parents[1] / "README.md"
MODULES = [
    info.name
    for info in pkgutil.walk_packages(gradpress.__path__, "gradpress.")
    if not info.name.endswith(("_core", "__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def test_some_docstrings_have_examples() -> None:
    parser = doctest.DocTestFinder()
    objects = [gradpress.quant.quantize, gradpress.lowrank.svd, gradpress.optim.QGaLoreAdamW]
    assert all(test.examples for o in objects for test in parser.find(o)[:1])


def test_readme_example(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for code in blocks:
        exec(compile(code, str(README), "exec"), {})
    assert "projectors" in capsys.readouterr().out
