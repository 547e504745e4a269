"""TensorBoard events of one run, written by torch's SummaryWriter."""

from __future__ import annotations

import math
import struct
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnntrain.plots.curves import png

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

_RETRY_S = 60.0
_MAX_FLOAT32 = 3.4028234e38


class TensorBoardWriter:
    """Write scalars, figures, text and the run's row in the HParams tab. Use as a context manager.

    Write errors (a full disk, a lost mount) never end a run: the first one is reported as a warning, events until the
    next attempt are lost, and a new file is started after a minute.

    Args:
        folder: the run folder; created if missing.
        purge_step: when a run is resumed, the first step that is repeated. TensorBoard then hides the events of this
            and later steps in earlier files.
        flush_s: seconds between writes to disk.
    """

    def __init__(self, folder: Path | str, purge_step: int | None = None, flush_s: int = 10) -> None:
        self.folder = Path(folder)
        self._purge_step = purge_step
        self._flush_s = flush_s
        self._writer: SummaryWriter | None = None
        self._retry_at = 0.0
        self._warned = False
        self._closed = False

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write one value per tag, for example `{"train/loss": 0.3}`; the part before "/" groups the charts."""

        def add(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, _clamp_to_float32(value), step)

        if values:
            self._write(add)

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a matplotlib figure as an image."""
        Summary = _tensorboard("compat.proto.summary_pb2").Summary
        data = png(figure)
        width, height = struct.unpack(">II", data[16:24])  # from the PNG header
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        self._write(lambda writer: _file_writer(writer).add_summary(summary, step))

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write preformatted text, for example a YAML file or a command."""
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # a code block in Markdown
        self._write(lambda writer: writer.add_text(tag, indented, step))

    def hparams(self, settings: Mapping[str, object], metrics: Iterable[str]) -> None:
        """Write the run's row in the HParams tab.

        SummaryWriter.add_hparams is not used: it creates a second run, and it stores booleans as numbers.

        Args:
            settings: flat mapping from key (`optimizer.lr`) to value; values other than numbers, text and booleans are
                written as text.
            metrics: tags of this run's scalars to show as columns with their last values.
        """
        api, metadata = _tensorboard("plugins.hparams.api_pb2"), _tensorboard("plugins.hparams.metadata")
        experiment = api.Experiment()
        start = _tensorboard("plugins.hparams.plugin_data_pb2").SessionStartInfo(start_time_secs=time.time())
        for name, value in settings.items():
            experiment.hparam_infos.add(name=name, type=_set_value(start.hparams[name], value))
        for tag in metrics:
            experiment.metric_infos.add(name=api.MetricName(tag=tag))
        self._write_hparams(metadata.EXPERIMENT_TAG, experiment=experiment)
        self._write_hparams(metadata.SESSION_START_INFO_TAG, session_start_info=start)

    def finish(self, success: bool = True) -> None:
        """Write the status of the finished run for the HParams tab."""
        status = _tensorboard("plugins.hparams.api_pb2").Status.Value(
            "STATUS_SUCCESS" if success else "STATUS_FAILURE"
        )
        end = _tensorboard("plugins.hparams.plugin_data_pb2").SessionEndInfo(
            status=status, end_time_secs=time.time()
        )
        self._write_hparams(
            _tensorboard("plugins.hparams.metadata").SESSION_END_INFO_TAG, session_end_info=end
        )

    def flush(self) -> None:
        """Write pending events to disk."""
        if self._writer is not None:
            self._write(lambda writer: writer.flush())

    def close(self) -> None:
        """Write pending events and close the file; later calls have no effect."""
        if self._writer is not None:
            self._write(lambda writer: writer.close())
        self._writer, self._closed = None, True

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_hparams(self, tag: str, **content: Any) -> None:
        Summary = _tensorboard("compat.proto.summary_pb2").Summary
        metadata = _tensorboard("plugins.hparams.metadata")
        about = metadata.create_summary_metadata(
            _tensorboard("plugins.hparams.plugin_data_pb2").HParamsPluginData(**content)
        )
        value = Summary.Value(tag=tag, metadata=about, tensor=metadata.NULL_TENSOR)
        self._write(lambda writer: _file_writer(writer).add_summary(Summary(value=[value]), 0))

    def _write(self, add: Callable[[SummaryWriter], object]) -> None:
        """Call `add` with the open writer. SummaryWriter's thread raises its errors in the next call."""
        if self._closed or (self._writer is None and time.monotonic() < self._retry_at):
            return
        try:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self.folder.mkdir(parents=True, exist_ok=True)
                self._writer = SummaryWriter(
                    str(self.folder), purge_step=self._purge_step, flush_secs=self._flush_s
                )
                self._purge_step = None
            add(self._writer)
        except OSError as error:
            self._handle_error(error)

    def _handle_error(self, error: OSError) -> None:
        """Warn once. The file may end with an incomplete record, so the next attempt starts a new file."""
        writer, self._writer = self._writer, None
        self._retry_at = time.monotonic() + _RETRY_S
        if writer is not None:
            with suppress(OSError):
                writer.close()
        if not self._warned:
            self._warned = True
            warnings.warn(f"cannot write TensorBoard events to {self.folder}: {error}", stacklevel=4)


def _tensorboard(module: str) -> Any:
    """Import a module of TensorBoard. Its protobuf classes are created at run time, so they have no static types."""
    return import_module(f"tensorboard.{module}")


def _file_writer(writer: SummaryWriter) -> Any:
    """Return the FileWriter of a SummaryWriter, for summaries that SummaryWriter has no method for."""
    return writer._get_file_writer()


def _clamp_to_float32(value: float) -> float:
    """Replace values beyond the range of float32 by infinity, because protobuf rejects them."""
    return value if math.isnan(value) or abs(value) <= _MAX_FLOAT32 else math.copysign(math.inf, value)


def _set_value(field: Any, value: object) -> int:
    """Store a setting in a protobuf Value and return its DataType."""
    DataType = _tensorboard("plugins.hparams.api_pb2").DataType
    if isinstance(value, bool):
        field.bool_value = value
        return DataType.Value("DATA_TYPE_BOOL")
    if isinstance(value, int | float):
        field.number_value = value
        return DataType.Value("DATA_TYPE_FLOAT64")
    field.string_value = "null" if value is None else str(value)
    return DataType.Value("DATA_TYPE_STRING")
