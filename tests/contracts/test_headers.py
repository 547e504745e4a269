"""The parameter counts in the headers of conf/model match published counts."""

import pytest

from tests.contracts.networks import header

PUBLISHED = {
    **{"lenet5": 1_256_080, "lenet5_1998": 61_706, "fmnist_cnn": 1_677_674, "batchnorm_cnn": 1_200_330},
    **{"dogs_cats_cnn": 23_214_017, "alexnet": 62_378_344, "alexnet_torchvision": 61_100_840},
    **{"vgg_a": 132_863_336, "vgg_a_lrn": 132_863_336, "vgg_b": 133_047_848, "vgg_c": 133_638_952},
    **{"vgg_d": 138_357_544, "vgg_e": 143_667_240, "vgg16": 138_357_544, "vgg19": 143_667_240},
    **{"cifar_plain": 269_722, "cifar_resnet": 269_722, "resnet18": 11_689_512, "resnet34": 21_797_672},
    **{"resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808, "xception": 22_855_952},
    **{"mobilenet_v1": 4_231_976, "mobilenet_v2": 3_504_872, "densenet121": 7_978_856},
    **{"densenet161": 28_681_000, "densenet169": 14_149_480, "densenet201": 20_013_928},
    **{"squeezenet": 1_248_424, "resnext50": 25_028_904, "wide_resnet50": 68_883_240},
    **{"mnasnet": 4_383_312, "efficientnet": 5_288_548, "shufflenet": 2_278_604},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_parameters_match_published_counts(name: str) -> None:
    """Sources: tables of lectures, torchvision's `num_params`. test_models compares each network with its header."""
    assert header(name).parameters == PUBLISHED[name]
