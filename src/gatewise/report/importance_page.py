"""The page of an adapter's importance: scores, ranks and, where one was asked for, the ranks suggested."""

import math
from collections.abc import Mapping

from gatewise.report.grid import places_of
from gatewise.report.importance_map import Importance, ModuleImportance
from gatewise.report.importance_text import importance_facts
from gatewise.report.page import Page, html_of


def importance_page(importance: Importance, title: str, suggested: Mapping[str, int] | None = None) -> str:
    grids = [importance.score_grid(), importance.rank_grid()]
    if suggested is not None:
        grids.append(importance.rank_grid(suggested, "suggested"))

    def tip(module: ModuleImportance) -> str:
        lines = [module.path, f"score {module.total:.4g} {importance.unit}".rstrip(), f"rank {module.rank}"]
        if suggested is not None:
            lines.append(f"suggested {suggested[module.path]}")
        return "\n".join(lines)

    def row(module: ModuleImportance) -> list[str]:
        mean = module.total / module.rank if module.rank else math.nan
        spread = (min(module.scores), max(module.scores)) if module.rank else (math.nan, math.nan)
        texts = [module.path, f"{module.total:.4g}", str(module.rank)]
        texts += ["·" if math.isnan(number) else f"{number:.3g}" for number in (mean, *spread)]
        return texts if suggested is None else [*texts, str(suggested[module.path])]

    columns = ["score", "rank", "mean of its ranks", "lowest", "highest"]
    return html_of(
        Page(
            title=title,
            facts=importance_facts(importance),
            grids=grids,
            shown="score",
            tips={place: "\n".join(map(tip, here)) for place, here in places_of(importance.modules).items()},
            caption=f"Shown as score: {grids[0].title}, summed over the ranks of a module.",
            sections="",
            columns=columns if suggested is None else [*columns, "suggested"],
            modules=[row(module) for module in importance.modules],
        )
    )
