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
    """The rounds of ALoRA, see ``gatewise.RankAllocation``.

    ``score`` names a file in ``gatewise/allocation/scores``, or your own function as module:function, and ``rule`` your
    own function for who is pruned and who grows. With ``schedule: cubic`` every module starts with ``init_r`` ranks
    (left out: one and a half times ``peft.r``), and the adapter ends with the parameters (or ranks, see ``budget``) that
    ``peft.r`` everywhere would have; ``prune_fraction`` is not used. ``first_round`` and ``recover`` left out are one epoch and
    a quarter of one, the paper's; in a run too short for all rounds, the first is after a fifth of it, and the last before three.
    """

    score: ScoreName = DEFAULT
    schedule: Literal["constant-budget", "cubic"] = "constant-budget"
    budget: Unit = "parameters"
    rounds: Count = 8
    prune_fraction: Fraction = 0.125
    first_round: Span | None = None
    recover: Span | None = None
    r_max: Count | None = None
    init_r: Count | None = None
    module_pruning: bool = False
    grace_rounds: Annotated[int, Field(ge=0)] = 0
    score_options: dict[str, Any] = Field(default_factory=dict)
    rule: str | None = None


class PathSection(AllocationSection):
    """The rounds of PI-LoRA: scored along a path of gates, and whole modules may go."""

    score: ScoreName = "path_integral"
    module_pruning: bool = True


class ALora(Lora):
    """ALoRA (Liu et al., NAACL 2024, arXiv 2403.16187)."""

    starts = (True, "gaussian", "eva")  # of what the others take into the ranks, rounds would prune
    allocation: AllocationSection

    def contradictions(self) -> Iterator[tuple[str, str]]:
        """Ranks that leave no room, keys of another schedule or budget, and no rows to score on."""
        yield from super().contradictions()
        section, r = self.allocation, self.peft.r
        for name in ("r_max", "grace_rounds") if section.schedule == "cubic" else ("init_r",):
            if getattr(section, name):
                yield f"allocation.{name}", f"is for the other schedule, but schedule is {section.schedule}: remove the key"
        if not self.recipe.data.held_out:
            yield "data.held_out", f"is 0, but method {self.recipe.method} scores ranks on rows held out of data.train: give 32"
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
        return RankAllocation(
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
        if first + between * (self.allocation.rounds - 1) >= run.steps:
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
