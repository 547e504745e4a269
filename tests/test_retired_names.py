"""Names that were replaced by standard terms must not come back."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = {
    "tests/commands/test_help.py",
    "cnntrain/config/renamed_keys.py",
    "tests/config/test_renamed_keys.py",
    "tests/test_retired_names.py",
}
FOLDERS = ("cnntrain/", "conf/", "tests/", "docs/", "benchmarks/", "README.md")
MODULES = """
    engine anatomy assembly rig keeper saved saved_content lean protos fresh space comparison findings spec
    heap combine pointwise windows elements swap moves margin_notes decode decoded resident canvas mirror
    colour warp policy per_sample practice bench answer board perform journal
""".split()
IDENTIFIERS = """
    Assembly assemble Rig Endless Held Keeper find_place Finiteness Journal RunJournal Silent Board Standing
    Contest margin_notes surprises Anatomy mirror_safe infer_mirror mirror_permutation Labelled Colour
    ColourJitter at_hand lowest_loss spare_the_compiler BarLogHandler channel_tensor resize_matrix inverse_3x3
    ElsewhereError LAST_WORDS_S count_cores
""".split()
KEYS = (
    r"data\.store",
    r"log\.pictures",
    r"data\.scheme",
    r"data\.mirror\b",
    r"data\.mirror_safe",
    r"task\.fit",
    r"augment\.erasing",
    r"augment\.resized_crop",
    r"augment\.trivial\b",
    "padding_px",
    r"init=lecture",
)
PATTERNS = {
    **{f"module {name}": rf"\bcnntrain(?:\.\w+)*\.{name}\b(?!\()" for name in MODULES},
    **{f"identifier {name}": rf"(?<![\w.]){name}\b" for name in IDENTIFIERS},
    **{f"key {name}": name for name in KEYS},
}


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if name.startswith(FOLDERS) and name not in ALLOWED]
    names = [name for name in names if name.endswith((".py", ".yaml", ".md", ".sh")) and "golden" not in name]
    return {name: (ROOT / name).read_text() for name in names}


@pytest.mark.parametrize("what", PATTERNS)
def test_retired_names_are_gone(what: str, texts: dict[str, str]) -> None:
    pattern = re.compile(PATTERNS[what])
    found = [
        f"{name}:{text.count(chr(10), 0, match.start()) + 1}"
        for name, text in texts.items()
        for match in pattern.finditer(text)
    ]
    assert not found, found[:10]
