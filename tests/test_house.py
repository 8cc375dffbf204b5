"The house as CONTRIBUTING.md draws it: floors, rooms, and what may import what."
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
FLOORS = [
    'data', 'vision', 'base', 'generators', 'language', 'writer', 'lab', 'command',
    'paper',
]
MAX_LINES = 220  # lines of code in a module
notebooks = sorted((root/'nbs').glob('*/[0-9]*.ipynb'))
modules = [
    path for path in sorted((root/'hyperclip_nb').glob('*/*.py'))
    if path.name != '__init__.py'
]


def name_of(path):
    "A module as 'floor.room'"
    return f'{path.parent.name}.{path.stem}'


def absolute(node, path):
    "The modules that an import statement in `path` reads, as 'floor.room'"
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif node.level == 0:
        names = [node.module, *(f'{node.module}.{a.name}' for a in node.names)]
    else:
        package = ['hyperclip_nb', path.parent.name][:3 - node.level]
        base = '.'.join([*package, *filter(None, [node.module])])
        names = [base, *(f'{base}.{alias.name}' for alias in node.names)]
    rooms = {name_of(p) for p in modules}
    return {n.removeprefix('hyperclip_nb.') for n in names} & rooms


def imports(path, inside_functions=True):
    "What a module imports from this package"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    nodes = ast.walk(tree) if inside_functions else tree.body
    found = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
    return set().union(*(absolute(node, path) for node in found))


def floor_of(room):
    return FLOORS.index(room.partition('.')[0])


def test_every_room_stands_on_a_floor():
    assert {path.parent.name for path in modules} == set(FLOORS)
    assert not [p.name for p in (root/'hyperclip_nb').glob('[!_]*.py')]


@pytest.mark.parametrize('path', modules, ids=name_of)
def test_imports_go_to_the_same_floor_or_lower(path):
    upwards = [r for r in imports(path) if floor_of(r) > floor_of(name_of(path))]
    assert not upwards


def test_imports_make_no_circle():
    graph = {name_of(path): imports(path) for path in modules}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert set(order) == set(graph)


def test_an_upward_import_would_be_seen(tmp_path):
    path = tmp_path/'data'/'tasks.py'
    path.parent.mkdir()
    for line, room in [
        ('from ..lab.runs import Run', 'lab.runs'),
        ('from ..lab import runs', 'lab.runs'),
        ('from .world import World', 'data.world'),
        ('import hyperclip_nb.lab.runs', 'lab.runs'),
        ('def f():\n    from hyperclip_nb.base import adapt', 'base.adapt'),
    ]:
        path.write_text(line)
        assert imports(path) == {room}


@pytest.mark.parametrize('path', modules, ids=name_of)
def test_a_room_is_one_idea(path):
    "Lines of code, without comments, docstrings and empty lines"
    source = path.read_text(encoding='utf-8')
    docs = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, 'body', None)
        if not isinstance(body, list) or not body:
            continue
        first = body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            docs.update(range(first.lineno, first.end_lineno + 1))
    code = [
        line for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith('#') and number not in docs
    ]
    assert len(code) <= MAX_LINES


def test_notebooks_are_numbered_in_reading_order():
    numbers = [int(path.name[:2]) for path in notebooks]
    floors = [FLOORS.index(path.parent.name) for path in sorted(notebooks, key=number)]
    assert sorted(numbers) == list(range(len(numbers)))
    assert floors == sorted(floors)


def number(path):
    return int(path.name[:2])


@pytest.mark.parametrize('path', modules, ids=name_of)
def test_a_module_comes_from_the_notebook_of_its_name(path):
    names = {f'{nb.parent.name}.{nb.stem[3:]}' for nb in notebooks}
    assert name_of(path) in names


def test_the_sidebar_names_every_notebook():
    sidebar = (root/'nbs'/'sidebar.yml').read_text(encoding='utf-8')
    missing = [
        path.name for path in notebooks
        if f'{path.parent.name}/{path.name}' not in sidebar
    ]
    assert not missing
