"""What counts as an outcome of what is fuzzed."""

from collections.abc import Callable
from typing import Any

import pytest

from cnntrain.errors import CnntrainError


@pytest.fixture
def outcome() -> Callable[..., int]:
    def outcome(call: Callable[..., Any], *arguments: Any) -> int:
        """0, or the exit code that the command would end with; anything else that is raised is a finding."""
        try:
            call(*arguments)
        except CnntrainError as refusal:
            said, code = str(refusal).strip(), refusal.exit_code
        else:
            said, code = "done", 0
        assert said, "a message without words"
        return code

    return outcome
