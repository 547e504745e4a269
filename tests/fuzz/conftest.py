"""Exit codes of calls with arbitrary input."""

from collections.abc import Callable
from typing import Any

import pytest

from cnntrain.errors import CnntrainError


@pytest.fixture
def exit_code() -> Callable[..., int]:
    def exit_code(call: Callable[..., Any], *arguments: Any) -> int:
        """Return 0, or the exit code of a CnntrainError; other exceptions are failures."""
        try:
            call(*arguments)
        except CnntrainError as error:
            message, code = str(error).strip(), error.exit_code
        else:
            message, code = "no error", 0
        assert message, "the message is empty"
        return code

    return exit_code
