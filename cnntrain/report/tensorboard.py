"""TensorBoard events of one run, written with TensorBoard's own record writer.

torch's SummaryWriter is not used: it writes in a thread that prints a traceback and loses events if the disk is full,
it opens the event file four times per record, and its HParams row is a separate run with booleans as numbers.
"""

from __future__ import annotations

import math
import os
import struct
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnntrain.io import safe_files
from cnntrain.plots.figure import to_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FLUSH_S = 10.0  # between writes to disk
_RETRY_S = 60.0  # after a write error
_MAX_FLOAT32 = 3.4028234e38


class TensorBoardWriter:
    """Write scalars, figures, text and the run's row in the HParams tab. Use as a context manager.

    Write errors (a full disk, a lost mount) never end a run: the first one is reported as a warning, events until the
    next attempt are lost, and a new file is started after a minute.

    Args:
        folder: the run folder; created if missing.
        purge_step: when a run is resumed, the first step that is repeated. TensorBoard then hides the events of this
            and later steps in earlier files.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self.folder, self._purge_step = folder, purge_step
        self._writer: Any = None
        self._flushed_at, self._retry_at = time.monotonic(), 0.0
        self._warned = self._closed = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one value per tag, for example `{"train/loss": 0.3}`; the part before "/" groups the charts."""
        if values:
            self._write(step, *({"tag": tag, "simple_value": _clamp_to_float32(each)} for tag, each in values.items()))

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a matplotlib figure as an image."""
        data = to_png(figure)
        width, height = struct.unpack(">II", data[16:24])  # from the PNG header
        image = {"width": width, "height": height, "colorspace": 3, "encoded_image_string": data}
        self._write(step, {"tag": tag, "image": image})

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write preformatted text, for example a YAML file or a command."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # a code block in Markdown
        tensor = {"dtype": "DT_STRING", "string_val": [indented.encode()], "tensor_shape": {"dim": [{"size": 1}]}}
        plugin = _tensorboard("plugins.text.metadata")
        summary_metadata = plugin.create_summary_metadata(display_name=tag, description="")
        self._write(step, {"tag": f"{tag}/text_summary", "metadata": summary_metadata, "tensor": tensor})

    def hparams(self, settings: Mapping[str, object], metrics: Iterable[str]) -> None:
        """Write the run's row in the HParams tab.

        Args:
            settings: flat mapping from key (`optimizer.lr`) to value; values other than numbers, text and booleans are
                written as text.
            metrics: tags of this run's scalars to show as columns with their last values.
        """
        infos = []
        start = _tensorboard("plugins.hparams.plugin_data_pb2").SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            if isinstance(value, bool):
                kind, field = "BOOL", "bool_value"
            elif isinstance(value, int | float):
                kind, field = "FLOAT64", "number_value"
            else:
                kind, field, value = "STRING", "string_value", "null" if value is None else str(value)
            infos.append({"name": name, "type": f"DATA_TYPE_{kind}"})
            setattr(start.hparams[name], field, value)
        experiment = {"hparam_infos": infos, "metric_infos": [{"name": {"tag": tag}} for tag in metrics]}
        self._write_hparams("EXPERIMENT_TAG", experiment=experiment)
        self._write_hparams("SESSION_START_INFO_TAG", session_start_info=start)

    def finish(self, success: bool = True) -> None:
        """Write the status of the finished run for the HParams tab."""
        end = {"status": "STATUS_SUCCESS" if success else "STATUS_FAILURE", "end_time_secs": time.time()}
        self._write_hparams("SESSION_END_INFO_TAG", session_end_info=end)

    def flush(self) -> None:
        """Write pending events to disk."""
        with self._warning_once():
            if self._writer is not None:
                self._writer.flush()
                self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Write pending events and close the file; later calls have no effect."""
        self.flush()
        self._closed = True
        with self._warning_once():
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_hparams(self, tag: str, **content: Any) -> None:
        metadata, data = _tensorboard("plugins.hparams.metadata"), _tensorboard("plugins.hparams.plugin_data_pb2")
        summary_metadata = metadata.create_summary_metadata(data.HParamsPluginData(**content))
        self._write(0, {"tag": getattr(metadata, tag), "metadata": summary_metadata, "tensor": metadata.NULL_TENSOR})

    def _write(self, step: int, *values: Mapping[str, Any]) -> None:
        """Write a Summary of `values` (fields of Summary.Value)."""
        if self._closed or (self._writer is None and time.monotonic() < self._retry_at):
            return
        with self._warning_once():
            writer = self._writer or self._open()
            writer.write(_event(step=step, summary={"value": values}))
        if time.monotonic() - self._flushed_at > _FLUSH_S:
            self.flush()

    def _open(self) -> Any:
        """Start a new file and return its writer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        seconds, nanoseconds = divmod(time.time_ns(), 10**9)
        # TensorBoard reads the files in the order of their names, so the name starts with the time.
        name = f"events.out.tfevents.{seconds:010d}.{nanoseconds:09d}.{os.getpid()}"
        writer_type = _tensorboard("summary.writer.record_writer").RecordWriter
        self._writer = writer_type(safe_files.open_new(self.folder / name))
        self._writer.write(_event(file_version="brain.Event:2"))
        if self._purge_step is not None:
            self._writer.write(_event(step=self._purge_step, session_log={"status": "START"}))
        self._writer.flush()
        self._purge_step = None
        return self._writer

    @contextmanager
    def _warning_once(self) -> Iterator[None]:
        """Catch write errors. The file may end with an incomplete record, so the next attempt starts a new file."""
        try:
            yield
        except OSError as error:
            writer, self._writer = self._writer, None
            self._retry_at = time.monotonic() + _RETRY_S
            if writer is not None:
                with suppress(OSError):
                    writer.close()
            if not self._warned:
                self._warned = True
                warnings.warn(f"cannot write TensorBoard events to {self.folder}: {error}", stacklevel=5)


def _tensorboard(module: str) -> Any:
    """Import a module of TensorBoard. Its protobuf classes are created at run time, so they have no static types."""
    return import_module(f"tensorboard.{module}")


def _event(**content: Any) -> bytes:
    """Serialize an Event with the current time."""
    return _tensorboard("compat.proto.event_pb2").Event(wall_time=time.time(), **content).SerializeToString()


def _clamp_to_float32(value: float) -> float:
    """Replace values beyond the range of float32 by infinity, because protobuf rejects them."""
    return value if math.isnan(value) or abs(value) <= _MAX_FLOAT32 else math.copysign(math.inf, value)
