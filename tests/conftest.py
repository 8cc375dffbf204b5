"""One thread a process, and the files of tests as groups that share a process.

On busy cores two OpenMP threads run far slower than one, and sums in a fixed order
give the same numbers everywhere. Both cores are used by two processes instead."""
import os
import tempfile

import pytest

# read when torch is imported
for name in 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS':
    os.environ[name] = '1'
os.environ.setdefault('MPLBACKEND', 'agg')  # no display needed
# notebooks that run side by side must not share IPython's files
os.environ['IPYTHONDIR'] = tempfile.mkdtemp(prefix='ipython-')

BY_ITSELF = 'test_notebooks', 'test_house'  # files whose tests share nothing


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    "A file that shares fixtures stays in one process; the long notebooks start first"
    items.sort(key=expected_time, reverse=True)
    for item in items:
        if item.module.__name__ not in BY_ITSELF:
            item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def expected_time(item):
    "A notebook takes about as long as it is large; other tests follow in their order"
    path = getattr(item, 'callspec', None) and item.callspec.params.get('nb')
    if path is None or item.originalname != 'test_runs':
        return 0
    return path.stat().st_size
