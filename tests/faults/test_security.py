"""Security: targets in configs, resource limits of YAML files, and network access."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TOUCH = "import pathlib\npathlib.Path('touched').touch()\nclass Net: ...\n"
NAMED = {
    "a function of torch's": ("model._target_=torch.load", "'torch.load' is not allowed as model"),
    "the hub": ("model._target_=torch.hub.load", "'torch.hub.load' is not allowed as model"),
    "a builtin": ("task._target_=builtins.eval", "'builtins.eval' is not allowed as task"),
    "the system": ("optimizer._target_=os.system", "'os.system' is not allowed as optimizer"),
    "an optimizer where data belong": ("data._target_=torch.optim.SGD", "'torch.optim.SGD' is not allowed as data"),
    "what a module imported": ("model._target_=torch.nn.modules.module.OrderedDict", "is not allowed as model"),
    "a function of torch.nn's": ("model._target_=torch.nn.utils.get_total_norm", "is not allowed as model"),
    "code of one's own": ("schedule._target_=evil.Net", "add trusted_packages=[evil]"),
}


@pytest.mark.parametrize("what", NAMED)
def test_targets_of_another_kind_are_rejected(cnntrain, what: str) -> None:
    override, expected = NAMED[what]
    Path("evil.py").write_text(TOUCH)
    assert expected in cnntrain.refused("threads=1", override) and not Path("touched").exists()


def test_packages_are_trusted_only_on_the_command_line(cnntrain) -> None:
    Path("evil.py").write_text(TOUCH)
    Path("own/experiment").mkdir(parents=True)
    Path("own/experiment/given.yaml").write_text(
        "# @package _global_\ntrusted_packages: [evil]\nmodel: {_target_: evil.Net}\n"
    )
    said = cnntrain.refused("--config-dir", "own", "experiment=given", "threads=1")
    assert "model._target_: 'evil.Net' is not allowed as model" in said and not Path("touched").exists()


FLOW = ", ".join(["*a{}"] * 9)
BOMB = "a0: &a0 [x, x, x]\n" + "".join(f"a{i}: &a{i} [{FLOW.replace('{}', str(i - 1))}]\n" for i in range(1, 10))
FILES = {
    "a bomb": (BOMB, "bad.yaml:6: has more than 100,000 values"),
    "an alias of itself": ("layers: &a [*a]\n", "bad.yaml:1: *a refers to itself"),
    "nested beyond measure": ("layers: " + "[" * 5000 + "]" * 5000, "bad.yaml:1: is nested more than 50 deep"),
    "a key twice": ("width: 1\nlayers: []\nwidth: 2\n", "bad.yaml:3: not valid YAML"),
    "no syntax": ("layers: [a, b\nwidth: 3\n", "bad.yaml:2: not valid YAML"),
    "a tab": ("layers:\n\t- output\n", "bad.yaml:2: not valid YAML"),
    "no text": ("layers: [output]\nname: \udcff\n", "bad.yaml:2: is not UTF-8 text"),
}


@pytest.mark.parametrize("what", FILES)
def test_an_invalid_yaml_file_is_rejected_within_seconds(cnntrain, what: str) -> None:
    content, expected = FILES[what]
    Path("own/model").mkdir(parents=True)
    Path("own/model/bad.yaml").write_text(content, errors="surrogateescape")
    started = time.monotonic()
    said = cnntrain.refused("--config-dir", "own", "model=bad")
    assert expected in said and time.monotonic() - started < 30


def test_special_files_in_a_config_folder_are_rejected(cnntrain) -> None:
    Path("own/model").mkdir(parents=True)
    os.mkfifo("own/model/bad.yaml")
    assert "bad.yaml: is not a regular file" in cnntrain.refused("--config-dir", "own", "model=bad")
    Path("own/model/bad.yaml").unlink()
    Path("own/model/bad.yaml").symlink_to("bad.yaml")
    assert "bad.yaml: is a broken link" in cnntrain.refused("--config-dir", "own", "model=bad")


def listeners(pid: int) -> list[str]:
    """Return the internet sockets in the process's network namespace, in any state."""
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        path = Path(f"/proc/{pid}/net/{table}")
        found += path.read_text().splitlines()[1:] if path.exists() else []
    return found


def test_a_run_opens_no_sockets(cnntrain, make_images, inside_namespace) -> None:
    """The run has its own network namespace without loopback, whose tables list every open socket."""
    isolated = inside_namespace("true", "--net")
    run = cnntrain.start(
        *(
            f"model=mlp threads=1 data=image_folder data.root={make_images(count=30)} data.size=8 "
            "data.cache=none data.workers=2 epochs=3 run_dir=run"
        ).split(),
        around=isolated,
    )
    seen, looked = [], 0
    while run.poll() is None:
        with suppress(OSError):  # it has just ended
            if os.readlink(f"/proc/{run.pid}/ns/net") != os.readlink("/proc/self/ns/net"):
                seen += listeners(run.pid)
                looked += 1
        time.sleep(0.02)
    cnntrain.end(run, 0)
    assert seen == [] and looked > 20
    own = subprocess.run([*isolated, "cat", "/proc/net/tcp"], capture_output=True, text=True, check=True)
    assert len(own.stdout.splitlines()) == 1, "the namespace is not empty"
