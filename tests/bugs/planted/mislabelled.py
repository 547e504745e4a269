"""Data with one thing wrong, each the way it goes wrong in real life."""

import dataclasses

from cnntrain.data.toy_faces import ToyFaces
from cnntrain.spec import DataSpec


class UnrelabelledToyFaces(ToyFaces):
    """Every point is its own mirror partner, so a flipped cat's left eye is still called left."""

    def spec(self) -> DataSpec:
        spec = super().spec()
        return dataclasses.replace(spec, mirror=tuple(range(len(spec.keypoints))))
