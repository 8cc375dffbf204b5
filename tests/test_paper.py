"The list of the paper's lines holds what it promises, and leaves nothing out."
from pathlib import Path

import pytest

from hyperclip_nb.paper.line_by_line import missing, problems, read_lines, waits

root = Path(__file__).parent.parent
lines = read_lines(root/'nbs'/'paper'/'line_by_line.csv')
EQUATION = next(lines[lines.kind == 'equation'].itertuples())


def test_every_line_is_where_it_says():
    found = [problem for line in lines.itertuples() for problem in problems(line, root)]
    assert not found, '\n'.join(found)


def test_nothing_of_the_paper_is_left_out():
    assert not missing(lines)


def test_no_line_stands_twice():
    assert not lines.duplicated(['kind', 'number', 'says']).any()


@pytest.mark.parametrize('change, says', [
    (dict(chapter='language/29_gone.ipynb'), 'does not exist'),
    (dict(heading='Nowhere'), "0 headings 'Nowhere'"),
    (dict(heading=''), "0 headings ''"),
    (dict(code='language.gone:guide'), 'cannot be imported'),
    (dict(code='language.ddpm:gone'), 'cannot be imported'),
    (dict(code=''), 'must be named'),
    (dict(check='tests/test_ddpm.py::test_gone'), "no 'test_gone'"),
    (dict(check='tests/test_gone.py::test_gone'), "no 'test_gone'"),
    (dict(check='language/33_ddpm.ipynb: 00000000'), "no '00000000'"),
    (dict(status='perhaps'), 'is none of'),
    (dict(status='ours differs', note=''), 'how ours differs'),
    (dict(status='not reproduced', note='later'), 'what it would take'),
])
def test_a_wrong_line_is_named(change, says):
    found = problems(EQUATION._replace(**change), root)
    assert len(found) == 1 and says in found[0]


def test_only_chapters_of_this_floor_may_still_be_missing():
    assert waits(EQUATION._replace(chapter='paper/99_later.ipynb'), root)
    assert not waits(EQUATION._replace(chapter='lab/99_later.ipynb'), root)
    written = {path.name for path in (root/'nbs'/'paper').glob('*.ipynb')}
    for line in lines[lines.chapter.str.startswith('paper/')].itertuples():
        assert waits(line, root) == (Path(line.chapter).name not in written)
