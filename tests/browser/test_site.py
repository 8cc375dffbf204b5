"""The built site in a real browser: every page, at two widths, in light and dark.

`.ci/site` builds it, `.ci/browser` runs this; `pytest` alone leaves it out."""
import functools
import http.server
import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

api = pytest.importorskip('playwright.sync_api')
root = Path(__file__).parents[2]
site = root/'_docs'
PAGES = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))
NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable'
FOUND = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    not PAGES or not FOUND, reason='needs _docs/ (.ci/site) and Chromium')
SEVERAL = [ # pages of all kinds, for what takes long
    'index.html', 'prologue.html', 'playground.html', 'language/ddpm.html',
    'data/tasks.html', 'lab/results.html', 'paper/line_by_line.html',
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='session')
def address():
    "Where the site is served"
    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}'
    server.shutdown()


@pytest.fixture(scope='session')
def browser():
    with api.sync_playwright() as playwright:
        options = dict(executable_path=FOUND, args=['--no-sandbox'])
        browser = playwright.chromium.launch(**options)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, address):
    "A function that opens a page, and what the page complained about"
    contexts = []

    def open_page(name, width=1280, scheme='light'):
        context = browser.new_context(
            viewport=dict(width=width, height=900), color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on('pageerror', lambda error: page.complaints.append(str(error)))
        page.on('console', lambda said: said.type == 'error' and
                page.complaints.append(said.text))
        page.on('request', lambda request: request.url.startswith((address, 'data:'))
                or page.complaints.append(f'asks {request.url}'))
        page.goto(f'{address}/{name}', wait_until='load')
        return page

    yield open_page
    for context in contexts:
        context.close()


WIDER = '''() => {
    const inside = node => {
        for (let at = node.parentElement; at; at = at.parentElement) {
            const look = getComputedStyle(at);
            if (look.overflowX !== 'visible' || look.position === 'fixed') return true;
        }
        return false;
    };
    return [...document.querySelectorAll('body *')].filter(node => {
        const place = node.getBoundingClientRect();
        const hidden = place.width === 0 || place.height === 0;
        return !hidden && place.right > innerWidth + 1 && !inside(node);
    }).map(node => node.tagName + '.' + node.className).slice(0, 5);
}'''


@pytest.mark.parametrize('name', PAGES)
def test_a_page_is_whole(opened, name):
    page = opened(name)
    assert page.complaints == []
    pictures = page.eval_on_selector_all(
        'main img', 'all => all.map(i => [i.complete && i.naturalWidth > 0, i.alt])')
    assert all(shown for shown, _ in pictures), 'a picture is not shown'
    assert all(alt for _, alt in pictures), 'a picture has no alternative text'
    for width in 1280, 390:
        page.set_viewport_size(dict(width=width, height=900))
        room = page.evaluate('document.documentElement.scrollWidth')
        assert room <= width, f'{room} wide at {width}: {page.evaluate(WIDER)}'
        assert page.evaluate(WIDER) == []


CUT = '''() => {
    const boxes = 'pre, .cell-output-display, table, .katex-display';
    return [...document.querySelectorAll(`main :is(${boxes})`)].filter(node => {
        const scrolls = getComputedStyle(node).overflowX !== 'visible';
        return node.offsetParent && scrolls && node.scrollWidth > node.clientWidth + 2;
    }).map(node => node.innerText.slice(0, 80));
}'''


@pytest.mark.parametrize('name', PAGES)
def test_nothing_hides_behind_an_edge(opened, name):
    page = opened(name)
    page.wait_for_timeout(200) # until formulas are set
    assert page.evaluate(CUT) == []


CONTRAST = '''() => {
    const light = ([r, g, b]) => {
        const line = x => x <= .03928 ? x/12.92 : ((x + .055)/1.055)**2.4;
        return .2126*line(r/255) + .7152*line(g/255) + .0722*line(b/255);
    };
    const parse = text => (text.match(/[0-9.]+/g) || []).map(Number);
    const over = (top, under) => {
        const a = top.length > 3 ? top[3] : 1;
        return [0, 1, 2].map(i => a*top[i] + (1 - a)*under[i]);
    };
    const ground = node => {
        if (!node) return [255, 255, 255];
        const look = getComputedStyle(node), color = parse(look.backgroundColor);
        if (color.length < 4 || color[3] === 1) return color;
        return over(color, ground(node.parentElement));
    };
    const found = new Set();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const node = walker.currentNode.parentElement;
        const text = walker.currentNode.textContent.trim();
        const place = node.getBoundingClientRect(), look = getComputedStyle(node);
        if (!text || !place.width || look.visibility === 'hidden') continue;
        if (node.closest('script, style, noscript, svg, .katex-mathml')) continue;
        if (parse(look.color)[3] === 0) continue; // room that a formula leaves
        const below = ground(node), color = over(parse(look.color), below);
        const [a, b] = [light(color), light(below)];
        const ratio = (Math.max(a, b) + .05)/(Math.min(a, b) + .05);
        const size = parseFloat(look.fontSize), bold = look.fontWeight >= 700;
        const large = size >= 24 || (bold && size >= 18.66);
        if (ratio < (large ? 3 : 4.5))
            found.add(`${node.tagName}.${node.className} ${look.color} on ` +
                      `${below}: ${ratio.toFixed(2)} "${text.slice(0, 20)}"`);
    }
    return [...found].slice(0, 12);
}'''


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('name', SEVERAL)
def test_words_can_be_read(opened, name, scheme):
    page = opened(name, scheme=scheme)
    page.eval_on_selector_all('main details', 'all => all.forEach(d => d.open = true)')
    dark = page.evaluate('document.documentElement.classList.contains("quarto-dark")')
    assert dark == (scheme == 'dark')
    assert page.evaluate(CONTRAST) == []


def search(page, words):
    page.locator('#quarto-search input').fill(words)
    page.wait_for_selector('.search-result')
    return page.locator('.search-result')


@pytest.mark.parametrize('words, where', [
    ('linear_schedule', 'language/ddpm.html'),
    ('classifier-free', 'language/cfg.html'),
])
def test_search_finds_and_shows(opened, words, where):
    page = opened('index.html')
    found = search(page, words)
    targets = found.evaluate_all('all => all.map(a => a.getAttribute("href"))')
    assert any(where in target for target in targets)
    shown = page.locator('.search-result', has_text=words).first
    assert shown.is_visible()
    marks = page.locator('.search-result-text mark')
    if marks.count():
        assert page.evaluate(CONTRAST) == []
    page.locator('#quarto-search input').press('Enter')
    page.wait_for_url(re.compile('html'))


def test_search_loses_no_words():
    "of what is between < and >, and of inline code"
    index = json.loads((site/'search.json').read_text(encoding='utf-8'))
    text = ' '.join(entry['text'] for entry in index)
    assert '<' in text and '>' in text
    for entry in index:
        assert not re.search('</?(p|code|em|span|div|a)[ >]', entry['text']), entry


def test_the_page_that_moves_answers_to_keys(opened):
    page = opened('playground.html', width=390)
    total = page.locator('.hc-play .sum')
    says = page.locator('.hc-play .says')
    assert says.count() == 12
    before = says.all_inner_texts()
    slider = page.locator('#hc-gamma')
    slider.focus()
    for _ in range(4):
        slider.press('ArrowLeft')
    assert page.locator('.hc-play output').inner_text() == '0'
    assert says.all_inner_texts() != before
    words = total.inner_text()
    first = page.locator('.hc-play input[type=radio]').first
    first.focus()
    first.press('ArrowDown')
    assert page.locator('.hc-play input[type=radio]').nth(1).is_checked()
    assert total.inner_text() != words or says.all_inner_texts() != before
    good = page.locator('.hc-play li.good').count()
    assert f'right in {good} of 12' in total.inner_text()


def test_the_front_page_says_what_the_results_say(opened):
    "Each number of its table, computed again from the files of the runs"
    rows = opened('index.html').locator('table', has_text='who answers').last
    shown = rows.locator('tbody tr').evaluate_all(
        'all => all.map(r => [...r.cells].map(c => c.innerText))')
    assert len(shown) == 5
    tuned = dict(method='hvae-hyperldm-tuned', gamma=2., samples=8)
    wanted = {
        'CLIP alone': dict(method='clip', setting='zero-shot'),
        'floor': dict(method='multitask', setting='zero-shot'),
        'HyperLDM': dict(setting='zero-shot', **tuned),
        'ceiling': dict(
            method='hvae-hyperldm-tuned', setting='few-shot', images=None),
    }
    for name, row in wanted.items():
        line, = [cells for cells in shown if cells[0].startswith(name)]
        for text, folder in zip(line[1:], ('smoke', 'fresh')):
            found = []
            for path in sorted((root/'results'/folder).glob('*/results.json')):
                lines = json.loads(path.read_text(encoding='utf-8'))['rows']
                one, = [r for r in lines if row.items() <= r.items()]
                found.append(one['accuracy'])
            spread = np.std(found, ddof=1)
            assert text == f'{np.mean(found):.1f} ({spread:.1f})'


def test_each_page_leads_to_its_notebook():
    for name in PAGES:
        text = (site/name).read_text(encoding='utf-8')
        notebook = re.search(r'/blob/main/nbs/([\w/]+\.ipynb)">Notebook', text)
        assert notebook and (root/'nbs'/notebook[1]).is_file(), name
        assert f'blob/main/nbs/{notebook[1]}">Run in Colab' in text
        assert 'rel="canonical"' in text
        for leak in f'{root}/', '/tmp/tmp', f'{Path.home()}/':
            assert leak not in text, f'{name} shows a path of this machine'
