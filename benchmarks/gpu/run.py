#!/usr/bin/env python3
"""Test cnntrain on a GPU with one command and write a report; see README.md.

    python run.py --device cuda --kit .kit --out OUT             # on a GPU machine, about 8 minutes
    python run.py --device cpu --smoke --kit .kit --out OUT      # tests the items themselves
    python run.py --list                                         # lists the items

Items run in order of importance, each in its own processes and with its own time limit. report.json and report.txt are
rewritten after each item, so an interrupted run leaves its results so far.
"""

import argparse
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import Found, GpuMonitor, Harness, last_lines
from items import STAGES

MIN_REMAINING_S = 15  # no item starts with less time left
Item = Callable[[Harness], Found]


def read_arguments() -> argparse.Namespace:
    names = [item.__name__ for stage in STAGES for item in stage]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes that test the items and measure nothing")
    parser.add_argument("--out", default="gpu-report", help="folder of the report")
    parser.add_argument("--kit", default=str(Path(__file__).parent), help="folder made by pack.sh")
    parser.add_argument(
        "--budget", type=float, default=480, help="seconds in total; items that would start later are skipped"
    )
    parser.add_argument(
        "--patience", type=float, default=1, help="factor for the time limits of all items, for a busy machine"
    )
    parser.add_argument(
        "--lanes", type=int, default=0, help="untimed items that run in parallel; 0: half the cores on a GPU"
    )
    parser.add_argument("--only", default="", help="items to run, separated by commas")
    parser.add_argument("--skip", default="", help="items to skip, separated by commas")
    parser.add_argument("--list", action="store_true", help="list the items")
    arguments = parser.parse_args()
    for option in ("only", "skip"):
        chosen = set(filter(None, getattr(arguments, option).split(",")))
        if unknown := chosen - set(names):
            parser.error(f"--{option}: no such items: {', '.join(sorted(unknown))}; --list shows them")
        setattr(arguments, option, chosen)
    return arguments


def run_item(harness: Harness, item: Item, alone: bool) -> None:
    if harness.remaining_s < MIN_REMAINING_S:
        harness.record(item.__name__, {"ok": False, "note": "skipped: --budget is exhausted"}, {})
        return
    monitor = GpuMonitor(harness.cuda and alone)
    try:
        found = item(harness)
    except Exception:  # an error in one item must not end the others
        found = {"ok": False, "tail": last_lines(traceback.format_exc(), 10)}
    harness.record(item.__name__, found, monitor.stop())


def main() -> int:
    arguments = read_arguments()
    if arguments.list:
        for item in (item for stage in STAGES for item in stage):
            print(f"{item.__name__:28s}{(item.__doc__ or '').splitlines()[0]}")
        return 0
    harness = Harness(
        arguments.device, arguments.smoke, arguments.out, arguments.kit, arguments.budget, arguments.patience
    )
    lanes = arguments.lanes or (max(2, min(8, len(os.sched_getaffinity(0)) // 2)) if harness.cuda else 1)
    try:
        for stage in STAGES:
            chosen = [
                item
                for item in stage
                if (not arguments.only or item.__name__ in arguments.only) and item.__name__ not in arguments.skip
            ]
            with ThreadPoolExecutor(lanes) as pool:
                for item in chosen:
                    pool.submit(run_item, harness, item, len(chosen) == 1)
    finally:
        failed = [item["item"] for item in harness.items if not item.get("ok")]
        passed = len(harness.items) - len(failed)
        print(f"\n{passed} ok, {len(failed)} failed: {', '.join(failed)}; {harness.elapsed_s:.0f} s", flush=True)
        print(harness.out / "report.json", flush=True)
        shutil.rmtree(harness.work, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
