"""The fixture that all tests of routed adapters share."""

from collections.abc import Callable
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from routed_models import routed_base, routed_config, trained_routers
from tiny_models import random_adapter


@pytest.fixture
def routed() -> Callable[..., PeftModel]:
    """routed(family, **RoutedLoraConfig) -> a tiny model in evaluation mode with a random routed adapter."""

    def make(family: str = "llama", trained: bool = True, **settings: Any) -> PeftModel:
        model = get_peft_model(routed_base(family), routed_config(family, **settings))
        return (trained_routers(random_adapter(model)) if trained else model).eval()

    return make
