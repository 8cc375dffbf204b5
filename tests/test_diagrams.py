"Drawings say on their pages what their functions say, for those who cannot see them."
import json
import re
from importlib import import_module
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from hyperclip_nb.paper.diagrams import alt_text

root = Path(__file__).parent.parent
CELL = re.compile(r'#\| fig-alt: (.+)\nfig = (\w+_diagram)\(\)')
shown = []  # (module, name of the function, alternative text on the page)
for module in ('diagrams', 'drawings', 'pictures'):
    for path in (root/'nbs'/'paper').glob(f'[0-9]*_{module}.ipynb'):
        for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
            found = CELL.match(''.join(cell['source']))
            if found:
                shown.append((module, found[2], found[1]))


def test_every_diagram_is_shown():
    for module in ('diagrams', 'drawings', 'pictures'):
        room = import_module(f'hyperclip_nb.paper.{module}')
        made = {n for n in room.__all__ if n.endswith('_diagram')}
        assert made == {name for where, name, _ in shown if where == module}


@pytest.mark.parametrize('module, name, alt', shown)
def test_the_page_has_the_text_of_the_figure(module, name, alt):
    fig = getattr(import_module(f'hyperclip_nb.paper.{module}'), name)()
    assert alt_text(fig) == alt
    plt.close(fig)
