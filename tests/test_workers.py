"Several processes at once: each piece after what it needs, the same numbers, no ruins."
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyperclip_nb.lab import methods
from hyperclip_nb.lab.experiments import reproduce
from hyperclip_nb.lab.runs import Run
from hyperclip_nb.lab.shards import chain_lengths, grid_jobs, pieces_of, work_through
from hyperclip_nb.lab.stages import add_preset, override, preset

SMALL = dict(
    world=dict(tasks=(30, 10, 12), scenes=(300, 200, 200)),
    multitask=dict(epochs=1), cond_film=dict(epochs=1), cond_multitask=dict(epochs=1),
    few_shot=dict(steps=3),
)
SLUGS = 'clip', 'multitask', 'cond-film', 'cond-multitask'
GRAPH = dict(a=(), b=(), c=('a',), d=('a', 'b'), e=('d',))


@pytest.fixture(scope='module', autouse=True)
def small():
    add_preset('small-workers', 'smoke', **SMALL)


def leave_note(piece, folder):
    "Say that a piece has begun, and fail if it came too early; a and b meet"
    folder = Path(folder)
    for need in GRAPH[piece]:
        assert (folder/need).exists(), f'{need} of {piece}'
    (folder/f'{piece} began').touch()
    end = time.time() + 60
    while piece in 'ab' and not all((folder/f'{name} began').exists() for name in 'ab'):
        assert time.time() < end, 'they are not done at once'
        time.sleep(.01)
    (folder/piece).touch()


def test_each_piece_follows_what_it_needs_and_two_go_at_once(tmp_path):
    do = functools.partial(leave_note, folder=str(tmp_path))
    assert sorted(work_through(GRAPH, do, 2)) == sorted(GRAPH)


def test_what_most_pieces_wait_for_comes_first():
    assert chain_lengths(GRAPH) == dict(a=2, b=2, c=0, d=1, e=0)


def test_a_part_is_trained_once_for_all_who_need_it():
    run = Run(override(preset('smoke'), **SMALL))
    slugs = 'multitask', 'cond-multitask-strong', 'cond-film'
    jobs = grid_jobs((0, 1), (1., .5), slugs)
    pieces = pieces_of(jobs, run, ())
    parts = [piece for piece in pieces if piece not in jobs]
    assert len(parts) == len(set(parts)) == 2*(1 + 2 + 2)
    assert sum(part.stage == 'multitask' for part in parts) == 2 # one a seed


def test_two_processes_make_the_rows_of_one(tmp_path):
    said = []
    asked = dict(preset='small-workers', methods=SLUGS, shares=(1., .5))
    one = reproduce(**asked, out=tmp_path/'one')
    two = reproduce(**asked, out=tmp_path/'two', workers=2, say=said.append)
    assert two.rows == one.rows
    assert len(said) == len(set(said)) == 2 + 2*2
    for file in (tmp_path/'one').rglob('*.safetensors'):
        other = tmp_path/'two'/file.relative_to(tmp_path/'one')
        assert other.read_bytes() == file.read_bytes()
    again = []
    reproduce(**asked, out=tmp_path/'two', workers=2, say=again.append)
    assert sorted(again) == sorted(said)


def test_the_error_of_a_stage_comes_back_and_what_is_done_stays(tmp_path):
    changes = ['cond_film.lr=1e30', 'cond_film.epochs=3']
    asked = dict(preset='small-workers', changes=changes, out=tmp_path)
    reproduce(**asked, methods=('multitask',))
    with pytest.raises(FloatingPointError, match='^stage seed0-cond_film-100: .*--set'):
        reproduce(**asked, methods=SLUGS, workers=2)
    assert (tmp_path/'stages'/'seed0-multitask.safetensors').exists()
    assert not list(tmp_path.rglob('.*.part'))


def test_what_several_processes_cannot_do_is_said(tmp_path, monkeypatch):
    # what it registers is taken back
    monkeypatch.setitem(methods.METHODS, 'of-this-process', None)

    @methods.method('of-this-process', 'One', reads_questions=False, needs=())
    def start(models, tasks):
        raise AssertionError('other processes do not know it')

    own = dict(preset='small-workers', methods=('of-this-process',), workers=2)
    with pytest.raises(ValueError, match='of-this-process is unknown in other proc'):
        reproduce(**own, out=tmp_path)
    with pytest.raises(ValueError, match='need a folder to meet in'):
        reproduce(**own)


def test_processes_end_with_the_one_that_hands_out(tmp_path):
    "It is killed, and cannot tell them: each ends when it has done its piece"
    program = 'from hyperclip_nb.command.cli import command; command()'
    words = ['reproduce', '--preset', 'smoke', '--workers', '2', '--out', str(tmp_path)]
    words += ['--methods', 'multitask,cond-multitask']
    for change in 'world.tasks=[30,10,12]', 'world.scenes=[300,200,200]':
        words += ['--set', change]
    command = [sys.executable, '-c', program, *words]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, **pipes, start_new_session=True)
    while not list(tmp_path.glob('stages/*')):
        assert process.poll() is None
        time.sleep(.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    end = time.time() + 60
    while time.time() < end:
        try:
            os.killpg(process.pid, 0) # is anybody left?
        except ProcessLookupError:
            return
        time.sleep(.1)
    raise AssertionError('a process goes on alone')
