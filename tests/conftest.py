"""One thread a process, and the files of tests as groups that share a process.

On busy cores two OpenMP threads run far slower than one, and sums in a fixed order
give the same numbers everywhere. Both cores are used by two processes instead."""
import os
import sys
import tempfile
from pathlib import Path

import pytest

# read when torch is imported
for name in 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS':
    os.environ[name] = '1'
os.environ.setdefault('MPLBACKEND', 'agg')  # no display needed
# each process keeps to a core of its own, and its threads do not crowd the others
worker = os.environ.get('PYTEST_XDIST_WORKER', '').removeprefix('gw')
if worker and hasattr(os, 'sched_setaffinity'):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker)%len(cores)]})
# notebooks that run side by side must not share IPython's files
os.environ['IPYTHONDIR'] = tempfile.mkdtemp(prefix='ipython-')

BY_ITSELF = 'test_notebooks', 'test_house' # files whose tests share nothing
SLOW = ( # files that take a minute
    'test_settings_cli', 'test_experiments', 'test_protocol', 'test_data', 'test_cli',
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file that shares fixtures stays in one process"
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition('::')[0]
            return nodeid if Path(file).stem in BY_ITSELF else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    "What takes long starts first"
    items.sort(key=expected_time, reverse=True)


def expected_time(item):
    "Slow files, then notebooks by their size, then all others in their order"
    if item.path.stem in SLOW:
        return float('inf')
    if item.originalname != 'test_runs':
        return 0
    return item.callspec.params['nb'].stat().st_size


@pytest.fixture
def hyperclip(monkeypatch, capsys):
    "Run `hyperclip` in this process: exit code, standard output, standard error"
    from hyperclip_nb.command import cli  # after the threads are set

    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['hyperclip', *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err
    return run
