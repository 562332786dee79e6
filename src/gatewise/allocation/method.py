"""ALoRA and PI-LoRA as parts of a recipe: LoRA whose ranks move between modules while it trains, see ``RankAllocation``."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from peft import LoraConfig, PeftModel
from pydantic import AfterValidator, Field, WithJsonSchema
from transformers import PreTrainedModel, TrainerCallback

from gatewise.adapters.method import Lora
from gatewise.allocation import Unit
from gatewise.allocation.algorithm import ConstantBudget, Cubic, Round, in_steps
from gatewise.allocation.callback import RankAllocation
from gatewise.allocation.scores import DEFAULT, NAMES
from gatewise.errors import GatewiseError
from gatewise.parts import Count, Fraction, Run, Section


def _span(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf:
        return value
    raise ValueError("expected a number above 0 (1.0 or 0.25: epochs; an integer above 1: steps)")


# A length of training: a float counts epochs, an integer counts steps (and 1 is one epoch, as 1.0 is).
Span = Annotated[Any, AfterValidator(_span), WithJsonSchema({"type": "number", "exclusiveMinimum": 0})]


def _score(value: str) -> str:
    if value in NAMES or ":" in value:
        return value
    raise ValueError(f"expected one of {', '.join(NAMES)}, or module:function")


ScoreName = Annotated[
    str,
    AfterValidator(_score),
    WithJsonSchema({"anyOf": [{"enum": [*NAMES]}, {"type": "string", "pattern": ":"}]}),
]


class AllocationSection(Section):
    """The rounds of ALoRA, see ``gatewise.RankAllocation``."""

    score: ScoreName = DEFAULT
    """The score of a rank, see docs/reports/scores.md, or a function of your own as ``module:function``."""
    schedule: Literal["constant-budget", "cubic"] = "constant-budget"
    """``constant-budget``: what is pruned is given to other modules. ``cubic``: every module starts with ``init_r`` ranks, and the
    adapter comes down to what ``peft.r`` everywhere would have; nothing grows."""
    budget: Unit = "parameters"
    """What is counted: the ``parameters`` of live ranks, or the ``ranks`` themselves, as the papers do."""
    rounds: Count = 8
    """How many rounds at most."""
    prune_fraction: Fraction = 0.125
    """The share of the budget that a round moves; not with ``cubic``."""
    first_round: Span | None = None
    """Training before the first round: epochs, or steps if an integer above 1. Left out: one epoch, or a fifth of a run that is too
    short for all rounds."""
    recover: Span | None = None
    """Training between two rounds, likewise. Left out: a quarter of an epoch, or so much that the last of a short run is before
    three fifths of it."""
    r_max: Count | None = None
    """The most ranks that a module can get; not with ``cubic``. Left out: twice ``peft.r``."""
    init_r: Count | None = None
    """With ``cubic``: the ranks of every module at the start. Left out: one and a half times ``peft.r``."""
    module_pruning: bool = False
    """Modules whose scores add up to zero or less lose all their ranks."""
    grace_rounds: Annotated[int, Field(ge=0)] = 0
    """For so many rounds a new rank is not pruned; not with ``cubic``."""
    score_options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the score, such as ``points: 8``, see docs/reports/scores.md."""
    rule: str | None = None
    """A function of your own for who is pruned and who grows, as ``module:function``. Left out: the papers' rule."""


class PathSection(AllocationSection):
    """The rounds of PI-LoRA: scored along a path of gates, and whole modules may go."""

    score: ScoreName = "path_integral"
    """The score of a rank, by which the method is defined; others are taken too."""
    module_pruning: bool = True
    """Modules whose scores add up to zero or less lose all their ranks, as in the paper."""


class ALora(Lora):
    """ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187)."""

    starts = (True, "gaussian", "eva")  # of what the others take into the ranks, rounds would prune
    makes_rounds: type[RankAllocation] = RankAllocation
    allocation: AllocationSection

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Ranks that leave no room, keys of another schedule or budget, and no rows to score on."""
        yield from super().contradictions()
        section, r = self.allocation, self.peft.r
        for name in ("prune_fraction", "r_max", "grace_rounds") if section.schedule == "cubic" else ("init_r",):
            if getattr(section, name) != type(section).model_fields[name].default:
                yield f"allocation.{name}", f"is for the other schedule, but schedule is {section.schedule}: remove the key"
        if not self.recipe.data.held_out:
            yield "data.held_out", f"is 0, but method {self.recipe.method} scores ranks on rows held out of data.train: give 32"
        if section.r_max is not None and section.r_max < r:
            yield "allocation.r_max", f"is {section.r_max}, expected at least peft.r ({r}), with which every module starts"
        if section.init_r is not None and section.init_r <= r:
            yield "allocation.init_r", f"is {section.init_r}, expected more than peft.r ({r}), the mean rank to come down to"

    def config(self, run: Run, base: PreTrainedModel) -> LoraConfig:
        """Plain LoRA; where ranks only come down, with more of them at the start and the scale of those wanted at the end."""
        settings, r = self.settings(run, base), self.peft.r
        if self.allocation.schedule == "cubic":
            r = self.allocation.init_r or max(r + 1, round(1.5 * r))
            more = r / self.peft.r
            settings["lora_alpha"] *= more**0.5 if self.peft.use_rslora else more
        return LoraConfig(r=r, use_rslora=self.peft.use_rslora, **settings)

    def resized(self, size: int) -> dict[str, Any]:
        """The room to grow, and the ranks to come down from, go with the rank."""
        given = self.allocation.model_dump(include={"r_max", "init_r"}, exclude_none=True)
        more = {f"allocation.{name}": max(size + 1, round(value * size / self.peft.r)) for name, value in given.items()}
        return {**super().resized(size), **more}

    def adapt(self, run: Run, base: PreTrainedModel) -> PeftModel:
        """Fresh LoRA. The rounds are made here, so that what is wrong with them is said before an earlier run is overwritten."""
        self.rounds = self._rounds(run)
        return super().adapt(run, base)

    def callbacks(self, run: Run) -> list[TrainerCallback]:
        """The rounds; they keep the adapter whole too."""
        return [self.rounds]

    def _rounds(self, run: Run) -> RankAllocation:
        """
        Raises:
            GatewiseError: the run ends before the first round.
        """
        section = self.allocation
        spans = self._spans(run)
        first = in_steps(spans["first_round"], run.steps_per_epoch)
        if first >= run.steps:
            raise GatewiseError(
                f"allocation.first_round is {section.first_round}, after step {first}, but the run has {run.steps} steps and what "
                "a round grows must learn: lower it or train longer"
            )
        when: dict[str, Any] = {"rounds": section.rounds, **spans}
        if section.schedule == "cubic":
            schedule: ConstantBudget | Cubic = Cubic(**when, target_rank=self.peft.r)
        else:
            schedule = ConstantBudget(**when, **section.model_dump(include={"prune_fraction", "r_max", "grace_rounds"}))
        return self.makes_rounds(
            section.score,
            schedule,
            **section.model_dump(include={"score_options", "rule", "budget", "module_pruning"}),
            validation_batch=run.collate(run.held_out),
            seed=self.recipe.seed,
            on_round=lambda done: run.progress.say(_line(done)),
        )

    def _spans(self, run: Run) -> dict[str, float]:
        """``first_round`` and ``recover``. Those left out are the paper's, or shares of a run that is too short for them."""
        given = self.allocation.model_dump(include={"first_round", "recover"}, exclude_none=True)
        spans = {"first_round": 1.0, "recover": 0.25, **given}
        first, between = (in_steps(span, run.steps_per_epoch) for span in spans.values())
        if len(given) < len(spans) and first + between * (self.allocation.rounds - 1) >= run.steps:
            epochs = run.steps / run.steps_per_epoch
            spans = {"first_round": 0.2 * epochs, "recover": 0.4 * epochs / self.allocation.rounds, **given}
            first, between = (in_steps(span, run.steps_per_epoch) for span in spans.values())
            run.progress.say(
                f"rounds after step {first} and every {between} steps: the run is short for a first one after an epoch"
            )
        return spans


class PiLora(ALora):
    """PI-LoRA (Li et al., arXiv 2510.04655)."""

    allocation: PathSection


def _line(done: Round) -> str:
    """One line about a round."""
    pruned, grown = (sum(map(len, slots.values())) for slots in (done.pruned, done.grown))
    return (
        f"step {done.step}: round {done.round}, {pruned} ranks pruned, {grown} grown, {sum(done.ranks.values())} live, "
        f"loss on the validation batch {done.loss_before:.4f} -> {done.loss_after:.4f}, {done.seconds:.1f} s"
    )
