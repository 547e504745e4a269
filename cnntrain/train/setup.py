"""Build the components of a run from its settings, without reading data. Shared by all commands."""

import dataclasses
import inspect
import logging
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.utils.data import Dataset

from cnntrain.augment.pipeline import Pipeline
from cnntrain.config.instantiate import build, resolve
from cnntrain.config.schema import DataSettings, ModelSettings, Node, Settings, parse, split_common
from cnntrain.data.examples import Examples, Source
from cnntrain.data.load import DataSplits, align_labels, load_data
from cnntrain.data.loader import Loader, make_loader
from cnntrain.errors import UserError
from cnntrain.models.modify import apply_model_settings, count_trainable, initialize_lazy_modules, is_pretrained
from cnntrain.models.pretrained import Preprocessing, PretrainedWeights, find_weights
from cnntrain.randomness import seed_all
from cnntrain.summary.design_warnings import SMALL_FIELD
from cnntrain.summary.preflight import output_size, preflight
from cnntrain.summary.trace import as_meta
from cnntrain.tasks.task import Task
from cnntrain.train.checkpoint import validate_checkpoint
from cnntrain.train.device import Compute, choose_compute, prepare_torch
from cnntrain.train.distributed import SINGLE, World
from cnntrain.train.optim import check_optimizer
from cnntrain.train.schedule import Schedule
from cnntrain.types import DataSpec

log = logging.getLogger("cnntrain")


@dataclass
class Components:
    """The parts of a run.

    Attributes:
        settings: `auto` values are replaced once they are resolved.
        data_settings: settings common to all data sources.
        spec: mean and std are None until `load` has measured them, unless they are configured.
        pretraining: preprocessing of the pretrained weights, if known.
    """

    settings: Settings
    compute: Compute
    source: Source
    data_settings: DataSettings
    spec: DataSpec
    task: Task
    model: nn.Module
    pipeline: Pipeline
    pretraining: Preprocessing | None = None

    def load(self, augmented: bool = True) -> DataSplits:
        """Load the data and pass its statistics (mean and std) to the task and the pipeline.

        Args:
            augmented: whether training images will be augmented; random crops need images at a higher resolution.
        """
        data = load_data(self.source, self.data_settings, self.pipeline.magnification if augmented else 1.0)
        if self.spec.mean is None:
            self.spec = data.spec
        align_labels(data, self.spec)
        data.spec = self.spec
        self.pipeline = build_pipeline(self.settings, self.spec)
        scale = self.task.output_scale
        self.task = build_task(self.settings, self.spec, self.pipeline)
        self.task.output_scale = scale
        self.task.prepare(data.train.targets)
        return data

    def loader(self, examples: Examples, augmented: bool = False) -> Loader:
        """Build a loader for a split.

        Args:
            augmented: apply torchvision transforms of single images, in workers.
        """
        chosen, per_sample = self.data_settings, augmented and bool(self.pipeline.per_sample)
        if per_sample:
            log.info("augment: %s transform single images, so workers load them", ", ".join(self.pipeline.per_sample))
            names = [item.name for item in self.pipeline.per_sample.values()]
            if "RandomResizedCrop" in names:
                log.warning(
                    "augment: torchvision's RandomResizedCrop crops images that are already resized to data.size and "
                    "upsamples the crop; augment=random_resized_crop crops from images at a higher resolution"
                )
        return make_loader(examples, self.compute.device, chosen.workers, chosen.timeout_s, chosen.cache, per_sample)


def build_components(
    settings: Settings, spec: DataSpec | None = None, world: World = SINGLE, resumes: bool = False
) -> Components:
    """Build the parts of a run without reading data; check all settings and the shapes of the network.

    Args:
        spec: data spec of the checkpoint from which the weights will be loaded; default: that of the data source.
        world: the ranks that train together.
        resumes: the weights will be loaded from a checkpoint, so pretrained weights are not.

    Raises:
        UserError: a setting is invalid, or the network does not fit its input.
    """
    is_restored = spec is not None
    prepare_torch(settings.threads, settings.deterministic, world)
    compute = choose_compute(settings.device, settings.precision, settings.channels_last, world, settings.compile)
    weights = None if is_restored or resumes else find_pretrained_weights(settings)
    settings = use_pretrained_size(settings, weights)
    source = build_source(settings)
    source_spec = spec or source.spec()
    settings = use_pretrained_statistics(settings, weights, source_spec.channels)
    _, data_settings = split_data(settings)
    spec = spec or with_configured_statistics(source_spec, data_settings)
    pipeline = build_pipeline(settings, spec)
    task = build_task(settings, spec, pipeline)
    if pipeline.can_flip and not spec.hflip_ok:
        log.warning("augment: flipping changes the meaning of these images (digits, text); remove the flip")
    model = build_model(settings, spec, task, pipeline.output_size, weights, show_warnings=not is_restored)
    if not is_restored:
        check_optimizer(settings, compute)
        build_schedule(settings, total_steps=1, steps_per_epoch=1)
        log_frozen_layers(settings, model, resumes)
    pretraining = weights.preprocessing if weights else None
    return Components(
        settings, compute, source, data_settings, spec, task, model.to(compute.device), pipeline, pretraining
    )


def use_pretrained_size(settings: Settings, weights: PretrainedWeights | None) -> Settings:
    """Set the stem and the image size to those of the pretrained weights where the settings leave them open."""
    if weights is None:
        return settings
    model, data = dict(settings.model), dict(settings.data)
    if model.get("stem") == "auto" and weights.stem and str(model["_target_"]).startswith("cnntrain.models."):
        model["stem"] = weights.stem
    size = weights.preprocessing.size if weights.preprocessing else None
    if size and "size" in data and data["size"] is None:
        data["size"] = size[0] if size[0] == size[1] else list(size)
        log.info("model.pretrained=%s: using the image size of these weights, data.size=%s", weights.name, data["size"])
    return dataclasses.replace(settings, model=model, data=data)


def use_pretrained_statistics(settings: Settings, weights: PretrainedWeights | None, channels: int) -> Settings:
    """Set mean and std to those of the pretrained weights unless the settings give them."""
    if weights is None or (settings.data.get("mean"), settings.data.get("std")) != (None, None):
        return settings
    if weights.preprocessing is None:
        log.info("model.pretrained=%s: these weights have no known mean and std, so they are measured", weights.name)
        return settings
    mean, std = (list(values) for values in weights.preprocessing.statistics(channels))
    shown = ("[" + ",".join(f"{value:.4g}" for value in values) + "]" for values in (mean, std))
    log.info(
        "model.pretrained=%s: using the statistics of these weights, data.mean=%s data.std=%s", weights.name, *shown
    )
    return dataclasses.replace(settings, data={**settings.data, "mean": mean, "std": std})


def log_frozen_layers(settings: Settings, model: nn.Module, resumes: bool) -> None:
    """Log the number of trainable parameters if layers are frozen; warn if frozen layers have random weights."""
    freeze = settings.model.get("freeze")
    if freeze is None:
        return
    trained, total = (f"{count:,}" for count in count_trainable(model))
    if resumes or is_pretrained(model):
        log.info("model.freeze=%s: %s of %s parameters are trainable", freeze, trained, total)
        return
    log.warning(
        "model.freeze=%s without model.pretrained: %s of %s parameters are trainable, the others keep random weights; "
        "set model.pretrained (DEFAULT, a file, or a run folder), or set model.freeze=null",
        freeze,
        trained,
        total,
    )


def build_source(settings: Settings) -> Source:
    """Build the data source without reading any data."""
    node, _ = split_data(settings)
    factory = resolve(node, "data", "data", settings.trusted_packages)
    target = factory.func if isinstance(factory, partial) else factory
    if inspect.isclass(target) and not _is_source(target):
        raise _not_a_source(node["_target_"], target)
    source = build(node, "data", "data", settings.trusted_packages)
    if not _is_source(source):
        raise _not_a_source(node["_target_"], type(source))
    return source


def split_data(settings: Settings) -> tuple[Node, DataSettings]:
    """Split `data` into the source's own arguments and the common settings; drop `size` if null (source's default)."""
    node, common = split_common(settings.data, DataSettings)
    node = {key: value for key, value in node.items() if (key, value) != ("size", None)}
    return node, parse(DataSettings, common, "data.")


def _is_source(candidate: object) -> bool:
    return all(callable(getattr(candidate, name, None)) for name in ("spec", "load"))


def _not_a_source(path: str, cls: type) -> UserError:
    kind = "a torch Dataset" if issubclass(cls, Dataset) else f"not a data source ({cls.__name__})"
    return UserError(
        f"data._target_: {path} is {kind}; it must be a cnntrain.data.examples.Source: a class with spec(), which "
        'returns a DataSpec, and load(), which returns {"train": Examples(images, {"label": labels}, names)} with '
        'uint8 images (N, C, H, W); the README has an example under "Your own network, data, augmentation"'
    )


def with_configured_statistics(spec: DataSpec, chosen: DataSettings) -> DataSpec:
    """Return the spec with `data.mean` and `data.std`, if they are set."""
    if chosen.mean is None and chosen.std is None:
        return spec
    for key, values in (("mean", chosen.mean), ("std", chosen.std)):
        valid = values is not None and len(values) == spec.channels and all(0 <= v <= 1 for v in values)
        if not valid or (key == "std" and 0 in (values or ())):
            raise UserError(f"data.{key}: must be {spec.channels} numbers from 0 to 1, one per channel, got {values!r}")
    return spec.with_statistics(tuple(chosen.mean or ()), tuple(chosen.std or ()))


def build_pipeline(settings: Settings, spec: DataSpec) -> Pipeline:
    """Build the configured augmentations for images described by `spec`."""
    nodes = dict(settings.augment)
    border = nodes.pop("border", "zero")
    augmentations = {
        name: build(node, "augment", f"augment.{name}", settings.trusted_packages) for name, node in nodes.items()
    }
    return Pipeline(spec, augmentations, border=border)


def build_task(settings: Settings, spec: DataSpec, pipeline: Pipeline) -> Task:
    """Build the task for images of the pipeline's output size."""
    height, width = pipeline.output_size
    spec = dataclasses.replace(spec, height=height, width=width)
    return build(settings.task, "task", "task", settings.trusted_packages, spec=spec)


def build_schedule(settings: Settings, total_steps: int, steps_per_epoch: int) -> Schedule:
    """Build the configured learning rate schedule."""
    facts = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch}
    return build(settings.schedule, "schedule", "schedule", settings.trusted_packages, **facts)


def find_pretrained_weights(settings: Settings) -> PretrainedWeights | None:
    """Find the weights that `model.pretrained` names; None if it is unset or the network loads them itself."""
    node, common = split_common(settings.model, ModelSettings)
    pretrained = parse(ModelSettings, common, "model.").pretrained
    return None if _loads_pretrained(settings, node) else find_weights(node, pretrained, validate_checkpoint)


def _loads_pretrained(settings: Settings, node: Node) -> bool:
    """Return True if the constructor of a user's network has the parameter `pretrained`."""
    factory = resolve(node, "model", "model", settings.trusted_packages, pretrained=True)
    return "pretrained" in getattr(factory, "keywords", {})


def make_model(
    settings: Settings,
    channels: int,
    num_outputs: int,
    image_size: tuple[int, int],
    weights: PretrainedWeights | None = None,
    output_names: tuple[str, ...] = (),
) -> nn.Module:
    """Build the configured network for images of `channels` x `image_size`; uses torch's global random generator.

    Args:
        weights: pretrained weights to load.
        output_names: names of the classes or keypoints.
    """
    node, common = split_common(settings.model, ModelSettings)
    model_settings = parse(ModelSettings, common, "model.")
    pretrained = model_settings.pretrained
    facts = {
        "in_channels": channels,
        "num_outputs": num_outputs,
        "num_classes": num_outputs,
        "image_size": image_size,
        # For networks that load pretrained weights themselves; false overrides a default of true.
        **({} if pretrained is None else {"pretrained": pretrained or None}),
    }
    model = build(node, "model", "model", settings.trusted_packages, **facts)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model._target_: {node['_target_']} returns a {type(model).__name__}, not a torch.nn.Module; give the "
            "class of a network, or a function that returns a network"
        )
    if pretrained and weights is None and _loads_pretrained(settings, node):
        model.pretrained_from = str(pretrained)  # type: ignore[assignment]
    initialize_lazy_modules(model, channels, image_size)
    return apply_model_settings(
        model, model_settings, weights, num_outputs=num_outputs, outputs=output_names, image_size=image_size
    )


def build_model(
    settings: Settings,
    spec: DataSpec,
    task: Task,
    image_size: tuple[int, int],
    weights: PretrainedWeights | None = None,
    show_warnings: bool = True,
) -> nn.Module:
    """Build the network and check its shapes without data.

    Its initial weights depend only on the seed, except for layers loaded from the pretrained `weights`.

    Args:
        show_warnings: log probable design mistakes; False for a network that is already trained.

    Raises:
        UserError: a layer does not fit its input, or the outputs are not what the task needs.
    """
    seed_all(settings.seed, "weights")
    names = spec.classes or spec.keypoints
    model = make_model(settings, spec.channels, task.num_outputs, image_size, weights, names)
    findings = preflight(
        model,
        spec.channels,
        image_size,
        task.output_shape(),
        batch_size=min(settings.fixed_batch_size or 32, 32),
        classification=bool(spec.classes) and not spec.keypoints,
        name=settings.model.get("name"),
        size_key="data.size" if "size" in settings.data else None,
    )
    for finding in findings:
        if finding.verdict == "FAIL":
            raise UserError(f"{finding.evidence}\n{finding.remedy}")
        # `inspect` reports the receptive field.
        if show_warnings and finding.verdict == "WARN" and finding.name != SMALL_FIELD:
            log.warning("%s: %s", finding.evidence, finding.remedy)
    if spec.per_pixel and task.output_shape() is not None:
        meta_model = as_meta(model).eval()
        task.configure_outputs(lambda size: output_size(meta_model, spec.channels, size), [image_size, spec.image_size])
    return model
