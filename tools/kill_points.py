#!/usr/bin/env python3
"""Kill a run at random moments, start it again, and compare what it leaves in the end.

    python tools/kill_points.py --kills 500

A small grid of all methods runs in a process of its own, which is killed with SIGKILL
after a random time, or in the middle of a random file, started again, and so on; after
some kills it may finish. Every
file that it leaves must be byte for byte the one of a run that nobody disturbed. What
is imported is imported once: the runs are forks of this process."""
import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent/'tests'))
import test_experiments as small  # its preset 'tiny': all stages in seconds

from hyperclip_nb.data import files as files_room
from hyperclip_nb.data.files import read_json
from hyperclip_nb.lab.experiments import reproduce
from hyperclip_nb.lab.methods import ALL

GRID = dict(preset='tiny', seeds=(0,), shares=(1., .5), gammas=(0., 1.5), methods=ALL)
DIFFERS = 'config.json', 'results.json'  # hold the versions of processes, and a commit


def fork_run(out, files=None):
    "Start the grid in a fork, which dies in the middle of a file after so many"
    child = os.fork()
    if child:
        return child
    log = os.open(f'{out}.log', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if files is not None:
        die_in_a_file(files)
    code = 1
    try:
        reproduce(**GRID, out=out)
        code = 0
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        os._exit(code)


def die_in_a_file(files):
    "Let this process be killed while it writes the file after so many"
    write = files_room._write_through
    left = [files]

    def half(path, data, *more):
        if left[0] == 0:
            path.write_bytes(data[:len(data)//2])
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        write(path, data, *more)

    files_room._write_through = half


def wait(child, seconds=None):
    "The exit status of a fork; None if it still runs after so many seconds"
    end = None if seconds is None else time.time() + seconds
    while end is None or time.time() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(.005)
    return None


def left_behind(out):
    "Content of each file by its name; where versions stand, without them"
    found = {}
    for path in sorted(out.rglob('*')):
        if path.is_file():
            name = str(path.relative_to(out))
            found[name] = path.read_bytes()
            if name in DIFFERS:
                found[name] = {**read_json(path), 'versions': None}
    return found


def kill_run(out, kills, rng, mean):
    "Kill a run so many times, then let it finish: where kills hit, and the exit status"
    hits = Counter()
    for _ in range(kills):
        if rng.random() < .5:
            wait(fork_run(out, rng.randrange(4)))
        else:
            child = fork_run(out)
            if wait(child, rng.expovariate(1/mean)) is not None:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        halves = [part.name for part in out.rglob('.*.part')] if out.exists() else []
        hits['in the middle of a file' if halves else 'between files'] += 1
    return hits, wait(fork_run(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=500)
    parser.add_argument('--each', type=int, default=25, help='kills of one run')
    parser.add_argument('--mean', type=float, default=1., help='seconds between kills')
    parser.add_argument('--seed', type=int, default=0)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    small.add_preset('tiny', 'smoke', **small.TINY)
    rng = random.Random(asked.seed)
    place = Path(tempfile.mkdtemp(prefix='kills-'))
    start = time.time()
    assert wait(fork_run(place/'whole')) == 0, (place/'whole.log').read_text()
    whole = left_behind(place/'whole')
    print(f'undisturbed: {len(whole)} files in {time.time() - start:.0f} s', flush=True)
    hits, runs, bad = Counter(), 0, 0
    while hits.total() < asked.kills:
        out = place/f'run{runs}'
        found, status = kill_run(out, asked.each, rng, asked.mean)
        hits += found
        runs += 1
        here = left_behind(out)
        other = [n for n in {*whole, *here} if whole.get(n) != here.get(n)]
        bad += bool(status or other)
        print(f'run {runs}: {found.total()} kills, exit {status}, differ: {other}')
        if status:
            print(Path(f'{out}.log').read_text()[-2000:])
        sys.stdout.flush()
    print(f'{hits.total()} kills {dict(hits)} in {runs} runs: {bad} runs were harmed')
    sys.exit(bad > 0)


if __name__ == '__main__':
    main()
