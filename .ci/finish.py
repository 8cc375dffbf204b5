"What both builders leave to do on the pages of the docs site."
import functools
import html
import re
from pathlib import Path

HEADER = re.compile(r'<header id="title-block-header".*?</header>', re.S)
ROOT = Path(__file__).parent.parent.resolve()
WEB_FONT = re.compile(r'@import url\([^)]*fonts\.googleapis\.com[^)]*\);?')
SYMBOL = re.compile(r'<a href="([^"#]*)#([\w.]+)">(<code>[^<]*</code>)</a>')
CAPTION = re.compile(r'<p>(<em>(?:(?!</em>|<p>).)*</em>)</p>', re.S)
SOLUTION = re.compile(r'<details class="code-fold">(\s*<summary>Solution</summary>)')
COLAB = 'https://colab.research.google.com/github/'


def drop_web_fonts(site):
    "A theme asks for a font of another host; the fonts of the system do as well."
    for sheet in site.rglob('*.css'):
        text = sheet.read_text(encoding='utf-8')
        if 'fonts.googleapis.com' in text:
            sheet.write_text(WEB_FONT.sub('', text), encoding='utf-8')


def page_links(notebook, repo, branch):
    "Where a page's notebook is: to read, to run, to edit."
    path = f'{branch}/nbs/{notebook}'
    github = repo.removeprefix('https://github.com/')
    links = {
        'Notebook': f'{repo}/blob/{path}',
        'Run in Colab': f'{COLAB}{github}/blob/{path}',
        'Edit': f'{repo}/edit/{path}',
    }
    anchors = [f'<a href="{html.escape(to)}">{text}</a>' for text, to in links.items()]
    return f'<p class="page-links">{" ".join(anchors)}</p>'


@functools.cache
def names_of(page):
    "What links can point at on a page"
    return set(re.findall(r' id="([^"]+)"', page.read_text(encoding='utf-8')))


def known_symbols(text, page):
    "A page whose links to symbols lead to those that are shown; others are words."
    def link(match):
        target = (page.parent/match[1]).resolve() if match[1] else page
        known = target.is_file() and match[2] in names_of(target)
        return match[0] if known else match[3]

    return SYMBOL.sub(link, text)


def finish_page(text, address, notebook, cfg):
    "A page with its own address, and links to its notebook; no path of this machine."
    # what a solution prints is folded with its code, by the style sheet
    text = SOLUTION.sub(r'<details class="code-fold solution">\1', text)
    text = CAPTION.sub(r'<p class="caption">\1</p>', text.replace(f'{ROOT}/', ''))
    if 'rel="canonical"' not in text:
        canonical = f'<link rel="canonical" href="{address}">'
        text = text.replace('</head>', canonical + '</head>', 1)
    links = page_links(notebook, cfg.git_url, cfg.branch)
    return HEADER.sub(lambda m: m[0] + links, text, count=1)


def finish(cfg, url):
    "Finish every page of the site"
    from nbdev.doclinks import _nbpath2html, nbglob

    drop_web_fonts(cfg.doc_path)
    for path in nbglob(as_path=True):
        notebook = path.relative_to(cfg.nbs_path)
        page = (cfg.doc_path/_nbpath2html(notebook)).resolve()
        address = f'{url}/{_nbpath2html(notebook).as_posix()}'
        text = known_symbols(page.read_text(encoding='utf-8'), page)
        text = finish_page(text, address, notebook.as_posix(), cfg)
        page.write_text(text, encoding='utf-8')
