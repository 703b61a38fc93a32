"""The list of planted bugs is up to date; `make mutants` tries them."""

from __future__ import annotations

import pytest

from tests.mutations import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_what_is_to_be_replaced_is_there_once(mutant: Mutant) -> None:
    for edit in mutant.edits:
        assert (ROOT / edit.path).read_text().count(edit.old) == 1
        assert edit.new != edit.old
