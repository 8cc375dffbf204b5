"Every notebook runs, is clean, and is what `hyperclip_nb/` was exported from."
import atexit
import contextlib
import ctypes
import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import nbdev.test
import pytest
from nbdev.test import test_nb

test_nb.__test__ = False  # a helper, although its name looks like a test
root = Path(__file__).parent.parent
notebooks = sorted((root/'nbs').rglob('[!_.]*.ipynb'))
each = pytest.mark.parametrize('nb', notebooks, ids=lambda p: p.stem)
EXPORT = '''
from nbdev.clean import nbdev_clean
from nbdev.doclinks import nbdev_export
nbdev_clean()
nbdev_export()
'''


@pytest.fixture
def registers():
    "What a notebook registers (stages, methods, presets) is forgotten after it"
    from hyperclip_nb.lab import methods, models, settings
    kept = [
        (register, dict(register)) for register in (
            models.STREAMS, models.STAGES, models.DERIVED, settings.SETTINGS,
            settings._added, methods.METHODS,
        )
    ]
    yield
    for register, content in kept:
        register.clear()
        register.update(content)


@pytest.fixture
def forgotten(monkeypatch):
    "What a notebook holds in memory goes with it: IPython keeps every shell to the end"
    shells = []

    class Shell(nbdev.test.CaptureShell):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            shells.append(self)

    monkeypatch.setattr(nbdev.test, 'CaptureShell', Shell)
    yield
    for shell in shells:
        atexit.unregister(shell.atexit_operations)
        shell.user_ns.clear()
    shells.clear()
    plt.close('all')
    gc.collect()
    with contextlib.suppress(OSError, AttributeError): # glibc alone has it
        ctypes.CDLL('libc.so.6').malloc_trim(0)


@each
def test_runs(nb, capsys, monkeypatch, registers, forgotten):
    monkeypatch.setenv('IN_TEST', '1')  # `test_nb` sets it and leaves it
    monkeypatch.setattr(sys, 'path', sys.path[:])
    # a notebook takes its place, and processes that are started later look at it
    monkeypatch.setitem(sys.modules, '__main__', sys.modules['__main__'])
    with monkeypatch.context() as m:
        m.chdir(root)
        ok, _ = test_nb(nb, skip_flags=['notest'], basepath=root)
    if not ok:
        pytest.fail(capsys.readouterr().err, pytrace=False)


@pytest.fixture(scope='session')
def fresh(tmp_path_factory):
    "A copy of the project, its notebooks cleaned and its modules exported anew."
    new = tmp_path_factory.mktemp('project')
    shutil.copy(root/'settings.ini', new)
    shutil.copytree(root/'nbs', new/'nbs')
    # with IN_TEST nbdev exports nothing
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    subprocess.run([sys.executable, '-c', EXPORT], cwd=new, env=env, check=True)
    return new


@each
def test_clean(nb, fresh):
    name = nb.relative_to(root)
    message = f'run `nbdev_clean --fname {name}`'
    assert nb.read_bytes() == (fresh/name).read_bytes(), message


def modules(folder):
    "The source of each module, by its path"
    paths = sorted((folder/'hyperclip_nb').rglob('*.py'))
    paths = [p for p in paths if p.name != '__main__.py'] # it runs, so no cell has it
    return {str(p.relative_to(folder)): p.read_text(encoding='utf-8') for p in paths}


def test_export(fresh):
    old, new = modules(root), modules(fresh)
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    message = f'run `nbdev_export`: {", ".join(differ)} differ from the notebooks'
    assert not differ, message


def test_readme():
    made = subprocess.run(
        [sys.executable, root/'.ci/readme'],
        capture_output=True, text=True, encoding='utf-8', check=True,
    )
    message = 'run `.ci/refresh index`: README.md is made from nbs/index.ipynb'
    assert (root/'README.md').read_text(encoding='utf-8') == made.stdout, message
    assert '.ipynb)' not in made.stdout and '.ipynb#' not in made.stdout # pages
