"""Every family of the model hub that we know of, as a tiny random checkpoint: what docs/families.md says of it is so.

A few in every run of the tests; all of them with `make families-all`, which writes down what it finds.
"""

import json
import os
import re
from pathlib import Path

import pytest

from tests.e2e.families.outcome import outcome_of
from tests.model_hub.catalogue import FAMILIES, results

pytestmark = pytest.mark.e2e

# Set by `make families-all`: a folder for what is found, instead of comparing it with what was.
FOUND = os.environ.get("XQUANT_FAMILIES_FOUND")


def as_parameter(family):
    marks = () if family.quick else pytest.mark.nightly
    return pytest.param(family, id=re.sub(r"\W+", "-", family.name.replace("+", " plus")).strip("-"), marks=marks)


@pytest.mark.alike(keep=1)
@pytest.mark.parametrize("family", map(as_parameter, FAMILIES))
def test_a_family_of_the_model_hub(engines, tmp_path, request, family):
    found = outcome_of(engines, family, tmp_path)
    print(found)
    if FOUND:
        content = {"family": family.name, "outcome": found.kind, "why": found.why, "change": found.change}
        Path(FOUND).mkdir(parents=True, exist_ok=True)
        (Path(FOUND) / f"{request.node.callspec.id}.json").write_text(json.dumps(content))
    else:
        recorded = results()[family.name]
        assert (found.kind, found.why) == (recorded["outcome"], recorded["why"]), "run `make families-all`"
