"""The command as a user meets it: what it prints and leaves behind, and one line with
exit code 2 for a mistake."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from hyperclip_nb.vision.clip import load_clip

STAR = 'What color is the star?'


@pytest.fixture
def here(tmp_path, monkeypatch):
    "An empty folder to stand in, with one good picture and files that are none"
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 30), 90).convert('RGB').save('good.png')
    Path('half.png').write_bytes(Path('good.png').read_bytes()[:200])
    Path('text.jpg').write_text('no picture')
    Path('half.safetensors').write_bytes(b'\x08\0\0\0')
    save_file(dict(W1=torch.zeros(2, 2)), 'small.safetensors')
    return tmp_path


def run_python(program, *args):
    "Run a program in a fresh interpreter"
    command = [sys.executable, '-c', program, *args]
    return subprocess.run(command, capture_output=True, text=True)


SMOKE = ['reproduce', '--preset', 'smoke']
ASK = ['ask', STAR, 'good.png']
VQA_QUESTIONS = 'v2_OpenEnded_mscoco_train2014_questions.json'
MISTAKES = [ # what was typed, and what is named
    (['reproduce', '--preset', 'huge'], 'smoke'),
    ([*SMOKE, '--gamma', '1,x'], 'numbers'),
    ([*SMOKE, '--device', 'abacus'], 'cpu'),
    ([*SMOKE, '--clip', 'ViT-Q'], 'unknown CLIP'),
    ([*SMOKE, '--seed', '-1'], 'seed'),
    ([*SMOKE, '--methods', 'clip,magic'], 'magic'),
    ([*SMOKE, '--split', 'words'], "'concept' or 'question'"),
    ([*SMOKE, '--descriptors', '2'], 'share of descriptors'),
    ([*SMOKE, '--descriptors', 'half'], 'numbers'),
    ([*SMOKE, '--seeds', '0'], 'seeds'),
    (['reproduce', '--data', 'nowhere'], 'meta_train.json'),
    (['audit', 'text', '--out', 'nowhere'], 'nowhere'),
    (['audit', 'memory'], '--out'),
    (['audit', 'soul', '--out', 'nowhere'], 'soul'),
    (['audit', 'calibration', '--out', 'nowhere', '--methods', 'clip'], 'nowhere'),
    (['laboratory', '--out', 'nowhere'], 'nowhere'),
    (['ensemble', '--out', 'nowhere'], 'nowhere'),
    (['data', 'build', '--vqa', 'nowhere', '--to', 'tasks'], VQA_QUESTIONS),
    (['data', 'stats', 'nowhere'], 'meta_train.json'),
    (['data', 'features', 'nowhere', '--images', '.'], 'meta_train.json'),
    (['data', 'download', 'imagenet', '--to', 'here'], 'vqa2-text'),
    (['data', 'sample'], '--to'),
    (['plan', '--preset', 'huge'], 'smoke'),
    (['bench', '--preset', 'huge'], 'smoke'),
    (['bench', '--stages', 'magic'], 'adaptation'),
    (['dance'], 'dance'),
    (['ask'], 'QUESTION'),
    (['ask', 'Where is it?', '--dance'], '--dance'),
    (['ask', '', 'good.png'], 'empty'),
    (['ask', '   ', 'good.png'], 'empty'),
    (['ask', STAR], '--example'),
    (['ask', STAR, 'none.png'], 'none.png'),
    (['ask', STAR, 'half.png'], 'half.png'),
    (['ask', STAR, 'text.jpg'], 'text.jpg'),
    (['ask', 'Who painted this?', 'good.png'], '--answers'),
    ([*ASK, '--example'], '--example'),
    ([*ASK, '--answers', ''], 'two different answers'),
    ([*ASK, '--answers', 'red, red'], 'two different answers'),
    ([*ASK, '--weights', 'none.safetensors'], 'none.safetensors'),
    ([*ASK, '--weights', 'half.safetensors'], 'half.safetensors'),
    ([*ASK, '--weights', 'small.safetensors'], 'small.safetensors'),
    ([*ASK, '--model', 'half.safetensors'], 'half.safetensors'),
    ([*ASK, '--gamma', 'much'], 'gamma'),
    ([*ASK, '--save', 'good.png/w.safetensors'], 'good.png'),
]


def contents(folder):
    "The bytes of every file in a folder"
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('args, named', MISTAKES, ids=str)
def test_a_mistake_is_named_and_leaves_nothing(here, hyperclip, args, named):
    before = contents(here)
    code, _, err = hyperclip(*args)
    assert code == 2
    assert named.lower() in err.lower() and 'Traceback' not in err
    assert err.startswith('error:') and err.count('\n') == 1
    assert contents(here) == before


def test_ask_writes_an_ordinary_file(here, hyperclip):
    question = 'What color is the large star?'
    save = ['--save', 'w.safetensors']
    code, out, _ = hyperclip('ask', question, '--example', *save, '--json')
    facts = json.loads(out)
    assert code == 0 and Image.open(facts['image']).size == (384, 384)
    answers = {a['answer'] for a in facts['answers']}
    assert answers >= {'red', 'green', 'blue'} and facts['right'] in answers
    probabilities = [a['probability'] for a in facts['answers']]
    assert probabilities == sorted(probabilities, reverse=True)
    assert set(load_file('w.safetensors')) == {'W1', 'b1', 'W2', 'b2'}

    weights = ['--weights', 'w.safetensors']
    code, out, _ = hyperclip('ask', question, facts['image'], *weights, '--json')
    assert code == 0
    assert json.loads(out)['answers'] == facts['answers'] # the file is the network


def test_ask_depends_on_the_question_and_the_seed(here, hyperclip):
    def answers(question, *args):
        colors = ['--answers', 'red,green,blue']
        _, out, _ = hyperclip('ask', question, 'good.png', *args, *colors, '--json')
        return json.loads(out)['answers']
    once = answers(STAR)
    assert answers(STAR) == once
    assert answers('What color is the ring?') != once
    assert answers(STAR, '--seed', 1) != once


def test_features_of_another_clip_are_refused(here, hyperclip):
    features = dict(image=torch.zeros(1, 1), text=torch.zeros(1, 1))
    save_file(features, 'features.safetensors', dict(clip='another', tasks='others'))
    code, _, err = hyperclip(*SMOKE, '--out', '.')
    assert code == 2 and 'another CLIP' in err and 'features.safetensors' in err


@pytest.mark.parametrize('args', [[], ['--help'], ['ask', '--help']])
def test_help(hyperclip, args):
    code, out, _ = hyperclip(*args)
    assert code == 0 and 'Usage: hyperclip' in out


COMMAND = '''
import sys
from hyperclip_nb.command.cli import command
sys.argv[0] = 'hyperclip'
command()
'''


@pytest.mark.parametrize('args, code, text', [
    (['--help'], 0, 'Usage: hyperclip'),
    (['bench', '--preset', 'huge'], 2, 'unknown preset'),
    (['ask', ' '], 2, 'question is empty'),
])
def test_the_command_of_the_shell(args, code, text):
    "It leaves without tidying up, and yet says everything, with the right exit code"
    run = run_python(COMMAND, *args)
    assert run.returncode == code
    assert text in (run.stdout if code == 0 else run.stderr)
    assert code == 0 or len(run.stderr.strip().splitlines()) == 1


ASK_AND_LIST_MODULES = '''
import sys
from hyperclip_nb.command import cli
sys.argv = ['hyperclip', 'ask', 'What color is the star?', 'good.png']
try:
    cli.main()
except SystemExit:
    pass
unwanted = 'pandas', 'matplotlib', 'hyperclip_nb.lab.experiments'
print([module for module in unwanted if module in sys.modules])
'''


def test_a_question_about_scenes_needs_no_tables(here):
    assert run_python(ASK_AND_LIST_MODULES).stdout.endswith('[]\n')


@pytest.mark.parametrize('module, absent', [
    ('language.hyperldm', 'open_clip'),
    ('language.hyperldm', 'torchvision'),
    ('writer.ask', 'torch'),
    ('command.cli', 'torch'),
    ('command.cli', 'numpy'),
])
def test_light_imports(module, absent):
    program = f'import sys, hyperclip_nb.{module}; sys.exit({absent!r} in sys.modules)'
    assert run_python(program).returncode == 0


def test_a_torchscript_archive_is_told_with_a_remedy(here):
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save('weights.pt')
    with pytest.raises(ValueError, match='TorchScript archive: name open_clip'):
        load_clip('tiny-clip:weights.pt')


KEEPS = '''
import ctypes
import sys
import torch
from hyperclip_nb.command import cli

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks', 'fsmblks',
        'uordblks', 'fordblks', 'keepcost')]

libc = ctypes.CDLL('libc.so.6')
libc.mallinfo2.restype = Info
if sys.argv[1] == 'kept':
    cli._keep_memory()
before = libc.mallinfo2()
large = torch.zeros(2**24) # 64 MB
held = libc.mallinfo2()
del large
after = libc.mallinfo2()
print(held.hblks - before.hblks, (after.arena - before.arena)>>20)
'''


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc alone has it')
@pytest.mark.parametrize('way, mapped, kept', [('kept', 0, True), ('not', 1, False)])
def test_freed_memory_is_kept(way, mapped, kept):
    "A large tensor is no block of its own from the system, and its place stays ours"
    env = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    child = subprocess.run(
        [sys.executable, '-c', KEEPS, way], env=env,
        capture_output=True, text=True, check=True, timeout=300,
    )
    blocks, megabytes = map(int, child.stdout.split())
    assert blocks == mapped and (megabytes >= 60) == kept
