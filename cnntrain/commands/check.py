"""Check a configuration before a long training: data, initialization, wiring, learning, and reproducibility.

`cnntrain check model=... data=...` runs all applicable checks, in about a minute for a small network on a CPU
(`check.budget_s`). For each check it prints the verdict, the measured numbers, the likely cause and what to do. The
exit code is 1 if any check is a FAIL. `cnntrain check leakage gradients data=...` runs two checks, and
`cnntrain check data ...` all checks of a topic; `checks=leakage,gradients` is an alternative. `cnntrain check
checkpoint=RUN` checks trained weights. `cnntrain check flip data=...` reports on flip pairs in more detail and draws
them. `check.first=true` runs the checks before a training, which does not start if one is a FAIL. Checks do not change
a run. Writes check.json and figures. docs/checks.md describes every check.
"""

from pathlib import Path

from cnntrain.checks.check_run import check, check_checkpoint, check_flip, select_checks
from cnntrain.config.command_line import Invocation
from cnntrain.config.compose import read_command_settings, read_settings
from cnntrain.config.schema import EvaluateSettings
from cnntrain.train.checkpoint import load_validated
from cnntrain.train.restore import restore
from cnntrain.train.resume import locate_checkpoint


def run(invocation: Invocation) -> int:
    words: list[str] = list(invocation.words)
    overrides: list[str] = []
    for override in invocation.overrides:
        if override.startswith("checks="):
            words += [word for word in override.removeprefix("checks=").strip("[]").split(",") if word]
        else:
            overrides.append(override)
    select_checks(words)  # refuses unknown names before anything is read
    if words == ["flip"]:
        report = check_flip(read_settings(overrides, invocation.config_dir), invocation.command_line)
    elif any(override.startswith("checkpoint=") for override in overrides):
        settings = read_command_settings(EvaluateSettings, "evaluate", overrides, invocation.config_dir)
        components = restore(load_validated(locate_checkpoint(Path(settings.checkpoint), "best.pt")), settings)
        report = check_checkpoint(components, settings.run_dir, words, invocation.command_line)
    else:
        report = check(read_settings(overrides, invocation.config_dir), words, invocation.command_line)
    return 1 if report["verdict"] == "FAIL" else 0
