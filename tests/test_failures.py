"""What ends a run early: numbers that are none, memory, disks, and whoever stops it.

Each leaves one line, and what was done before stays."""
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from hyperclip_nb.base.training import fit
from hyperclip_nb.data.files import atomic_write, read_tensors
from hyperclip_nb.lab.models import Models
from hyperclip_nb.lab.runs import Run
from hyperclip_nb.lab.stages import override, preset

SMALL = dict(world=dict(tasks=(30, 10, 12), scenes=(300, 200, 200)))
SETS = [
    '--set', 'world.tasks=[30,10,12]', '--set', 'world.scenes=[300,200,200]',
    '--set', 'multitask.epochs=2',
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A small world, and a folder for what is trained on it"
    settings = override(preset('smoke'), **SMALL, multitask=dict(epochs=2))
    return Run(settings, folder=tmp_path_factory.mktemp('run'))


def hyperclip_process(out, *more, **options):
    "`hyperclip reproduce` in a process of its own"
    code = 'from hyperclip_nb.command.cli import command; command()'
    words = ['reproduce', '--preset', 'smoke', '--out', str(out), *SETS, *more]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, '-c', code, *words], **pipes, **options)


def last_line(process):
    "The exit code of a process, and the last line of its errors; no traceback"
    _, errors = process.communicate(timeout=300)
    assert 'Traceback' not in errors, errors
    return process.returncode, errors.strip().splitlines()[-1]


# ---- numbers


@pytest.mark.parametrize('bad', [1, 49, 50, 51, 120])
def test_a_loss_that_is_no_number_ends_the_loop_at_its_step(bad):
    theta = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=0.)

    def loss(step):
        return dict(loss=theta.sum()*(float('nan') if step == bad else 1.))

    with pytest.raises(FloatingPointError, match=f'the loss is nan in step {bad}$'):
        fit([theta], [range(1, 130)], loss, optimizer)


def test_a_stage_whose_numbers_are_lost_says_which_and_what_to_try(run):
    settings = override(run.settings, multitask=dict(lr=1e30))
    models = Models(Run(settings, folder=None), seed=0)
    with pytest.raises(FloatingPointError) as failure:
        models.multitask
    text = str(failure.value)
    assert text.startswith('stage seed0-multitask: ')
    assert text.endswith('try a smaller rate, --set multitask.lr=1e+29')


def test_a_part_with_numbers_that_are_none_is_not_kept(run, monkeypatch):
    from dataclasses import replace

    from hyperclip_nb.lab.models import STAGES

    def broken(models, **settings):
        return torch.tensor([1., float('inf')])

    lost = replace(STAGES['multitask'], train=broken, untrained=None, name='lost')
    monkeypatch.setitem(STAGES, 'lost', lost)
    with pytest.raises(FloatingPointError, match='values that are no numbers'):
        Models(run, seed=0).lost
    assert not list(run.folder.glob('stages/*lost*'))


# ---- stopped


@pytest.mark.parametrize('sign', [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_how_it_goes_on(tmp_path, sign):
    long = ['--set', 'multitask.epochs=2000', '--methods', 'multitask']
    folder = tmp_path/'a run [1]'
    process = hyperclip_process(folder, *long)
    end = time.time() + 120
    while not (folder/'grid.json').exists() and time.time() < end:
        time.sleep(.02)
    process.send_signal(sign)
    code, line = last_line(process)
    assert code == 130
    assert line.startswith('stopped; this goes on where it was: hyperclip reproduce')
    assert str(folder) in shlex.split(line) # a shell reads it as one word
    assert not list(tmp_path.rglob('.*.part'))


# ---- full


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # bytes a file

    process = hyperclip_process(
        tmp_path/'run', '--methods', 'multitask', preexec_fn=small_disk,
    )
    code, line = last_line(process)
    assert code == 2 and line.startswith('error: ') and 'too large' in line
    assert not list(tmp_path.rglob('.*.part'))


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path/'a.txt', 'old')

    def full(file):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='No space left'):
        atomic_write(tmp_path/'a.txt', 'new')
    assert (tmp_path/'a.txt').read_text() == 'old'
    assert [path.name for path in tmp_path.iterdir()] == ['a.txt']


def test_too_little_memory_is_one_line(tmp_path):
    def little_memory():
        limit = 4*2**30  # enough to import PyTorch
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    large = ['--set', 'adapter.hidden=2000000', '--methods', 'multitask']
    process = hyperclip_process(tmp_path/'run', *large, preexec_fn=little_memory)
    code, line = last_line(process)
    assert code == 1 and line.startswith('error: there is too little memory;')


def test_a_file_that_vanished_is_made_again(run):
    models = Models(run, seed=0)
    before = models.multitask.clone()
    file = Path(run.folder)/'stages'/'seed0-multitask.safetensors'
    file.unlink()
    run.parts.clear()
    assert Models(run, seed=0).multitask.equal(before)
    assert read_tensors(file)[0]['value'].equal(before)
