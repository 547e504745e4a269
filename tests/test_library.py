"""cnntrain inside a host program: what it changes in the process is changed back."""

import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import cnntrain
from cnntrain.cli import main
from cnntrain.plots.figure import log_plot_errors, new_figure
from cnntrain.train.device import prepare_torch, preserve_process_settings

QUICK = ["data.limit=60", "steps=1", "log.figures=false", "log.tensorboard=false"]


def test_compose_restores_hydra(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2", job_name="host"):
        before = GlobalHydra.instance().hydra
        cnntrain.compose("epochs=3")
        with pytest.raises(cnntrain.errors.UserError):
            cnntrain.compose("epohcs=3")
        assert before is not None and GlobalHydra.instance().hydra is before


@pytest.mark.parametrize("function", [cnntrain.train, cnntrain.overfit])
@pytest.mark.parametrize("wrong", ["model=mlp", None, {"model": "mlp"}])
def test_settings_come_from_compose(function, wrong: object) -> None:
    with pytest.raises(TypeError, match="compose"):
        function(wrong)


def process_settings() -> dict[str, object]:
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
        "flushes": not bool(torch.tensor(1e-310, dtype=torch.float64) * 1),
        "filters": list(warnings.filters),
        "showwarning": warnings.showwarning,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def test_train_restores_process_settings() -> None:
    torch.manual_seed(123)
    torch.set_float32_matmul_precision("highest")
    before = process_settings()
    with preserve_process_settings():
        prepare_torch(threads=2, deterministic=False)
        assert process_settings() != before
    cnntrain.train(cnntrain.compose(*QUICK, "threads=2", "run_dir=run"))
    assert process_settings() == before


def test_os_errors_of_user_code_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "my_failing_net.py").write_text(
        "import torch\n\nclass Net(torch.nn.Module):\n    def __init__(self):\n        open('lookup-table.bin')\n"
    )
    (tmp_path / "model" / "mine.yaml").write_text("_target_: my_failing_net.Net\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(FileNotFoundError, match="lookup-table"):
        main(["--config-dir", str(tmp_path), "model=mine", *QUICK])


def test_plot_errors_do_not_end_a_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("latex was not found")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", broken)
    monkeypatch.setattr(logging.getLogger("cnntrain"), "propagate", True)
    assert main([*QUICK[:2], "run_dir=run"]) == 0
    assert Path("run/results.json").is_file()
    assert not list(Path("run").glob("figures/*.png"))
    assert "latex was not found" in caplog.text
    with pytest.raises(cnntrain.errors.StoppedError), log_plot_errors("x"):
        raise cnntrain.errors.StoppedError(2, "stopped")


def test_a_users_matplotlibrc_does_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 17)
    with new_figure(2, 2) as figure:
        text = figure.text(0, 0, r"$\broken{ $")  # names of files may hold dollar signs
        assert not text.get_usetex() and matplotlib.rcParams["lines.linewidth"] != 17
        figure.canvas.draw()
    assert matplotlib.rcParams["text.usetex"] is True
