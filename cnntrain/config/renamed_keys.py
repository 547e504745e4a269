"""Config keys and values that were renamed. The old names are refused with the new name in the message."""

from fnmatch import fnmatchcase

# `*` stands for any name in augment.
KEYS = {
    "augment.*.area": "augment.*.scale",
    "augment.*.padding_px": "augment.*.padding",
    "augment.erasing": "augment.random_erasing",
    "augment.resized_crop": "augment.random_resized_crop",
    "augment.trivial": "augment.trivial_augment",
    "data.mirror": "data.flip_pairs",
    "data.mirror_safe": "data.hflip_ok",
    "data.scheme": "data.keypoint_set",
    "data.store": "data.cache",
    "log.pictures": "log.figures",
    "task.fit": "task.resize_outputs",
}
VALUES = {
    "augment": {"erasing": "random_erasing", "resized_crop": "random_resized_crop", "trivial": "trivial_augment"},
    "data.cache": {"device": "gpu", "host": "ram", "stream": "none"},
    "task.loss": {"sum": "ce_dice"},
}


def renamed(key: str, value: object = None) -> str:
    """Return a hint for an error message if `key` or its `value` was renamed, else an empty string."""
    if isinstance(value, str) and (new := VALUES.get(key, {}).get(value)):
        return f"; it was renamed to {key}={new}"
    for old, new in KEYS.items():
        if fnmatchcase(key, old) or fnmatchcase(key, f"{old}.*"):
            values = ", ".join(f"{before} to {after}" for before, after in VALUES.get(new, {}).items())
            name = new.replace("*", key.split(".")[1])
            return f"; it was renamed to {name}" + (f", and its values {values}" if values else "")
    return ""
