"""Names that gave way to the field's own terms do not come back."""

import ast
from pathlib import Path

import lcx

RETIRED = frozenset(
    """
    Form BiasForm TemperatureForm EmbedForm SamplingForm AlibiForm T5Form KerpleForm FireForm SinusoidalForm LearnedForm
    Piece Pieced Phase Grid Temperature q_phase k_phase
    Local PullBack together beside Queries Keys Hops _legs Ready wide_zeros _wide over_heads over_slices
    over_mesh over_devices _over_slots
    cut_queries cut_heads cut_numbers blockwise_backward flash_backward plan_walk resolve_context ContextPlan resolve_layout
    lay_out layout_on schemes_of KindContext attend_ Attend _deal _fetch _share real_tokens
    Late settle Feed Watch remark alone FREE Origin Initial Start Planner
    Memory Selection Beside KEPT keep_beside COMPUTATION train_recipe _sums_and_gradients
    NeedleGrid PerplexityCurve PerplexityPoint PositionLoss model_scorer score_rows ScorerFor _Rule Rule shard_for flash_options
    """.split()  # noqa: SIM905
)


def names_of(path: Path) -> set[str]:
    """All that a file defines, binds, imports or takes as an argument or attribute."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("name", "id", "attr", "arg"):
            if isinstance(name := getattr(node, field, None), str):
                found.add(name)
    return found


def test_no_retired_name_is_in_use():
    files = sorted(Path(lcx.__file__).parent.rglob("*.py"))
    assert len(files) > 100
    kept = {f"{path.name}: {name}" for path in files for name in names_of(path) & RETIRED}
    assert not kept, sorted(kept)
