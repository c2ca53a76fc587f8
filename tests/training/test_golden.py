"""Twenty steps give the metrics that are kept."""

import json

import pytest

from tests.training.golden import FIELDS, KEPT, curve

RENEW = "if this change means to change numbers, renew them with `python -m tests.training.golden` and say why in the commit"


def test_metrics_are_the_kept_ones(tmp_path):
    """To 1e-4: processors differ in the last bits of a product, and twenty steps let them grow."""
    wanted, found = json.loads(KEPT.read_text()), curve(tmp_path)
    assert len(found) == len(wanted) == 20, RENEW
    for row, kept in zip(found, wanted, strict=True):
        for name in FIELDS:
            same = pytest.approx(kept[name], rel=1e-4) if isinstance(kept[name], float) else kept[name]
            assert row[name] == same, f"{name} of step {kept['stage_step']} of stage {kept['stage']}; {RENEW}"
