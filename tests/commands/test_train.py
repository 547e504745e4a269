"""What a training says at its end, and when it goes on."""

import json
import shlex
from pathlib import Path

import pytest

from cnntrain.cli import main

QUICK = ("data.limit=60", "batch_size=16", "threads=1", "log.figures=false", "log.tensorboard=false", "model=mlp")
Said = pytest.CaptureFixture[str]
NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_outputs, image_size):
        super().__init__()
        self.fc = nn.Linear(image_size[0] * image_size[1], num_outputs)
    def forward(self, x):
        return self.fc(x.flatten(1))
"""


def test_early_stopping_is_logged_and_stored(capsys: Said) -> None:
    stuck = ("optimizer=sgd", "optimizer.lr=1e-12", "early_stopping=2", "epochs=9", "run_dir=r")
    assert main([*QUICK, *stuck]) == 0
    results = json.loads(Path("r/results.json").read_text())
    assert results["ended_by"] == "early_stopping" and results["epochs"] == 3 and results["best"]["epoch"] == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("early stopping")]
    assert "epoch 3 of 9" in said and "for 2 epochs" in said and "val/top1" in said and "epoch is 1" in said


def test_a_resumed_training_logs_its_progress(capsys: Said) -> None:
    assert main([*QUICK, "epochs=2", "run_dir=r"]) == 0
    assert json.loads(Path("r/results.json").read_text())["ended_by"] == "epochs"
    assert main([*QUICK, "epochs=3", "run_dir=r", "resume=auto"]) == 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resume: state from")]
    assert "after epoch 2, step 8" in said

    Path("r/results.json").write_text('{"parameters": 1, "be')  # a kill, or a full disk
    assert main([*QUICK, "epochs=3", "run_dir=r", "resume=auto"]) == 0
    assert json.loads(Path("r/results.json").read_text())["epochs"] == 3


def test_printed_commands_can_be_run(capsys: Said) -> None:
    Path("my nets/model").mkdir(parents=True)
    Path("my nets/ownnet_printed.py").write_text(NET)
    Path("my nets/model/own.yaml").write_text("_target_: ownnet_printed.Net\n")
    asked = ["--config-dir", "my nets", *QUICK[:-1], "model=own", "epochs=1", "run_dir='my runs/1'"]
    assert main(asked) == 0
    lines = [line.strip().removeprefix("look next:").strip() for line in capsys.readouterr().out.splitlines()]
    (evaluate,) = [line for line in lines if line.startswith("cnntrain evaluate")]
    (board,) = [line for line in lines if line.startswith("tensorboard")]
    assert main(shlex.split(evaluate)[1:]) == 0
    assert Path(shlex.split(board)[-1]).is_dir()


def test_the_printed_evaluation_names_an_existing_split(capsys: Said, tmp_path: Path) -> None:
    from PIL import Image

    for split, count in (("train", 6), ("valid", 3)):
        for name, shade in (("dark", 20), ("light", 230)):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (12, 12), shade + i).save(tmp_path / "photos" / split / name / f"{i}.png")
    own = ("data=image_folder", "data.root=photos", "data.size=12", "epochs=1", "batch_size=4", "threads=1")
    assert main([*own, "model=mlp", "log.figures=false", "log.tensorboard=false", "run_dir=r"]) == 0
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "cnntrain evaluate" in each]
    words = shlex.split(line.partition("cnntrain")[2])
    assert "split=val" in words
    assert main([*words, "run_dir=e"]) == 0
