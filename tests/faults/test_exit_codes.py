"""0 done, 1 a verdict, 2 the user's input, 3 diverged, 4 the machine: one message, no traceback, nothing left over."""

import pytest

SLIPS = {
    "an unknown key": (("modle=mlp",), "did you mean 'model'"),
    "an unknown option": (("model=lenet6",), "model: no such option 'lenet6'; did you mean 'lenet5'"),
    "an unknown command": (("trian",), "did you mean 'train'"),
    "an unknown flag": (("--cofnig",), "unknown option --cofnig"),
    "null for an option": (("model=null",), "model: null is not the name of an option"),
    "a number for an option": (("data=5",), "data: 5 is not the name of an option"),
    "nothing for an option": (("model=",), "model: an empty value is not the name of an option"),
    "a wrong type": (("epochs=many",), "epochs: must be a whole number"),
    "out of range": (("batch_size=0",), "batch_size: must be a whole number >= 1"),
    "not a number": (("clip_grad_norm=nan",), "clip_grad_norm"),
    "no syntax": (("data.root=a b]",), "can't parse"),
    "several values without -m": (("seed=1,2",), "-m runs each of them"),
    "no folder": (("--config-dir", "nowhere"), "--config-dir: no folder 'nowhere'"),
    "a missing environment variable": (("seed=${oc.env:NOT_THERE}",), "NOT_THERE"),
    "an interpolation of nothing": (("epochs=${nothing}",), "nothing"),
    "nested beyond measure": (("model.layers=" + "[" * 3000 + "]" * 3000,), "model.layers"),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_typing_error_is_refused(cnntrain, slip: str) -> None:
    arguments, expected = SLIPS[slip]
    assert expected in cnntrain.refused(*arguments)


def test_arguments_that_only_the_class_can_check_are_refused(cnntrain) -> None:
    said = cnntrain.refused(*cnntrain.quick, "optimizer.lr=-1")
    assert said.startswith("error: optimizer.lr: ")


@pytest.mark.slow
def test_missing_data_are_refused(cnntrain) -> None:
    for command in ((), ("overfit",)):
        assert "data.root" in cnntrain.refused(*command, "data=image_folder", "data.root=nowhere", "threads=1")


def test_out_of_memory_has_the_exit_code_of_the_machine(cnntrain) -> None:
    said = cnntrain.refused(*cnntrain.quick, "model.values.width=4000000000", code=4)
    assert "memory" in said


@pytest.mark.slow
def test_divergence_in_overfit_is_its_verdict(cnntrain) -> None:
    done = cnntrain("overfit", *cnntrain.quick, "optimizer.lr=1e30", "run_dir=run", code=1)
    assert "FAIL" in done.stdout and "learning rate" in done.stdout
