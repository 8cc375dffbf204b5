"What chapters cite stands in nbs/references.bib, whole and once."
import json
import re
from pathlib import Path

import pytest

from hyperclip_nb.paper.related import (
    cited_keys, link_citations, read_references, reference_list,
)

root = Path(__file__).parent.parent
notebooks = sorted((root/'nbs').rglob('[!_.]*.ipynb'))
references = read_references(root/'nbs'/'references.bib')
ENTRY = '@misc{a2020b,\n  author = {A, B},\n  year = {2020},\n}\n'


def cells(path, kind):
    "The cells of one kind of a notebook"
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [cell for cell in found if cell['cell_type'] == kind]


def markdown(path):
    "The text of a notebook"
    return '\n\n'.join(''.join(cell['source']) for cell in cells(path, 'markdown'))


@pytest.mark.parametrize('path', notebooks, ids=lambda path: path.stem)
def test_every_cited_work_is_in_the_list(path):
    assert not [key for key in cited_keys(markdown(path)) if key not in references]


@pytest.mark.parametrize('path', notebooks, ids=lambda path: path.stem)
def test_citations_have_the_form_that_both_builders_know(path):
    "`[@key]` or `[@key; @other]`, and no other @ in the text"
    text = re.sub(r'```.*?```|`[^`]*`', '', markdown(path), flags=re.S)
    text = link_citations(text, references)
    assert not re.findall(r'(?<!\w)-?@\w+', text)


def test_the_front_page_cites_nothing():
    "README.md is made of it, and is read without a builder"
    assert not cited_keys(markdown(root/'nbs'/'index.ipynb'))


@pytest.mark.parametrize('key', references)
def test_an_entry_is_whole(key):
    entry = references[key]
    assert {'author', 'title', 'year'} <= set(entry)
    assert {'url', 'eprint'} & set(entry)
    assert re.fullmatch(r'(19|20)\d\d', entry['year'])
    assert all(', ' in name for name in entry['author'].split(' and '))
    assert re.search(r'\d{4}', key)[0] == entry['year']


def test_entries_stand_in_order():
    order = [(entry['year'], key) for key, entry in references.items()]
    assert order == sorted(order)


def test_the_printed_list_is_that_of_the_file():
    outputs = [
        ''.join(output.get('data', {}).get('text/markdown', ''))
        for cell in cells(root/'nbs'/'paper'/'96_related.ipynb', 'code')
        for output in cell['outputs']
    ]
    assert reference_list(references) in outputs, 'run `.ci/refresh 96_related`'


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path/'twice.bib'
    path.write_text(ENTRY + ENTRY)
    with pytest.raises(ValueError, match='two entries a2020b'):
        read_references(path)


def test_an_entry_of_another_form_is_refused(tmp_path):
    path = tmp_path/'other.bib'
    for text in ENTRY.replace('  author', 'author'), '@misc{a2020b, author={A, B}}\n':
        path.write_text(text)
        with pytest.raises(ValueError, match='one field a line'):
            read_references(path)
