"""Commands of the golden record, by name: each is a list of command lines that run in one working folder.

The words are those of the command line; `IN` stands for the folder of input files (see golden_inputs.py). The
words of `COMMON` (of `TRAINING` for other commands) are added to each line, except for keys that it sets.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field

TRAINING = "device=cpu precision=fp32 threads=1 log.figures=false log.tensorboard=false"
COMMON = {"evaluate": "device=cpu threads=1", "predict": "device=cpu threads=1", "compare": "", "clean": ""}


@dataclass(frozen=True)
class Command:
    """Command lines that run one after the other.

    Attributes:
        lines: the command lines, without `cnntrain`.
        equal: pairs of run folders that must have the same results; recorded as true or false.
        stop_after: number of a line -> training steps until a signal stops it; needs model=stopping.
        files: record the names of the files that the commands write.
    """

    lines: tuple[str, ...]
    equal: tuple[tuple[str, str], ...] = ()
    stop_after: Mapping[int, int] = field(default_factory=dict)
    files: bool = False


def _lines(text: str) -> tuple[str, ...]:
    """Return the lines of an indented block; a line with more indentation continues the previous one."""
    lines: list[str] = []
    for line in textwrap.dedent(text).strip().splitlines():
        if line.startswith(" "):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line.strip())
    return tuple(lines)


_DIGITS = "model=mlp data=digits data.limit=200"
_FOLDER = "model=layers --config-dir=IN/networks data=image_folder data.root=IN/classes data.size=32 batch_size=12"
_FACES = "data=toy_faces data.size=32 data.train_count=60 data.test_count=16"
_SHAPES = "data=toy_shapes data.size=32 data.train_count=48 data.test_count=12 model.width=4 model.depth=2"
_MASKS = "data=mask_folder data.root=IN/masks data.classes=[ground,box,bar] data.size=32 batch_size=8"
_POINTS = "data.size=32 batch_size=8 epochs=2"
_STOPPING = "--config-dir=IN/networks model=stopping data.limit=200 batch_size=16 epochs=4 optimizer=sgd ema_decay=0.9"

COMMANDS: dict[str, Command] = {
    # The defaults, with figures and TensorBoard events; metrics of a checkpoint on both splits.
    "digits": Command(
        _lines("""
            run_dir=run epochs=3 data.limit=400 log.figures=true log.tensorboard=true
            evaluate checkpoint=run split=test
            evaluate checkpoint=run split=val
        """),
        files=True,
    ),
    "step_accumulate": Command(
        _lines(f"""
            run_dir=run model=batchnorm_cnn data.limit=300 data.cache=gpu optimizer=sgd schedule=step
                augment=none accumulate=2 clip_grad_norm=1 task.label_smoothing=0.1
                task.class_weights=balanced batch_size=32 epochs=4
            run_dir=weights {_DIGITS} task.class_weights={{0:2,3:0.5}} accumulate=3 clip_grad_norm=0.1
                epochs=2
        """)
    ),
    "cosine_ema": Command(
        _lines("""
            run_dir=fp32 model=cifar_resnet model.depth=8 data.limit=200 optimizer=adam ema_decay=0.9
                schedule=cosine schedule.warmup_epochs=0.5 schedule.final=0.1 epochs=2
            run_dir=bf16 model=cifar_resnet model.depth=8 data.limit=200 precision=bf16 ema_decay=0.9 epochs=2
            run_dir=contiguous model=cifar_resnet model.depth=8 data.limit=200 channels_last=false
                ema_decay=0.9 epochs=2
        """)
    ),
    "optimizers": Command(
        _lines(f"""
            run_dir=adam {_DIGITS} epochs=2 optimizer=adam optimizer.weight_decay=0.01 schedule.shape=linear
            run_dir=sgd {_DIGITS} epochs=2 optimizer=sgd optimizer.nesterov=false schedule=constant
                schedule.warmup_epochs=1
            run_dir=sgd_cycle {_DIGITS} epochs=2 optimizer=sgd optimizer.decay_norms_and_biases=true
            run_dir=rmsprop {_DIGITS} epochs=2 optimizer=torch optimizer.options={{momentum:0.5}}
                schedule=cosine
            run_dir=nadam {_DIGITS} epochs=2 optimizer=torch optimizer.name=NAdam optimizer.weight_decay=0.1
        """)
    ),
    "plateau_stopping": Command(
        _lines(f"""
            run_dir=plateau {_DIGITS} epochs=12 optimizer.lr=0.1 schedule=plateau schedule.patience=0
                schedule.threshold=0.2 early_stopping=3
            run_dir=steps {_DIGITS} steps=13 batch_size=16 checkpoint.every_steps=3 checkpoint.keep=1
                limit_batches=8
            run_dir=longer resume=steps {_DIGITS} steps=20 batch_size=16 limit_batches=8
        """),
        files=True,
    ),
    "mixing": Command(
        _lines(f"""
            run_dir=mixup {_DIGITS} epochs=2 augment=mixup
            run_dir=cutmix {_DIGITS} epochs=2 augment=[shift,cutmix] augment.cutmix.probability=0.7
            run_dir=both {_DIGITS} epochs=2 augment=mixup_cutmix task.label_smoothing=0.1
        """)
    ),
    # One dataset with every cache; the results must be equal.
    "stores": Command(
        _lines(f"""
            run_dir=device {_FOLDER} epochs=2 data.cache=gpu
            run_dir=host {_FOLDER} epochs=2 data.cache=ram
            run_dir=disk {_FOLDER} epochs=2 data.cache=disk
            run_dir=disk_again {_FOLDER} epochs=2 data.cache=disk
            run_dir=stream {_FOLDER} epochs=2 data.cache=none data.workers=0
            run_dir=workers {_FOLDER} epochs=2 data.cache=none data.workers=2
            run_dir=auto {_FOLDER} epochs=2
            clean
        """),
        equal=tuple(("device", name) for name in ("host", "disk", "disk_again", "stream", "workers", "auto")),
    ),
    "color_augmentations": Command(
        _lines(f"""
            run_dir=each {_FOLDER} epochs=2 augment=[brightness,contrast,saturation,hue,grayscale,invert]
            run_dir=jitter {_FOLDER} epochs=2 augment=[jitter] augment.jitter.probability=0.8
            run_dir=effects {_FOLDER} epochs=2 augment=[blur,noise,random_erasing]
        """)
    ),
    "geometric_augmentations": Command(
        _lines(f"""
            run_dir=moves {_FOLDER} epochs=2 augment=[flip,vertical_flip,rotation,zoom,shear,perspective]
                augment.border=reflect
            run_dir=crop {_FOLDER} epochs=2 augment=[random_resized_crop,shift] augment.border=edge data.cache=none
            run_dir=sizes {_FOLDER} epochs=2 augment=[crop] augment.crop.size=24 data.resize=letterbox
            run_dir=trivial {_FOLDER} epochs=2 augment=trivial_augment data.resize=stretch
        """)
    ),
    "torchvision_transforms": Command(
        _lines(f"""
            run_dir=inside {_FOLDER} epochs=2 augment=[flip,torchvision] augment.torchvision.name=ColorJitter
                +augment.torchvision.arguments={{brightness:0.5,hue:0.2}} data.workers=0
            run_dir=workers {_FOLDER} epochs=2 augment=[flip,torchvision] augment.torchvision.name=ColorJitter
                +augment.torchvision.arguments={{brightness:0.5,hue:0.2}} data.workers=1
        """),
        equal=(("inside", "workers"),),
    ),
    "toy_shapes": Command(
        _lines(f"""
            run_dir=run {_SHAPES} epochs=2 batch_size=12 task.class_weights=balanced
            evaluate checkpoint=run split=test
            predict checkpoint=run images=IN/photographs run_dir=predicted draw=0
        """)
    ),
    "mask_folder": Command(
        _lines(f"""
            run_dir=sum {_MASKS} epochs=2 model.width=4 model.depth=2 augment=streets task.loss=ce_dice
                data.cache=disk
            run_dir=valid {_MASKS} epochs=2 model.width=4 model.depth=1 model.padding=valid task.loss=dice
                data.resize=letterbox
            run_dir=fcn {_MASKS} epochs=1 model=fcn model.backbone=cifar_resnet20
                augment=[flip,rotation,trivial_augment]
            evaluate checkpoint=sum split=val
        """)
    ),
    "toy_faces": Command(
        _lines(f"""
            run_dir=run {_FACES} epochs=3 batch_size=12
            evaluate checkpoint=run split=test
            predict checkpoint=run images=IN/photographs run_dir=predicted draw=0
        """)
    ),
    "heatmaps": Command(
        _lines(f"""
            run_dir=auto {_FACES} task.head=heatmap model=unet_small model.width=4 model.depth=2 epochs=2
                batch_size=12
            run_dir=mse {_FACES} task.head=heatmap task.loss=mse task.heatmap_sigma=2 model=unet_small
                model.width=4 model.depth=2 epochs=1 batch_size=12 augment=[flip,random_resized_crop]
            evaluate checkpoint=auto split=test
        """)
    ),
    "keypoint_files": Command(
        _lines(f"""
            run_dir=csv data=keypoint_csv data.root=IN/faces data.file=IN/faces/points.csv {_POINTS}
                task.loss=smooth_l1 task.normalize_by=[left_eye,right_eye] data.crop=box
            predict checkpoint=csv images=IN/faces boxes=IN/faces/boxes.csv run_dir=predicted draw=0
            run_dir=coco data=coco_keypoints data.root=IN/faces data.train=train.json data.val=val.json
                data.train_images=. data.val_images=. {_POINTS} task.loss=l1
            run_dir=dlib data=dlib_xml data.root=IN/faces data.train=train.xml data.test=test.xml
                data.keypoint_set=null data.flip_pairs={{0:1}} {_POINTS} task.loss=mse
            run_dir=cats data=cat_folder data.root=IN/cats {_POINTS} data.folds=4 data.fold=1
        """)
    ),
    "image_files": Command(
        _lines("""
            run_dir=csv model=layers --config-dir=IN/networks data=image_csv data.file=IN/table/table.csv
                data.channels=1 data.bits=12 data.size=[20,24] batch_size=8 epochs=2
                task.class_weights={kind0:2,kind1:0.5,kind2:1}
            run_dir=tar model=layers --config-dir=IN/networks data=webdataset data.root=IN/shards data.size=28
                batch_size=8 epochs=2
            run_dir=mnist model=fmnist_cnn data=mnist data.root=IN/idx batch_size=32 epochs=2
                data.val_fraction=0.2
        """)
    ),
    # Stopped by a signal in the middle of an epoch and resumed; must equal an uninterrupted run.
    "resume": Command(
        _lines(f"""
            run_dir=whole {_STOPPING}
            run_dir=broken {_STOPPING}
            run_dir=broken {_STOPPING} resume=auto
            run_dir=more {_STOPPING} epochs=5 resume=whole schedule=constant
        """),
        equal=(("whole", "broken"),),
        stop_after={1: 16},
    ),
    "fine_tuning": Command(
        _lines("""
            run_dir=first model=lenet5 data.limit=200 epochs=1
            run_dir=layers model=lenet5 data.limit=200 epochs=3 model.pretrained=first
                model.freeze=[layers.0,layers.3] model.unfreeze=2 optimizer.layer_decay=0.75
            run_dir=head model=lenet5 data=mnist data.root=IN/idx epochs=2 model.pretrained=first
                model.freeze=[layers.0,layers.3]
            run_dir=backbone model=lenet5 data.limit=200 epochs=1 model.pretrained=first model.freeze=backbone
        """)
    ),
    # The initial weights and the first steps of several networks.
    "networks": Command(
        _lines("""
            run_dir=resnet18 model=resnet18 data.limit=64 steps=1
            run_dir=swapped model=cifar_resnet model.depth=8 model.norm=group model.activation=gelu
                model.init=he data.limit=100 steps=2 batch_size=32
            run_dir=torchvision model=torchvision model.name=shufflenet_v2_x0_5 data=image_folder
                data.root=IN/classes data.size=64 batch_size=12 steps=2
            run_dir=timm model=timm model.name=test_resnet data=image_folder data.root=IN/classes data.size=64
                batch_size=12 steps=2
        """)
    ),
    "sweep_grid": Command(
        _lines("""
            -m run_dir=sweep model=mlp,sequential optimizer.lr=0.01,0.1 sweep.seeds=2 data.limit=200 epochs=2
            compare sweep run_dir=compared
        """)
    ),
    "sweep_samplers": Command(
        _lines(f"""
            -m run_dir=tpe {_DIGITS} epochs=3 optimizer.lr=tag(log,interval(1e-3,1)) batch_size=32,64
                sweep.sampler=tpe sweep.trials=5 sweep.pruner=median sweep.seed=3
            -m run_dir=random {_DIGITS} epochs=1 optimizer.lr=interval(0.001,0.1) sweep.sampler=random
                sweep.trials=2
        """)
    ),
    "k_fold": Command(
        _lines(f"""
            -m run_dir=sweep {_DIGITS} epochs=2 data.folds=3 optimizer.lr=0.01,0.03 sweep.jobs=2
            run_dir=fold {_DIGITS} epochs=2 data.folds=3 data.fold=2 optimizer.lr=0.01
        """)
    ),
    "two_processes": Command(
        _lines("""
            run_dir=run model=layers --config-dir=IN/networks data.limit=200 epochs=2 augment=[shift,mixup]
                launch.devices=2
        """)
    ),
    "overfit": Command(
        _lines(f"""
            overfit run_dir=digits {_DIGITS} overfit.steps=60
            overfit run_dir=no_rate {_DIGITS} overfit.steps=20 optimizer.lr=0
            overfit run_dir=faces {_FACES} overfit.steps=150 overfit.examples=2
            overfit run_dir=shapes {_SHAPES} overfit.steps=150
        """)
    ),
    "check": Command(
        _lines(f"""
            check run_dir=digits {_DIGITS} check.budget_s=1000
            check start wiring run_dir=no_rate {_DIGITS} check.budget_s=1000 optimizer.lr=0
            check data start wiring run_dir=shapes {_SHAPES} check.budget_s=1000
            check data start wiring run_dir=faces {_FACES} check.budget_s=1000
            check flip run_dir=flip {_FACES}
            run_dir=first {_DIGITS} epochs=1 check.first=true check.budget_s=1000
            check data wiring run_dir=trained checkpoint=first threads=1
        """)
    ),
    "lr_find": Command(
        _lines(f"""
            lr-find run_dir=found {_DIGITS} lr_find.steps=40
            run_dir=auto {_DIGITS} optimizer.lr=auto epochs=1 lr_find.steps=30
        """)
    ),
    "inspect": Command(
        _lines("""
            inspect run_dir=one model=unet_small model.width=4 model.depth=2 data=toy_shapes data.size=32
            inspect run_dir=several model=lenet5,resnet18,mobilenet_v2,vgg16 inspect.image_size=224
                inspect.channels=3 inspect.num_outputs=1000 inspect.convention=keras
        """)
    ),
    "exit_codes": Command(
        _lines(f"""
            run_dir=unknown_key {_DIGITS} epoch=3
            run_dir=wrong_value {_DIGITS} augment.border=mirror
            run_dir=diverged {_DIGITS} optimizer.lr=1e30 epochs=3
            run_dir=expected --config-dir=IN/networks experiment=expects_too_much
            evaluate checkpoint=nowhere
            data=image_folder data.root=IN/photographs
        """)
    ),
}
