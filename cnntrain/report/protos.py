"""TensorBoard's protocol buffers, imported when first needed. Their modules are made at run time, so no type
checker knows what is in them; here they are collected by name."""

from functools import cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any


@cache
def protos() -> SimpleNamespace:
    """Message types and plugin modules by name."""

    def module(name: str) -> Any:
        return import_module(f"tensorboard.{name}")

    return SimpleNamespace(
        Event=module("compat.proto.event_pb2").Event,
        Summary=module("compat.proto.summary_pb2").Summary,
        Experiment=module("plugins.hparams.api_pb2").Experiment,
        MetricName=module("plugins.hparams.api_pb2").MetricName,
        DataType=module("plugins.hparams.api_pb2").DataType,
        Status=module("plugins.hparams.api_pb2").Status,
        HParamsPluginData=module("plugins.hparams.plugin_data_pb2").HParamsPluginData,
        SessionStartInfo=module("plugins.hparams.plugin_data_pb2").SessionStartInfo,
        SessionEndInfo=module("plugins.hparams.plugin_data_pb2").SessionEndInfo,
        hparams=module("plugins.hparams.metadata"),
        text=module("plugins.text.metadata"),
    )
