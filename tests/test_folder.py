"""Pictures and questions of one's own: each fault of a table is told with its file, its
line and a remedy, and nothing is left behind; what is right becomes tasks."""
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from hyperclip_nb.data.folder import read_folder, save_folder
from hyperclip_nb import Writer
from hyperclip_nb.data.metavqa import build_tasks, load_metavqa
from hyperclip_nb.lab.experiments import reproduce
from hyperclip_nb.lab.stages import add_preset
from hyperclip_nb.vision.photographs import encode_files, find_images

QUESTIONS = [f'What color is thing {i}?' for i in range(6)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A folder to stand in, with twelve pictures in two folders"
    monkeypatch.chdir(tmp_path)
    for i in range(12):
        path = Path('pictures')/('cats', 'dogs')[i % 2]/f'{i}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8), (20*i, 0, 0)).save(path)
    return tmp_path


def good_rows():
    "Six questions about twelve pictures each, with two answers"
    return [
        (question, f'{("cats", "dogs")[i % 2]}/{i}.png', ('red', 'blue')[i//6])
        for question in QUESTIONS for i in range(12)
    ]


def write_table(rows, header='question,picture,answer', name='t.csv'):
    "A table with a header; its last line has the number that is given back"
    lines = [header, *(','.join(row) for row in rows)]
    Path(name).write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return len(lines)


RUN = ['data', 'folder', 'pictures', '--csv', 't.csv', '--to', 'out']
SMALL = '--min-images', '12'
Q = QUESTIONS[0]
FAULTS = { # what is wrong: one more row, and what is said of its line
    'no such picture, another ending': (
        (Q, 'cats/0.jpg', 'red'),
        ['no picture cats/0.jpg in pictures', 'do you mean cats/0.png?']),
    'no such picture, another folder': (
        (Q, 'dogs/0.png', 'red'), ['do you mean cats/0.png?']),
    'no such picture, another case': (
        (Q, 'Cats/0.PNG', 'red'), ['do you mean cats/0.png?']),
    'no such picture, a letter wrong': (
        (Q, 'cat/10.pngg', 'red'), ['do you mean cats/10.png?']),
    'no such picture at all': (
        (Q, 'beach.jpeg', 'red'), ['put it into pictures, or correct the cell']),
    'a folder for a picture': ((Q, 'cats', 'red'), ['there is no picture cats']),
    'a picture outside': (
        (Q, '../t.csv', 'red'), ['../t.csv is outside pictures', 'copy it into']),
    'a whole path outside': ((Q, '/etc/hosts', 'red'), ['is outside pictures']),
    'the folder itself': ((Q, '.', 'red'), ['is outside pictures']),
    'no answer': ((Q, 'cats/0.png', ' '), ['there is no answer', 'write it']),
    'no picture': ((Q, '', 'red'), ['there is no picture', 'name one']),
    'no question': (('', 'cats/0.png', 'red'), ['there is no question', 'remove']),
    'a comma too many': (
        (Q, 'cats/0.png', 'red', ' white'), ['4 cells', 'quotation marks']),
    'a question in other capitals': (
        (Q.upper(), 'cats/0.png', 'red'),
        ['of line 2 in another spelling', 'same way']),
    'a question without its mark': (
        (Q[:-1], 'cats/0.png', 'red'), [f'"{Q}" of line 2 in another spelling']),
    'a question with two spaces': (
        (Q.replace(' ', '  '), 'cats/0.png', 'red'), ['another spelling']),
    'a question without examples in another spelling': (
        (Q.lower(), '', ''), ['another spelling']),
    'an answer in other capitals': (
        (QUESTIONS[0], 'cats/2.png', 'Red'), ['"Red" is "red" of line 2']),
    'the same row': ((Q, 'cats/0.png', 'red'), ['the same as line 2', 'remove one']),
    'the same row by another way': (
        (Q, './dogs/../cats/0.png', 'red'), ['the same as line 2']),
    'two answers': (
        (Q, 'cats/0.png', 'blue'),
        ['"blue" here and "red" in line 2', 'keep the right one']),
    'with examples and without': (
        (Q, '', ''), ['has examples in', 'remove this line']),
    'one answer only': (
        ('Is it day?', 'cats/0.png', 'yes'),
        ['one answer only ("yes")', 'add pictures']),
}


@pytest.mark.parametrize('name', FAULTS)
def test_a_fault_is_told_with_its_line_and_a_remedy(here, hyperclip, name):
    row, told = FAULTS[name]
    line = write_table([*good_rows(), row])
    code, _, err = hyperclip(*RUN, *SMALL)
    assert code == 2 and 'Traceback' not in err
    assert f't.csv, line {line}: ' in err
    for words in told:
        assert words in err
    assert not Path('out').exists()


WHOLE = { # what is wrong: the bytes of a table, options, what is said
    'no file': (None, [], ['there is no file t.csv']),
    'an empty file': (b'', [], ['line 1: there is no column "question"']),
    'a missing column': (
        b'question,image,answer\n', [],
        ['line 1: there is no column "picture"', 'call one of', 'image']),
    'two missing columns': (
        b'question\n', [], ['t.csv has 2 mistakes', '"picture"', '"answer"']),
    'a column twice': (
        b'question,picture,answer,Answer\n', [], ['2 columns are called "answer"']),
    'latin-1': (
        'question,picture,answer\nA?,a.png,Zo\xe9\n'.encode('latin-1'), [],
        ['line 2: bytes that are not UTF-8', 'CSV UTF-8']),
    'UTF-16': ('question,picture,answer\n'.encode('utf-16'), [], ['line 1: bytes']),
    'an open quotation mark': (
        b'question,picture,answer\nA?,a.png,"red\nB?,b.png,red\n', [],
        ['line 2: no table', 'quotation mark']),
    'no such column of statements': (
        b'question,picture,answer\n', ['--statements', 'prompt'],
        ['there is no column "prompt"']),
    'no rows': (
        b'question,picture,answer\n', [], ['0 questions with examples to train on']),
}


@pytest.mark.parametrize('name', WHOLE)
def test_a_table_that_cannot_be_read(here, hyperclip, name):
    content, options, told = WHOLE[name]
    if content is not None:
        Path('t.csv').write_bytes(content)
    code, _, err = hyperclip(*RUN, *options)
    assert code == 2 and 'Traceback' not in err and err.startswith('error: ')
    for words in told:
        assert words in err
    assert not Path('out').exists()


OPTIONS = { # what is wrong: a column more, its cells in two lines, what is said
    'no part': ('split', ['train', 'tset'], 'line 3: "tset" is no part of a split'),
    'two parts': ('split', ['train', 'test'], 'line 3: '),
    'no gap': ('statement', ['it is {}', 'it is'], 'the statement "it is" must'),
    'two gaps': ('statement', ['it is {}', '{} {}'], 'write {} once'),
    'two statements': (
        'statement', ['it is {}', 'see {}'], 'another statement ("see {}", not'),
}


@pytest.mark.parametrize('name', OPTIONS)
def test_a_fault_in_a_column_that_may_be_there(here, hyperclip, name):
    column, cells, told = OPTIONS[name]
    rows = good_rows()
    rows[:2] = [(*row, cell) for row, cell in zip(rows, cells)]
    write_table(rows, f'question,picture,answer,{column}')
    code, _, err = hyperclip(*RUN, *SMALL)
    assert code == 2 and told in err and 't.csv, line 3: ' in err
    assert not Path('out').exists()


def test_ten_of_many_mistakes_are_shown(here, hyperclip):
    rows = [(question, f'no/{i}.png', answer)
            for i, (question, _, answer) in enumerate(good_rows())]
    write_table(rows)
    code, _, err = hyperclip(*RUN, *SMALL)
    lines = err.splitlines()
    assert code == 2
    assert lines[0] == 'error: t.csv has 72 mistakes, of which the first 10 are:'
    assert [line.split(':')[0] for line in lines[1:]] == [
        f't.csv, line {number}' for number in range(2, 12)
    ]


def test_too_few_pictures_stop_or_are_left_out(here, hyperclip):
    write_table([*good_rows(), *(('Who?', f'cats/{i}.png', f'a{i//4}')
                                 for i in range(0, 8, 2))])
    code, _, err = hyperclip(*RUN, *SMALL)
    assert code == 2 and 't.csv, line 74: "Who?" has too few pictures' in err
    assert '(4 with 2 answers' in err and 'add pictures until there are 12' in err
    assert not Path('out').exists()
    code, out, err = hyperclip(*RUN, *SMALL, '--leave-out')
    assert code == 0 and 'left out, too few pictures: Who?' in err
    code, out, _ = hyperclip(*RUN, '--min-images', '4')
    assert code == 0 and '5 train, 2 test' in out
    code, _, err = hyperclip('data', 'folder', 'nowhere', '--csv', 't.csv', '--to', 'x')
    assert code == 2 and 'there is no folder nowhere' in err


def test_a_mistake_leaves_older_tasks_as_they_were(here, hyperclip):
    write_table(good_rows())
    assert hyperclip(*RUN, *SMALL)[0] == 0
    before = {path: path.read_bytes() for path in Path('out').iterdir()}
    write_table([*good_rows(), (Q, 'none.png', 'red')])
    assert hyperclip(*RUN, *SMALL)[0] == 2
    assert {path: path.read_bytes() for path in Path('out').iterdir()} == before


@pytest.mark.parametrize('sign', ',;\t')
@pytest.mark.parametrize('start', ['', '\ufeff'])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_tables_of_all_spreadsheets(here, sign, start, end):
    header = sign.join(['No', 'ANSWER', 'Picture ', 'question'])
    lines = [sign.join(['1', f'"{a}, really"', p, q]) for q, p, a in good_rows()]
    text = start + end.join([header, *lines, '', sign*3, ''])
    Path('t.csv').write_bytes(text.encode())
    own = read_folder('pictures', 't.csv', smallest=12)
    assert {part: len(tasks) for part, tasks in own.data.tasks.items()} == {
        'train': 4, 'test': 2}
    assert own.data.tasks['test'][0].answers == ('blue, really', 'red, really')
    assert own.data.images == sorted(f'{("cats", "dogs")[i % 2]}/{i}.png'
                                     for i in range(12))


def test_the_column_split_says_where_a_question_goes(here):
    parts = ['train', 'Train', 'valid', 'test', 'test', '']
    rows = [(*row, parts[QUESTIONS.index(row[0])]) for row in good_rows()]
    write_table(rows, 'question,picture,answer,split')
    own = read_folder('pictures', 't.csv', smallest=12, test_share=0)
    save_folder(own, 'out')
    tasks = load_metavqa('out').tasks
    asked = {part: {task.question for task in some} for part, some in tasks.items()}
    assert asked == dict(
        train={QUESTIONS[0], QUESTIONS[1], QUESTIONS[5]}, valid={QUESTIONS[2]},
        test={QUESTIONS[3], QUESTIONS[4]})


def test_statements(here):
    write_table([*good_rows(), ('Where?', '', '')])
    made = read_folder('pictures', 't.csv', smallest=12)
    assert made.data.tasks['test'][0].prompt.startswith('thing ')
    for_all = read_folder('pictures', 't.csv', 'we see {}', 12)
    assert {t.prompt for t in for_all.data.tasks['train']} == {'we see {}'}
    assert for_all.zero_shot == {'Where?': 'we see {}'}
    rows = [(*row, 'is {}' if row[0] == Q else '') for row in good_rows()]
    write_table(rows, 'question,picture,answer,Says')
    own = read_folder('pictures', 't.csv', 'says', 12)
    prompts = {task.question: task.prompt
               for tasks in own.data.tasks.values() for task in tasks}
    assert prompts[Q] == 'is {}' and prompts[QUESTIONS[1]] != 'is {}'


def test_questions_without_examples_have_a_file(here, hyperclip):
    write_table([*good_rows(), ('Where is [it]?', '', ''), ('Who?',)])
    code, out, _ = hyperclip(*RUN, *SMALL)
    assert code == 0 and 'Questions without examples (2): out/zero_shot.json' in out
    found = json.loads(Path('out/zero_shot.json').read_text(encoding='utf-8'))
    assert set(found) == {'Where is [it]?', 'Who?'}
    assert all(prompt.count('{}') == 1 for prompt in found.values())
    write_table(good_rows())
    assert hyperclip(*RUN, *SMALL)[0] == 0
    assert not Path('out/zero_shot.json').exists()


def test_a_model_knows_the_statements_of_its_data(here, hyperclip):
    "of questions with examples and without, where they are not what we would make"
    add_preset(
        'tiny-folder', 'smoke', multitask=dict(epochs=1), weights=dict(steps=2),
        hvae=dict(steps=20), hyperldm=dict(steps=20), few_shot=dict(steps=1),
    )
    header = 'question,picture,answer,statement'
    own = [(*row, 'one sees {}') for row in good_rows()]
    write_table([*own, ('Who?', '', '', 'here comes {}')], header)
    code, _, err = hyperclip(*RUN, *SMALL, '--statements', 'statement')
    assert code == 0, err
    code, _, err = hyperclip('data', 'features', 'out', '--images', 'pictures')
    assert code == 0, err
    reproduce('tiny-folder', data='out', methods=('hvae-hyperldm-ours',), out='run')
    writer = Writer.from_pretrained('run')
    prompt, answers = writer.read('Who?', ['a cat', 'a dog'])
    assert (prompt, answers) == ('here comes {}', ['a cat', 'a dog'])
    assert writer.write(Q).prompt == 'one sees {}'
    assert '{}' in writer.write('Where is it?').prompt # a question it never met
    first = Path('pictures/cats/0.png')
    words = ['ask', 'Who?', first, '--answers', 'cat,dog', '--model', 'run']
    code, out, err = hyperclip(*words, '--save', 'who.safetensors')
    assert code == 0, err
    code, out, _ = hyperclip('show', 'who.safetensors')
    assert 'here comes {}' in out


def test_links_are_followed(here, hyperclip):
    Path('pictures').rename('far')
    Path('pictures').mkdir()
    Path('pictures/cats').symlink_to(Path('far/cats').resolve())
    Path('pictures/dogs').mkdir()
    for path in Path('far/dogs').iterdir():
        (Path('pictures/dogs')/path.name).symlink_to(path.resolve())
    Path('pictures/dogs/back').symlink_to(Path('pictures').resolve())
    write_table([*good_rows(), (Q, 'cats/0.jpg', 'red')])
    code, _, err = hyperclip(*RUN, *SMALL)
    assert code == 2 and 'do you mean cats/0.png?' in err
    write_table(good_rows())
    assert hyperclip(*RUN, *SMALL)[0] == 0
    stems = [str(i) for i in range(12)]
    assert all(path.exists() for path in find_images('pictures', stems))
    code, out, _ = hyperclip('data', 'features', 'out', '--images', 'pictures')
    assert code == 0 and '12 images are encoded, 0 cannot be read' in out


def test_a_name_with_an_accent_of_either_kind(here):
    for i, form in enumerate(['NFC', 'NFD']):
        name = unicodedata.normalize(form, f'caf\xe9{i}.png')
        Image.new('RGB', (8, 8)).save(Path('pictures')/name)
    rows = good_rows()
    rows += [(Q, f'caf\xe9{i}.png', 'red') for i in range(2)]
    write_table(rows)
    own = read_folder('pictures', 't.csv', smallest=12)
    assert len(own.data.images) == 14


def test_pictures_of_one_name_in_two_folders_are_two(here):
    Image.new('RGB', (8, 8)).save('pictures/dogs/0.png')
    ways = ['cats/0.png', 'dogs/0.png']
    expected = [Path('pictures')/way for way in ways]
    assert find_images('pictures', ways) == expected
    assert [path.resolve() for path in find_images('.', ways)] == [
        path.resolve() for path in expected]
    with pytest.raises(ValueError, match='have the same name'):
        find_images('pictures', ['0'])


# --- what the machine gives ---

NO_SHARED_MEMORY = '''
mount -t tmpfs -o size=16k tmpfs /dev/shm && exec "$0" -c "$1"
'''
ENCODE = '''
from hyperclip_nb.vision.clip import load_clip
from hyperclip_nb.vision.photographs import encode_files
names = [f'{("cats", "dogs")[i % 2]}/{i}.png' for i in range(12)]
print(encode_files(load_clip(), 'pictures', names, ['a star'], 'kept', 4, 2))
'''


def test_features_need_no_shared_memory(here):
    if subprocess.run(['unshare', '-m', 'true'], capture_output=True).returncode:
        pytest.skip('no right to make a file system of its own')
    command = ['unshare', '-m', 'sh', '-c', NO_SHARED_MEMORY, sys.executable, ENCODE]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.stdout == '[]\n', run.stderr


def test_threads_change_nothing(here):
    from hyperclip_nb.vision.clip import load_clip
    clip = load_clip()
    names = [f'{("cats", "dogs")[i % 2]}/{i}.png' for i in range(12)]
    Path('pictures/cats/4.png').write_bytes(b'no picture')
    for workers in 0, 1, 3:
        lost = encode_files(clip, 'pictures', names, ['a'], f'k{workers}', 5, workers)
        assert lost == ['cats/4.png']
    files = [f'k{workers}/images-00000.safetensors' for workers in (0, 1, 3)]
    first, *others = [load_file(file)['features'] for file in files]
    assert all(first.equal(other) for other in others)


def test_names_become_numbers_once(monkeypatch):
    "pandas makes a series of the whole dict each time"
    n, rng = 4000, np.random.default_rng(0)
    asked = pd.DataFrame(dict(
        question=[f'What is nr {i}?' for i in rng.integers(40, size=n)],
        image=[f'image{i}' for i in rng.integers(2000, size=n)],
        answer=rng.choice(list('abc'), n), kind='other',
    ))
    calls, plain = [], pd.Series.map
    monkeypatch.setattr(pd.Series, 'map',
                        lambda *args, **kw: calls.append(1) or plain(*args, **kw))
    build_tasks(asked)
    assert len(calls) < 5
