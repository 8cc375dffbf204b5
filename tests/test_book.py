"Each chapter opens, shows, checks and ends as CONTRIBUTING says."
import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest
import yaml

root = Path(__file__).parent.parent
nbs = root/'nbs'


def listed(contents):
    "Notebooks of the sidebar in reading order"
    for item in contents:
        if isinstance(item, dict):
            yield from listed(item['contents'])
        else:
            yield item


sidebar = yaml.safe_load((nbs/'sidebar.yml').read_text(encoding='utf-8'))
ORDER = list(listed(sidebar['website']['sidebar']['contents']))
FRONT = 'index', 'prologue', 'playground', 'contents', 'notation'
CHAPTERS = [name for name in ORDER if Path(name).stem not in FRONT]
chapter = pytest.mark.parametrize('name', CHAPTERS, ids=lambda name: Path(name).stem)
page = pytest.mark.parametrize('name', ORDER, ids=lambda name: Path(name).stem)


@cache
def cells_of(name):
    "Kind, text and outputs of each cell"
    book = json.loads((nbs/name).read_text(encoding='utf-8'))
    return [
        (cell['cell_type'], ''.join(cell['source']), cell.get('outputs', []))
        for cell in book['cells']
    ]


def options(source):
    "The `#|` lines of a cell"
    found = {}
    for line in source.splitlines():
        if not line.startswith('#|'):
            break
        key, _, value = line[2:].strip().partition(':')
        found[key.split()[0]] = value.strip()
    return found


def is_hidden(source):
    return 'hide' in options(source) or 'default_exp' in options(source)


def is_checked(statement):
    "Is this statement an assertion?"
    if isinstance(statement, ast.Assert):
        return True
    call = statement.value if isinstance(statement, ast.Expr) else None
    name = getattr(getattr(call, 'func', None), 'id', '')
    return name.startswith('test_') or name == 'ExceptionExpected'


def statements(source):
    "Statements of a cell; none of one that Python alone cannot read"
    try:
        return ast.parse(source).body
    except SyntaxError:
        return []


@chapter
def test_opening_says_what_where_and_how_long(name):
    texts = [text for kind, text, _ in cells_of(name)[:5] if kind == 'markdown']
    opening = '\n'.join(texts)
    assert re.search(r'^# .+\n\n> .+', opening, re.M), 'a title and one line'
    assert 'you can' in opening, 'say what a reader will be able to do'
    line = r'^\*\*Paper:\*\* .+ \*\*Needs:\*\* .+ \*\*Runs:\*\* .+$'
    message = 'one line: **Paper:** ... **Needs:** ... **Runs:** ...'
    assert re.search(line, opening, re.M), message


@chapter
def test_imports_are_seen(name):
    for kind, text, _ in cells_of(name):
        if kind == 'code' and is_hidden(text):
            lines = re.findall(r'^(?:import|from) (\w+)', text, re.M)
            assert set(lines) <= {'nbdev'}, f'a hidden cell imports {lines}'
        if kind == 'code' and 'export' in options(text):
            body = statements(text)
            only = all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in body)
            assert not body or not only, 'imports: use #| exports'


@page
def test_imports_stand_alone(name):
    "The builder of the site runs whatever shares a cell with them"
    for kind, text, _ in cells_of(name):
        if kind != 'code' or '#| export' in text or 'nbdev_export()' in text:
            continue
        found = [isinstance(s, (ast.Import, ast.ImportFrom)) for s in statements(text)]
        assert all(found) or not any(found), text


@page
def test_each_figure_has_caption_and_alt_text(name):
    cells = cells_of(name)
    for number, (kind, text, outputs) in enumerate(cells):
        data = [key for output in outputs for key in output.get('data', {})]
        if kind != 'code' or not {'image/png', 'image/svg+xml'} & set(data):
            continue
        alt = options(text).get('fig-alt', '')
        assert len(alt) > 20, f'cell {number} lacks #| fig-alt: one line, 88 columns'
        parsed = yaml.safe_load(f'fig-alt: {alt}')['fig-alt']
        assert isinstance(parsed, str), f'cell {number}: {alt} is not one text'
        after = cells[number + 1][:2] if number + 1 < len(cells) else ('', '')
        caption = re.match(r'\*(?!\*)[^*]+\*(\n|$)', after[1])
        message = f'cell {number} is a figure: its caption, *in italics*, follows it'
        assert after[0] == 'markdown' and caption, message


@chapter
def test_checks_are_folded(name):
    section = 0
    for number, (kind, text, _) in enumerate(cells_of(name)):
        if kind == 'markdown':
            if re.search(r'^## ', text, re.M):
                section = 0
            continue
        body = statements(text)
        if options(text).get('code-summary', '').startswith('Checks'):
            assert options(text).get('code-fold') == 'true'
            section += 1
            assert section == 1, f'cell {number}: one cell of checks a section'
        elif 'code-fold' not in options(text) and not is_hidden(text):
            only = body and all(is_checked(s) for s in body)
            message = f'cell {number} has assertions: fold them'
            assert not only or len(body) <= 3, message


@chapter
def test_end_leads_on_and_has_three_exercises(name):
    cells = [(k, t) for k, t, _ in cells_of(name) if not (k == 'code' and is_hidden(t))]
    texts = [t if k == 'markdown' else '' for k, t in cells]
    starts = [i for i, text in enumerate(texts) if text.startswith('## Exercises')]
    assert len(starts) == 1, 'one section "## Exercises", a cell that begins with it'
    start = starts[0]
    after = texts[start + 1:]
    assert not any(re.match('## ', text) for text in after), 'it is the last'
    following = CHAPTERS[CHAPTERS.index(name) + 1:][:1]
    before = next(text for text in reversed(texts[:start]) if text)
    for other in following:
        assert Path(other).name in before, f'the text before them leads on to {other}'
    parts = [[]]
    for kind, text in cells[start:]:
        if kind == 'markdown' and re.search(r'^\*\*\d\.\*\*', text, re.M):
            assert len(re.findall(r'^\*\*\d\.\*\*', text, re.M)) == 1
            parts.append([])
        parts[-1].append((kind, text))
    numbers = [re.search(r'^\*\*(\d)\.\*\*', part[0][1], re.M)[1] for part in parts[1:]]
    assert numbers == ['1', '2', '3'], '**1.** **2.** **3.**, each in a cell of its own'
    for part in parts[1:]:
        folded = any(
            '<details>' in text or options(text).get('code-summary') == 'Solution'
            for kind, text in part
        )
        assert folded, 'a folded solution behind each'
