"""A small share of what tools/damage.py and tools/kill_points.py do with thousands."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent/'tools'))
import damage


@pytest.fixture(scope='module')
def lines(tmp_path_factory):
    "What became of some damaged files"
    return damage.damage(tmp_path_factory.mktemp('damage'), n=27*8, seed=1)


def test_no_damaged_file_ends_in_a_traceback(lines):
    crashed = lines[lines.outcome.isin(['crash', 'many lines'])]
    assert not len(crashed), crashed.to_string()


def test_no_damaged_file_of_ours_is_read_as_another(lines):
    lost = lines[lines.outcome == 'lost']
    assert not len(lost), lost.to_string()
    assert (lines.outcome[lines.ours] == 'refused').mean() > .9


def test_without_checksums_damage_would_be_read(tmp_path, monkeypatch):
    "The test above can fail"
    from hyperclip_nb.data import files
    monkeypatch.setattr(files, '_check_seal', lambda path, content: None)
    monkeypatch.setattr(files, '_check_bytes', lambda path, expected: None)
    lines = damage.damage(tmp_path, n=27*8, seed=1)
    assert (lines.outcome == 'lost').sum() > 10
