"""Search hyperparameters: trials of a recipe, by one worker or many.

python launch/sweep.py SWEEP.yaml                start a worker; run it again to go on after an interruption
python launch/sweep.py SWEEP.yaml & ...          the same command again is one more worker, here or on another machine
python launch/sweep.py SWEEP.yaml --watch        the table, live, without working
python launch/sweep.py SWEEP.yaml --report       the table, trials.csv and plots of what is there
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # schedulers start this file from anywhere

from launch.entry import run, setup

LOOK_SECONDS = 5.0


def main() -> int:
    setup()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--watch", action="store_true", help="show the table until every trial has ended")
    parser.add_argument("--report", action="store_true", help="write OUT/trials.csv and OUT/plots, and stop")
    arguments = parser.parse_args()
    import rich

    from mmtrain.sweep.spec import read_sweep
    from mmtrain.sweep.study import Study
    from mmtrain.sweep.summary import table, write_report

    sweep = read_sweep(arguments.sweep)
    study = Study(sweep, create=not (arguments.watch or arguments.report))
    if arguments.watch:
        return watch(study)
    code = 0
    if not arguments.report:
        from mmtrain.sweep.worker import work

        code = work(sweep, study, lambda: rich.print(table(sweep, study.trials())))
    for path in write_report(sweep, study.trials()):
        print(path)
    rich.print(table(sweep, study.trials()))
    return code


def watch(study) -> int:
    """Show the table until no trial runs and none is to come."""
    from rich.live import Live

    from mmtrain.sweep.study import to_come
    from mmtrain.sweep.summary import table

    with Live(auto_refresh=False) as live:
        while True:
            trials = study.trials()
            live.update(table(study.sweep, trials), refresh=True)
            if not any(trial.state == "running" for trial in trials) and not to_come(study.sweep, trials):
                return 0
            time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    run(main)
