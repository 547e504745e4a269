"""TensorBoard events, written straight into the run's folder with TensorBoard's own record writer.

No thread and no queue: a record is some hundred bytes in a buffered file, and an error shows where it
happens.
"""

from __future__ import annotations

import os
import struct
import time
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnntrain.io import safe_files as files
from cnntrain.plots.curves import png
from cnntrain.report.protos import protos

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RETRY_S = 60.0


class Events:
    """One run's events: scalars, pictures, text and the run's row in the HParams tab.

    A disk that is full or gone is warned of once, and the training goes on; after a minute a new file is
    tried.

    Args:
        folder: the run's folder; made where it isn't there.
        purge_step: when a run resumes, the step it resumes from: TensorBoard then forgets what earlier files
            said of this and later steps.
        flush_s: seconds after which what was written is handed to the operating system.
    """

    def __init__(self, folder: Path | str, purge_step: int | None = None, flush_s: float = 10.0) -> None:
        self.folder = Path(folder)
        self._purge_step = purge_step
        self._flush_s = flush_s
        self._writer: Any = None
        self._flushed = time.monotonic()
        self._retry_at = 0.0
        self._warned = False
        self._closed = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """One value a tag, e.g. `{'train/loss': 0.3}`; a tag's part before '/' is its group of charts."""
        if values:
            self._write(
                step, *({"tag": tag, "simple_value": _single(value)} for tag, value in values.items())
            )

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """A matplotlib figure as an image."""
        self.image(tag, png(figure), step)

    def image(self, tag: str, data: bytes, step: int) -> None:
        """A picture given as PNG bytes."""
        width, height = struct.unpack(">II", data[16:24])  # the header of every PNG
        image = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": data}
        self._write(step, {"tag": tag, "image": image})

    def text(self, tag: str, text: str, step: int = 0, preformatted: bool = True) -> None:
        """Text as it stands (a YAML file, a command), or as Markdown."""
        if preformatted:
            text = "".join(f"    {line}\n" for line in text.splitlines())
        tensor = {"dtype": "DT_STRING", "string_val": [text.encode()], "tensor_shape": {"dim": [{"size": 1}]}}
        about = protos().text.create_summary_metadata(display_name=tag, description="")
        self._write(step, {"tag": f"{tag}/text_summary", "metadata": about, "tensor": tensor})

    def hparams(self, settings: Mapping[str, object], metrics: Iterable[str]) -> None:
        """The run's row in the HParams tab, in the run's own folder: one row a run.

        Args:
            settings: flat, by key (`optimizer.lr`); what is no number, text or truth value is shown as text.
            metrics: tags of scalars (of this run, at any time) to show as columns: the tab takes their last
                values.
        """
        plugin = protos().hparams
        experiment, start = protos().Experiment(), protos().SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            experiment.hparam_infos.add(name=name, type=_fill(start.hparams[name], value))
        for tag in metrics:
            experiment.metric_infos.add(name=protos().MetricName(tag=tag))
        self._plugin_record(plugin.EXPERIMENT_TAG, experiment=experiment)
        self._plugin_record(plugin.SESSION_START_INFO_TAG, session_start_info=start)

    def finish(self, success: bool = True) -> None:
        """Tell the HParams tab how the run ended."""
        status = protos().Status.Value("STATUS_SUCCESS" if success else "STATUS_FAILURE")
        end = protos().SessionEndInfo(status=status, end_time_secs=time.time())
        self._plugin_record(protos().hparams.SESSION_END_INFO_TAG, session_end_info=end)
        self.flush()

    def flush(self) -> None:
        """Make everything visible to readers."""
        if self._writer is not None:
            try:
                self._writer.flush()
                self._flushed = time.monotonic()
            except OSError as error:
                self._fail(error)

    def close(self) -> None:
        """Write out and end; further calls are ignored."""
        self.flush()
        self._closed = True
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._fail(error)
            self._writer = None

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plugin_record(self, tag: str, **content: Any) -> None:
        about = protos().hparams.create_summary_metadata(protos().HParamsPluginData(**content))
        self._write(0, {"tag": tag, "metadata": about, "tensor": protos().hparams.NULL_TENSOR})

    def _write(self, step: int, *values: Mapping[str, Any]) -> None:
        if self._closed or (self._writer is None and time.monotonic() < self._retry_at):
            return
        try:
            writer = self._writer or self._open()
            writer.write(_event(step=step, summary=protos().Summary(value=values)))
            if time.monotonic() - self._flushed > self._flush_s:
                writer.flush()
                self._flushed = time.monotonic()
        except OSError as error:
            self._fail(error)

    def _open(self) -> Any:
        """Begin a new file, which first says from which step on it replaces the earlier ones."""
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # The name starts with the time, for readers take files in the order of their names.
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{os.getpid()}"
        self._writer = RecordWriter(files.open_new(self.folder / name))
        self._writer.write(_event(file_version="brain.Event:2"))
        if self._purge_step is not None:
            self._writer.write(_event(step=self._purge_step, session_log={"status": "START"}))
        self._writer.flush()
        self._purge_step = None
        return self._writer

    def _fail(self, error: OSError) -> None:
        """Warn once. The file may end in half a record, so the next try begins a new one."""
        writer, self._writer = self._writer, None
        self._retry_at = time.monotonic() + _RETRY_S
        if writer is not None:
            with suppress(OSError):
                writer.close()
        if not self._warned:
            self._warned = True
            warnings.warn(f"TensorBoard events in {self.folder} are not being written: {error}", stacklevel=4)


def _event(**content: Any) -> bytes:
    return protos().Event(wall_time=time.time(), **content).SerializeToString()


def _single(value: float) -> float:
    """The value within single precision, which refuses what is larger."""
    value = float(value)
    return value if abs(value) < 3.4e38 or value != value else float("inf") if value > 0 else float("-inf")


def _fill(field: Any, value: object) -> int:
    """Put a setting into a protobuf value; the type it has there."""
    if isinstance(value, bool):
        field.bool_value = value
        return protos().DataType.Value("DATA_TYPE_BOOL")
    if isinstance(value, int | float):
        field.number_value = value
        return protos().DataType.Value("DATA_TYPE_FLOAT64")
    field.string_value = "null" if value is None else str(value)
    return protos().DataType.Value("DATA_TYPE_STRING")
