"""Every experts class of the installed transformers, and the table of them in docs/supported-models.md."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import transformers
from families import BOUND, DOCUMENT, Result, compare, document, families, row

LEFT: set[str] = set()


@functools.cache
def documented() -> tuple[str, dict[str, str]]:
    """The text before the table, and the table's rows by experts class."""
    text, _, table = DOCUMENT.read_text(encoding="utf-8").partition("\n|")
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return text, {line.split(" | ")[1]: line for line in rows}


@pytest.mark.parametrize("family", families(), ids=str)
def test_family(kernel, family):
    """The stock model's output and gradients, from the fused ops, without a merge; and the table says the same."""
    result = compare(kernel, family)
    assert (result.error is None) == (family.experts_class in LEFT)
    if f"transformers {transformers.__version__} " not in documented()[0]:
        pytest.skip(f"it matches; the table is of another transformers than {transformers.__version__}")
    *cells, error = documented()[1][family.experts_class].rpartition(" | ")
    *want, _ = row(family, result).rpartition(" | ")
    assert cells == want
    if result.error is None:
        assert error == f"{result.reason} |"
    else:  # the digits are another machine's
        assert 0 <= float(error.removesuffix(" |")) <= BOUND


def test_document():
    """All but the rows' contents, which `test_family` checks: its text, its counts, and that no class is missing."""
    text, rows = documented()
    if f"transformers {transformers.__version__} " not in text:
        pytest.skip(f"the table is of another transformers than {transformers.__version__}")
    assert list(rows) == [family.experts_class for family in families()]
    results = {f: Result("-", "-", "-", None if f.experts_class in LEFT else 0.0) for f in families()}
    assert document(results).partition("\n|")[0] == text


def test_no_class_is_missed():
    """Every modeling file that mentions the decorator has a class in the list, and classes are told by their names."""
    folder = Path(transformers.__file__).parent / "models"
    mentions = {p.stem for p in folder.glob("*/modeling_*.py") if b"use_experts_implementation" in p.read_bytes()}
    assert {family.module.rpartition(".")[2] for family in families()} == mentions
    assert len({family.experts_class for family in families()}) == len(families()) > 0
