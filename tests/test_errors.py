"""Errors of the machine and errors of user code."""

import pytest

from cnntrain.errors import explain_machine, is_from_user_code, suggest


def test_a_full_disk_is_a_machine_error() -> None:
    def user_code() -> None:
        raise OSError(28, "No space left on device", "mine.bin")

    with pytest.raises(OSError, match="No space") as caught:
        user_code()
    assert not is_from_user_code(caught.value)
    with pytest.raises(OSError, match="denied") as caught:
        exec("raise PermissionError(13, 'denied')", {})
    assert is_from_user_code(caught.value)


def test_machine_errors_are_explained() -> None:
    assert explain_machine(OSError(28, "No space left on device", "mine.bin")) == "mine.bin: No space left on device"
    assert str(explain_machine(MemoryError())).startswith("out of memory")
    assert "worker" in str(explain_machine(RuntimeError("DataLoader worker (pid 1) is killed")))
    assert explain_machine(RuntimeError("shapes differ")) is None


def test_the_nearest_name_is_suggested() -> None:
    assert "'lenet5'" in suggest("lenet", ["lenet5", "mlp"]) and suggest("x", ["lenet5", "mlp"]) == ""
