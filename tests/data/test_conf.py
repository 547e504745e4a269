"""The YAML files of conf/data contain every key with the default of its class and a comment."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml

from cnntrain.config.compose import compose
from cnntrain.config.schema import DataSettings, conf_folder
from cnntrain.data.examples import Source

FILES = sorted(path for path in (conf_folder() / "data").glob("*.yaml"))
COMMON = yaml.safe_load((conf_folder() / "config.yaml").read_text())["data"]
SAYS_MORE = {"camvid", "faces68", "dlib_xml"}  # one dataset of a kind: its own values


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_argument_is_in_the_yaml_file_with_its_default(path: Path):
    content = yaml.safe_load(path.read_text())
    module, _, name = content.pop("_target_").rpartition(".")
    source = getattr(importlib.import_module(module), name)
    assert issubclass(source, Source)
    defaults = content.pop("defaults")
    assert defaults[0] == "_self_"
    parameters = inspect.signature(source).parameters
    assert set(content) == set(parameters)
    if path.stem not in SAYS_MORE:
        given = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
        if content.get("size", 0) is None:  # the class's own, which the comment tells; or that of pretrained weights
            content["size"] = int(re.findall(r"^size: null .*; null: (\d+)", path.read_text(), re.M)[0])
        assert {key: content[key] for key in given} == given


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_has_a_comment(path: Path):
    for line in path.read_text().splitlines():
        if re.match(r"[a-z]", line) and not line.startswith("defaults:"):
            assert "  # " in line, line


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_data_set_selects_its_task_and_augmentation_and_the_user_can_override_them(path: Path):
    composed = compose("config", [f"data={path.stem}"])
    assert set(COMMON) <= set(composed["data"])
    content = yaml.safe_load(path.read_text())
    task = next(entry["override /task@_global_.task"] for entry in content["defaults"] if "task" in str(entry))
    assert composed["task"] == compose("config", [f"task={task}"])["task"]
    other = "segmentation" if task != "segmentation" else "classification"
    chosen = compose("config", [f"data={path.stem}", f"task={other}", "augment=none"])
    assert chosen["task"]["_target_"] != composed["task"]["_target_"]
    assert chosen["augment"] == compose("config", ["augment=none"])["augment"]


def test_the_common_keys_are_the_fields_of_data_settings():
    assert set(COMMON) == set(DataSettings.__dataclass_fields__)
