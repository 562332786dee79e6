"""The base model's ``generate`` with prompts: what it was given, its forwards do not get, but generators have to know."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin

from gatewise.errors import GatewiseError
from gatewise.fronts import Front, put_front, take_front
from gatewise.prompts.passes import PassTracker
from gatewise.prompts.reading import Call


class PromptedWriter(Front, nn.Module):
    """What the base model's class is given in front of its own ``generate``, through which PEFT's goes, too."""

    prompt_tracker: PassTracker

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own.

        Raises:
            GatewiseError: classifier-free guidance without a cache.
        """
        given = {**dict(zip(("inputs", "generation_config"), args, strict=False)), **kwargs}
        if self.prompt_tracker.is_at_work and _guides_without_cache(given, self.generation_config):
            raise GatewiseError(
                "guidance_scale was given with use_cache=False, where generators cannot tell the negative prompt from the answer: "
                "leave use_cache out"
            )
        with self.prompt_tracker.call(_call_of(given)):
            return super().generate(*args, **kwargs)  # type: ignore[misc]


def install_writer(model: Any, tracker: PassTracker) -> None:
    """Makes a base model that generates text one that tells what it generates it from."""
    if isinstance(model, GenerationMixin):
        model.prompt_tracker = tracker  # type: ignore[attr-defined]
        put_front(model, PromptedWriter)


def uninstall_writer(model: Any) -> None:
    """Undoes ``install_writer``."""
    if isinstance(model, PromptedWriter):
        del model.prompt_tracker
        take_front(model)


def _call_of(given: Mapping[str, Any]) -> Call:
    prompts = next((given[name] for name in ("inputs_embeds", "input_ids", "inputs") if isinstance(given.get(name), Tensor)), None)
    if prompts is None or prompts.ndim < 2:
        return Call(width=1)  # it begins with one token of its own
    mask = given.get("attention_mask")
    return Call(len(prompts), prompts.shape[1], mask if isinstance(mask, Tensor) and mask.ndim == 2 else None)


def _guides_without_cache(given: Mapping[str, Any], default: Any) -> bool:
    def setting(name: str) -> Any:
        sources = (given.get(name), getattr(given.get("generation_config"), name, None), getattr(default, name, None))
        return next((value for value in sources if value is not None), None)

    return setting("guidance_scale") not in (None, 1) and setting("use_cache") is False
