"""Classes and functions that a config may name, and their arguments."""

import importlib
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from cnntrain.config.instantiate import BUILDERS, ROLES, build, resolve
from cnntrain.errors import UserError

REFUSED = [
    ("model", "torch.load"),
    ("model", "torch.hub.load"),
    ("model", "torch.nn.init.zeros_"),
    ("model", "torch.nn.modules.module.register_module_forward_hook"),
    ("model", "torchvision.models.resnet18"),
    ("model", "torchvision.models.get_model"),
    ("model", "torchvision.models.vision_transformer.MLP"),  # a module, but one of torchvision.ops
    ("model", "timm.models.load_state_dict"),
    ("model", "timm.models.load_checkpoint"),
    ("model", "timm.models.create_model"),
    ("model", "timm.models._hub.load_custom_from_hf"),
    ("model", "torch.nn.functional.relu"),
    ("model", "torch.optim.SGD"),
    ("model", "os.system"),
    ("model", "cnntrain.models.pretrained._read_file"),
    ("model", "cnntrain.models.pretrained.read_tensors"),  # defined in cnntrain.io
    ("model", "cnntrain.models.resnet.cache"),  # defined in functools
    ("model", "cnntrain.models.torchvision.build"),
    ("model", "cnntrain.models.sequential.layers.LayerContext"),
    ("data", "cnntrain.data.files.download"),
    ("data", "cnntrain.data.cache.scan_files"),
    ("data", "cnntrain.data.decoder.ImageDecoder"),
    ("data", "cnntrain.data.examples._as_tensor"),
    ("data", "cnntrain.data.files.Path"),
    ("augment", "cnntrain.augment.color.normalize"),
    ("augment", "cnntrain.augment.pipeline.Pipeline"),
    ("task", "cnntrain.tasks.task.check_number"),
    ("optimizer", "builtins.eval"),
    ("optimizer", "torch.nn.Linear"),
    ("optimizer", "torch.optim.optimizer.defaultdict"),
    ("optimizer", "torch.optim.lr_scheduler.StepLR"),
    ("optimizer", "torch.optim.swa_utils.get_ema_avg_fn"),
    ("optimizer", "cnntrain.train.optim.build_optimizer"),
    ("schedule", "cnntrain.train.schedule.math"),
    ("schedule", "cnntrain.train.schedule.Within"),  # defined in cnntrain.config
]


@pytest.mark.parametrize(("role", "target"), REFUSED)
def test_targets_of_another_role_are_rejected(role: str, target: str) -> None:
    if target.startswith("timm"):
        pytest.importorskip("timm")
    module, _, name = target.rpartition(".")
    assert hasattr(importlib.import_module(module), name), "a name that does not exist is refused in any case"
    with pytest.raises(UserError, match=r"_target_"):
        resolve({"_target_": target}, role, role)


def test_a_file_is_not_unpickled_by_a_function_of_a_package(own_folder: Path) -> None:
    pytest.importorskip("timm")

    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (own_folder / "touched",)

    Path("evil.pt").write_bytes(pickle.dumps(Touch()))
    node = {"_target_": "timm.models.load_state_dict", "checkpoint_path": "evil.pt", "weights_only": False}
    with pytest.raises(UserError):
        build(node, "model", "model")
    assert not Path("touched").exists()


TRANSFORMER = {"image_size": 8, "patch_size": 4, "num_layers": 1, "num_heads": 1, "hidden_dim": 4, "mlp_dim": 4}


@pytest.mark.parametrize(
    ("target", "arguments"),
    [("torch.nn.Linear", {"in_features": 2, "out_features": 3}), ("torchvision.models.VisionTransformer", TRANSFORMER)],
)
def test_module_classes_can_be_named(target: str, arguments: dict[str, Any]) -> None:
    assert isinstance(build({"_target_": target, **arguments}, "model", "model"), torch.nn.Module)


def test_every_builder_exists() -> None:
    for role, names in BUILDERS.items():
        for name in names:
            resolve({"_target_": name}, role, role)


@pytest.mark.parametrize("role", ROLES)
def test_packages_are_compared_by_their_whole_names(role: str) -> None:
    first = ROLES[role][0][0]
    with pytest.raises(UserError, match="is not allowed as"):  # without importing it
        resolve({"_target_": f"{first}evil.Net"}, role, role)


def test_a_trusted_package_does_not_make_its_imports_trusted(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("importing.py").write_text("from cnntrain.io.tensor_file import read_tensors\n\ndef own():\n    return 5\n")
    monkeypatch.syspath_prepend(str(own_folder))
    assert build({"_target_": "importing.own"}, "model", "model", ["importing"]) == 5
    with pytest.raises(UserError, match="is not allowed as"):
        resolve({"_target_": "importing.read_tensors"}, "model", "model", ["importing"])


@pytest.mark.parametrize("name", ["_partial_", "_args_", "_recursive_", "_convert_", "__class__", 5])
def test_argument_names_with_a_leading_underscore_are_rejected(name: Any) -> None:
    with pytest.raises(UserError, match="not a valid argument name"):
        resolve({"_target_": "torch.nn.Linear", name: True}, "model", "model")


@pytest.mark.parametrize("value", [2**63, -(2**63), float("inf"), float("-inf"), float("nan")])
def test_numbers_that_are_too_large_or_not_finite_are_rejected(value: float) -> None:
    with pytest.raises(UserError, match=r"^model\.in_features: "):
        resolve({"_target_": "torch.nn.Linear", "in_features": value}, "model", "model")
    resolve({"_target_": "torch.nn.Linear", "in_features": 2**63 - 1}, "model", "model")


def test_facts_replace_null_but_not_values() -> None:
    node = {"_target_": "torch.nn.Linear", "in_features": None, "bias": False}
    bound = resolve(node, "model", "model", in_features=2, out_features=3, bias=True, unknown=5)
    assert bound.keywords == {"in_features": 2, "out_features": 3, "bias": False}


def test_out_of_memory_is_not_reported_as_invalid_arguments(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("greedy.py").write_text("def own(message):\n    raise RuntimeError(message)\n")
    monkeypatch.syspath_prepend(str(own_folder))
    node = {"_target_": "greedy.own", "message": "CUDA out of memory"}
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory"):
        build(node, "model", "model", ["greedy"])
    with pytest.raises(UserError, match="refused its arguments: another"):
        build({**node, "message": "another"}, "model", "model", ["greedy"])


def test_nested_targets_and_interpolations_are_not_resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "told")
    node = {"_target_": "builtins.eval", "expression": "1"}
    layers = [node]
    bound = resolve(
        {
            "_target_": "cnntrain.models.sequential.parser.Sequential",
            "layers": layers,
            "values": {"a": "${oc.env:SECRET}"},
        },
        "model",
        "model",
    )
    assert isinstance(bound, partial)
    assert bound.keywords["layers"] == [node] and bound.keywords["values"]["a"] == "${oc.env:SECRET}"


def test_unknown_arguments_are_rejected_with_a_suggestion() -> None:
    node = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentun": 0.9}
    with pytest.raises(UserError, match=r"optimizer\.momentun: .* did you mean 'momentum'"):
        build(node, "optimizer", "optimizer")
