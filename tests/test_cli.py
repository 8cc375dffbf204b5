"The command as a user meets it: what it prints, what it leaves behind, and one line with exit code 2 for a mistake."
import json, subprocess, sys
from pathlib import Path
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from hyperclip_nb.command import cli


def hyperclip(monkeypatch, capsys, *args):
    "Run `hyperclip` in this process: exit code, standard output, standard error"
    monkeypatch.setattr(sys, 'argv', ['hyperclip', *map(str, args)])
    with pytest.raises(SystemExit) as stop: cli.main()
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


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


MISTAKES = [
    (['reproduce', '--preset', 'huge'], 'smoke'),
    (['reproduce', '--preset', 'smoke', '--gamma', '1,x'], 'numbers'),
    (['reproduce', '--preset', 'smoke', '--device', 'abacus'], 'cpu'),
    (['reproduce', '--preset', 'smoke', '--clip', 'ViT-Q'], 'unknown CLIP'),
    (['reproduce', '--preset', 'smoke', '--seed', '-1'], 'seed'),
    (['reproduce', '--preset', 'smoke', '--methods', 'clip,magic'], 'magic'),
    (['reproduce', '--preset', 'smoke', '--descriptors', '2'], 'share of descriptors'),
    (['reproduce', '--preset', 'smoke', '--descriptors', 'half'], 'numbers'),
    (['reproduce', '--preset', 'smoke', '--seeds', '0'], 'seeds'),
    (['audit', 'text', '--out', 'nowhere'], 'nowhere'),
    (['audit', 'memory'], '--out'),
    (['audit', 'soul', '--out', 'nowhere'], 'soul'),
    (['audit', 'calibration', '--out', 'nowhere', '--methods', 'clip'], 'nowhere'),
    (['laboratory', '--out', 'nowhere'], 'nowhere'),
    (['ensemble', '--out', 'nowhere'], 'nowhere'),
    (['data', 'build', '--vqa', 'nowhere', '--to', 'tasks'], 'v2_OpenEnded_mscoco_train2014_questions.json'),
    (['data', 'stats', 'nowhere'], 'meta_train.json'),
    (['data', 'features', 'nowhere', '--images', '.'], 'meta_train.json'),
    (['data', 'download', 'imagenet', '--to', 'here'], 'vqa2-text'),
    (['data', 'sample'], '--to'),
    (['reproduce', '--data', 'nowhere'], 'meta_train.json'),
    (['plan', '--preset', 'huge'], 'smoke'),
    (['bench', '--preset', 'huge'], 'smoke'),
    (['bench', '--stages', 'magic'], 'adaptation'),
    (['ask'], 'QUESTION'),
    (['dance'], 'dance'),
    (['ask', 'Where is it?', '--dance'], '--dance'),
    (['ask', '', 'good.png'], 'empty'),
    (['ask', '   ', 'good.png'], 'empty'),
    (['ask', 'What color is the star?'], '--example'),
    (['ask', 'What color is the star?', 'good.png', '--example'], '--example'),
    (['ask', 'What color is the star?', 'none.png'], 'none.png'),
    (['ask', 'What color is the star?', 'half.png'], 'half.png'),
    (['ask', 'What color is the star?', 'text.jpg'], 'text.jpg'),
    (['ask', 'What color is the star?', 'good.png', '--answers', ''], 'two different answers'),
    (['ask', 'What color is the star?', 'good.png', '--answers', 'red, red'], 'two different answers'),
    (['ask', 'Who painted this?', 'good.png'], '--answers'),
    (['ask', 'What color is the star?', 'good.png', '--weights', 'none.safetensors'], 'none.safetensors'),
    (['ask', 'What color is the star?', 'good.png', '--weights', 'half.safetensors'], 'half.safetensors'),
    (['ask', 'What color is the star?', 'good.png', '--weights', 'small.safetensors'], 'small.safetensors'),
    (['ask', 'What color is the star?', 'good.png', '--model', 'half.safetensors'], 'half.safetensors'),
    (['ask', 'What color is the star?', 'good.png', '--gamma', 'much'], 'gamma'),
    (['ask', 'What color is the star?', 'good.png', '--save', 'good.png/w.safetensors'], 'good.png'),
]


@pytest.mark.parametrize('args, names', MISTAKES, ids=[' '.join(a) for a, _ in MISTAKES])
def test_a_mistake_is_named_and_leaves_nothing(here, monkeypatch, capsys, args, names):
    before = {p: p.read_bytes() for p in here.rglob('*') if p.is_file()}
    code, out, err = hyperclip(monkeypatch, capsys, *args)
    assert code == 2 and names.lower() in err.lower() and 'Traceback' not in err
    assert err.startswith('error:') and err.count('\n') == 1
    assert {p: p.read_bytes() for p in here.rglob('*') if p.is_file()} == before


def test_ask_writes_an_ordinary_file(here, monkeypatch, capsys):
    question = 'What color is the large star?'
    code, out, _ = hyperclip(monkeypatch, capsys, 'ask', question, '--example', '--save', 'w.safetensors', '--json')
    said = json.loads(out)
    assert code == 0 and Image.open(said['image']).size == (384, 384)
    assert {a['answer'] for a in said['answers']} >= {'red', 'green', 'blue'} and said['right'] in {a['answer'] for a in said['answers']}
    assert [a['probability'] for a in said['answers']] == sorted((a['probability'] for a in said['answers']), reverse=True)
    assert set(load_file('w.safetensors')) == {'W1', 'b1', 'W2', 'b2'}
    code, out, _ = hyperclip(monkeypatch, capsys, 'ask', question, said['image'], '--weights', 'w.safetensors', '--json')
    assert code == 0 and json.loads(out)['answers'] == said['answers']      # the file is the network


def test_ask_depends_on_the_question_and_the_seed(here, monkeypatch, capsys):
    ask = lambda *a: json.loads(hyperclip(monkeypatch, capsys, 'ask', *a, 'good.png', '--answers', 'red,green,blue', '--json')[1])['answers']
    one = ask('What color is the star?')
    assert ask('What color is the star?') == one
    assert ask('What color is the ring?') != one and ask('What color is the star?', '--seed', 1) != one


def test_features_of_another_clip_are_refused(here, monkeypatch, capsys):
    save_file(dict(image=torch.zeros(1, 1), text=torch.zeros(1, 1)), 'features.safetensors', dict(clip='another', tasks='others'))
    code, _, err = hyperclip(monkeypatch, capsys, 'reproduce', '--preset', 'smoke', '--out', '.')
    assert code == 2 and 'another CLIP' in err and 'features.safetensors' in err


def test_help(monkeypatch, capsys):
    for args in ([], ['--help'], ['ask', '--help']):
        code, out, _ = hyperclip(monkeypatch, capsys, *args)
        assert code == 0 and 'Usage: hyperclip' in out


@pytest.mark.parametrize('args, code, said', [(['--help'], 0, 'Usage: hyperclip'), (['bench', '--preset', 'huge'], 2, 'unknown preset'), (['ask', ' '], 2, 'question is empty')])
def test_the_command_of_the_shell(args, code, said):
    "It leaves at once, without tidying up, and yet says everything and with the right exit code, through a pipe too"
    program = f'import sys; sys.argv = ["hyperclip", *{args!r}]; from hyperclip_nb.command.cli import command; command()'
    run = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True)
    assert run.returncode == code and said in (run.stdout if code == 0 else run.stderr)
    assert code == 0 or len(run.stderr.strip().splitlines()) == 1


def test_a_question_about_scenes_needs_no_tables(here):
    program = 'import sys; sys.argv = ["hyperclip", "ask", "What color is the star?", "good.png"]; from hyperclip_nb.command import cli\ntry: cli.main()\nexcept SystemExit: pass\nprint([m for m in ("pandas", "matplotlib", "hyperclip_nb.lab.experiments") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', program], capture_output=True, text=True).stdout.endswith('[]\n')


@pytest.mark.parametrize('module, absent', [('language.hyperldm', 'open_clip'), ('language.hyperldm', 'torchvision'), ('command.cli', 'torch')])
def test_light_imports(module, absent):
    program = f'import sys, hyperclip_nb.{module}; sys.exit({absent!r} in sys.modules)'
    assert subprocess.run([sys.executable, '-c', program]).returncode == 0
