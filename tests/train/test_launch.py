"""The pipe between rank 0 and the launcher."""

from cnntrain.errors import MachineError, UserError
from cnntrain.train.launch import _on_epoch_pipe


def test_every_row_is_answered_with_an_error_or_none() -> None:
    def on_epoch(row: dict[str, float]) -> None:
        if row["epoch"] == 1:
            raise OSError("the disk is full")
        if row["epoch"] == 2:
            raise UserError("no such thing")

    with _on_epoch_pipe(on_epoch) as end:
        assert end is not None
        answers = []
        for epoch in range(4):
            end.send({"epoch": epoch})
            assert end.poll(10)
            answers.append(end.recv())
    assert answers[0] is None and answers[3] is None and isinstance(answers[2], UserError)
    assert isinstance(answers[1], MachineError) and "the disk is full" in str(answers[1])
