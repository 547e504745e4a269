"""Events, read with TensorBoard's own reader."""

import warnings
from pathlib import Path

import pytest

from cnntrain.plots import curves
from cnntrain.report import tensorboard
from cnntrain.report.tensorboard import TensorBoardWriter


def read(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def test_scalars(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as events:
        for step in range(5):
            events.scalars({"train/loss": 2.0 - step / 4, "lr": 0.1}, step)
        events.scalars({}, 9)
    points = read(tmp_path).Scalars("train/loss")
    assert [(p.step, p.value) for p in points] == [(s, 2.0 - s / 4) for s in range(5)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, -1e300])
def test_any_float_is_accepted(tmp_path: Path, value: float) -> None:
    with TensorBoardWriter(tmp_path) as events:
        events.scalars({"loss": value}, 1)
    assert len(read(tmp_path).Scalars("loss")) == 1


def test_a_figure_is_a_png_of_its_size(tmp_path: Path) -> None:
    figure = curves.plot_training_curves([{"epoch": 0, "train/loss": 1.0, "val/loss": 2.0}])
    with TensorBoardWriter(tmp_path) as events:
        events.figure("curves", figure, 3)
    image = read(tmp_path).Images("curves")[0]
    assert image.encoded_image_string.startswith(b"\x89PNG")
    assert (image.step, image.width, image.height) == (3, *figure.canvas.get_width_height())


def test_text(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as events:
        events.text("config", "seed: 0\nepochs: 3")
    reader = read(tmp_path)
    assert reader.Tensors("config/text_summary")[0].tensor_proto.string_val[0] == b"    seed: 0\n    epochs: 3\n"
    assert reader.SummaryMetadata("config/text_summary").plugin_data.plugin_name == "text"


def test_a_resumed_run_hides_the_events_of_repeated_steps(tmp_path: Path) -> None:
    with TensorBoardWriter(tmp_path) as events:
        for step in range(10):
            events.scalars({"loss": 1.0}, step)
    with TensorBoardWriter(tmp_path, purge_step=6) as events:
        for step in range(6, 12):
            events.scalars({"loss": 2.0}, step)
    points = read(tmp_path).Scalars("loss")
    assert [p.step for p in points] == list(range(12))
    assert [p.value for p in points] == [1.0] * 6 + [2.0] * 6


def hparams_rows(logdir: Path) -> list[dict]:
    """Return the rows of the HParams tab, as the plugin sends them to the browser."""
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import hparams_plugin
    from werkzeug.test import Client

    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(logdir))
    multiplexer.Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(logdir))
    plugin = hparams_plugin.HParamsPlugin(base_plugin.TBContext(data_provider=provider, multiplexer=multiplexer))
    apps = plugin.get_plugin_apps()
    experiment = Client(apps["/experiment"]).post("/", json={}).get_json(force=True)
    columns = [{"metric": info["name"], "includeInResult": True} for info in experiment["metricInfos"]]
    columns += [{"hparam": info["name"], "includeInResult": True} for info in experiment["hparamInfos"]]
    request = {
        "startIndex": 0,
        "sliceSize": 10,
        "allowedStatuses": ["STATUS_SUCCESS", "STATUS_RUNNING", "STATUS_UNKNOWN"],
        "colParams": columns,
    }
    return Client(apps["/session_groups"]).post("/", json=request).get_json(force=True)["sessionGroups"]


def test_the_hparams_tab_has_one_row_per_run_with_its_metrics(tmp_path: Path) -> None:
    for number, name in enumerate(("one", "two")):
        with TensorBoardWriter(tmp_path / name) as events:
            rate = 0.1 * (number + 1)
            settings = {"optimizer.lr": rate, "model": "lenet5", "channels_last": True, "steps": None}
            events.hparams(settings, ["best/val/top1"])
            events.scalars({"val/top1": 0.5}, 10)
            events.scalars({"best/val/top1": 0.9 + number / 100}, 10)
            events.finish()
    groups = hparams_rows(tmp_path)
    assert sorted(session["name"] for group in groups for session in group["sessions"]) == ["one", "two"]
    two = next(group for group in groups if group["sessions"][0]["name"] == "two")
    assert two["hparams"] == {"optimizer.lr": 0.2, "model": "lenet5", "channels_last": True, "steps": "null"}
    assert two["hparams"]["channels_last"] is True  # not a number: the tab shows a checkbox
    assert [value["value"] for value in two["metricValues"]] == [pytest.approx(0.91)]
    assert two["sessions"][0]["status"] == "STATUS_SUCCESS"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"], "no sub-runs"


def test_write_errors_are_reported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    monkeypatch.setattr(tensorboard, "_RETRY_S", -1.0)  # try again immediately
    events = TensorBoardWriter(blocked / "run")
    with pytest.warns(UserWarning, match="cannot write"):
        events.scalars({"loss": 1.0}, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events.scalars({"loss": 1.0}, 1)
        events.flush()
        blocked.unlink()
        events.scalars({"loss": 3.0}, 2)
        events.close()
        events.scalars({"loss": 3.0}, 3)
    assert [p.step for p in read(blocked / "run").Scalars("loss")] == [2]


def test_a_new_file_is_started_after_a_write_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorboard, "_RETRY_S", -1.0)
    events = TensorBoardWriter(tmp_path)
    events.scalars({"loss": 1.0}, 0)
    events.flush()

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        flush = close = lambda self: None

    events._writer.close()
    events._writer = Full()
    with pytest.warns(UserWarning, match="No space left"):
        events.scalars({"loss": 1.0}, 1)
    events.scalars({"loss": 1.0}, 2)
    events.close()
    assert [p.step for p in read(tmp_path).Scalars("loss")] == [0, 2]
