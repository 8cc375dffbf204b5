"""The command as people expect it: settings in the open, two streams, any text in any
encoding, and a grid that several processes make together."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import hyperclip_nb
from hyperclip_nb.command.cli_reproduce import reproduce as command_of_reproduce
from hyperclip_nb.command.console import RUN_OPTIONS
from hyperclip_nb.data import files
from hyperclip_nb.lab.changes import parse_settings
from hyperclip_nb.lab.experiments import merge, read_results, reproduce
from hyperclip_nb.lab.history import curves_figure, read_curves
from hyperclip_nb.lab.runs import Run
from hyperclip_nb.lab.stages import add_preset, preset
from hyperclip_nb.lab.versions import versions
from hyperclip_nb.paper.differences import DIFFERENCES

TINY = dict(
    world=dict(tasks=(30, 10, 12), scenes=(300, 200, 200)),
    multitask=dict(epochs=1), cond_multitask=dict(epochs=2), few_shot=dict(steps=2),
    weights=dict(steps=3), hvae=dict(steps=30), regression=dict(steps=30),
)
add_preset('tiny-cli', 'smoke', **TINY)
METHODS = 'clip', 'multitask', 'cond-multitask', 'hvae-regression'
GRID = dict(preset='tiny-cli', seeds=(0, 1), shares=(1., .5), methods=METHODS)
COMMAND = f'''
import sys
import torch
torch.set_num_threads(1)
sys.argv[0] = 'hyperclip'
if 'reproduce' in sys.argv or 'merge' in sys.argv:
    from hyperclip_nb.lab.stages import add_preset
    add_preset('tiny-cli', 'smoke', **{TINY!r})
from hyperclip_nb.command.cli import command
command()
'''
GRID_WORDS = [
    'reproduce', '--preset', 'tiny-cli', '--seeds', '2', '--descriptors', '1.0,0.5',
    '--methods', ','.join(METHODS), '--device', 'cpu',
]


def start(*args, cwd=None, **env):
    "The command in a process of its own"
    command = [sys.executable, '-c', COMMAND, *map(str, args)]
    return subprocess.Popen(
        command, cwd=cwd, env=os.environ | env, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(*args, cwd=None, **env):
    "Its exit code, and the bytes of standard output and standard error"
    process = start(*args, cwd=cwd, **env)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A grid that one process has made"
    out = tmp_path_factory.mktemp('whole')
    return reproduce(**GRID, out=out), out


# ---- settings


@pytest.mark.parametrize('args, named', [
    (['--set', 'hvae.stpes=4'], 'near it: steps'),
    (['--set', 'hvea.steps=4'], 'near it: hvae'),
    (['--set', 'hvae.steps=4.5'], 'a whole number'),
    (['--set', 'hvae.hidden=4'], 'a list such as [256, 256]'),
    (['--set', 'cond_multitask.loss=1'], "no entry 'loss'"),
    (['--set', 'cond_multitask.keep_best=perhaps'], 'true or false'),
    (['--set', 'steps'], 'such as hvae.steps=400'),
    (['--config', 'none.toml'], 'none.toml'),
    (['--config', 'broken.toml'], 'broken.toml'),
    (['--config', 'option.toml'], "no option 'sedes'"),
    (['--config', 'type.toml'], '--seeds'),
    (['--shard', '2/2'], 'no shard'),
    (['--shard', '0/2', '--again'], 'take a new folder'),
])
def test_a_wrong_setting_is_one_line(hyperclip, tmp_path, monkeypatch, args, named):
    monkeypatch.chdir(tmp_path)
    Path('broken.toml').write_text('[hvae')
    Path('option.toml').write_text('sedes = 3')
    Path('type.toml').write_text('seeds = "many"')
    before = sorted(Path().rglob('*'))
    code, out, err = hyperclip('reproduce', '--preset', 'smoke', *args)
    assert code == 2 and named in err and not out
    assert err.startswith('error:') and err.count('\n') == 1
    assert sorted(Path().rglob('*')) == before


def test_settings_of_a_run(hyperclip, tmp_path, monkeypatch):
    "Typed beside a file they count more; the folder has their name, and keeps them"
    monkeypatch.chdir(tmp_path)
    Path('run.toml').write_text(
        'preset = "tiny-cli"\nmethods = ["clip", "cond-multitask"]\n'
        '[cond_multitask]\nepochs = 3\nimages = 10\n'
    )
    change = '--set', 'cond_multitask.epochs=1'
    code, out, err = hyperclip('reproduce', '--config', 'run.toml', *change, '--json')
    facts = json.loads(out)  # nothing but results
    assert code == 0 and len(facts['table1']) == 2 and 'of descriptors' in err
    folder = Path(facts['folder'])
    assert folder.name.startswith('tiny-cli-w0-s0-')
    config = json.loads((folder/'config.json').read_text())
    assert config['settings']['cond_multitask'] == dict(epochs=1, lr=1e-3, images=10)
    assert config['tasks'] and config['versions'] == [versions()]
    results = json.loads((folder/'results.json').read_text())
    assert results['versions'] == versions()
    assert '--set cond_multitask.epochs=1' in results['command']
    words = ['reproduce', '--preset', 'tiny-cli', '--methods', 'clip', '--out', folder]
    code, _, err = hyperclip(*words)
    assert code == 2 and 'another setting of cond_multitask' in err


def test_optional_entries_reach_the_training(tmp_path):
    "The last epoch is kept where early stopping is off, and the curve says which"
    args = dict(preset='tiny-cli', methods=('cond-multitask',))
    few = reproduce(**args, changes=['cond_multitask.images=2'])
    off = 'cond_multitask.keep_best=false', 'cond_multitask.lr=.5'
    last = reproduce(**args, changes=off, out=tmp_path)
    assert few.rows != last.rows
    curve = read_curves(tmp_path)['seed0-cond_multitask-100']
    accuracy = np.mean(last.rows[0]['valid'])
    assert curve.accuracy.iloc[-1] == pytest.approx(accuracy, abs=1e-3)


# ---- a plan reads the same options


def planned(hyperclip, *args):
    code, out, err = hyperclip('plan', '--json', *args)
    assert code == 0, err
    return json.loads(out)['stages']


def test_a_plan_follows_settings_and_files(hyperclip, tmp_path):
    one = '--methods', 'hvae-hyperldm-ours'
    usual = planned(hyperclip, *one)
    wide = planned(hyperclip, *one, '--set', 'hyperldm.steps=100')
    steps = preset('default')['hyperldm']['steps']
    ratio = usual['hyperldm']['TFLOP']/wide['hyperldm']['TFLOP']
    assert ratio == pytest.approx(steps/100)
    assert wide['hvae']['TFLOP'] == usual['hvae']['TFLOP']
    file = tmp_path/'run.toml'
    file.write_text("""
        methods = 'hvae-hyperldm-ours'
        seeds = 3
        out = 'somewhere'
        [hyperldm]
        steps = 100
    """)
    of_file = planned(hyperclip, '--config', file)
    assert of_file['hyperldm']['TFLOP'] == pytest.approx(3*wide['hyperldm']['TFLOP'])
    typed = planned(hyperclip, '--config', file, '--seeds', '1')
    assert typed['hyperldm']['TFLOP'] == pytest.approx(wide['hyperldm']['TFLOP'])


def test_a_plan_for_more_tasks(hyperclip):
    one = '--methods', 'hvae-hyperldm-ours'
    usual = planned(hyperclip, *one)
    many = planned(hyperclip, *one, '--tasks', '8700')
    for stage in 'weights', 'hvae', 'hyperldm':
        assert many[stage]['TFLOP'] == pytest.approx(10*usual[stage]['TFLOP'], rel=.01)
    code, _, err = hyperclip('plan', '--tasks', '0')
    assert code == 2 and '--tasks' in err


def test_a_file_may_hold_every_option_of_reproduce():
    own = set(command_of_reproduce.__annotations__) - {'config', 'changes'}
    assert set(RUN_OPTIONS) == own


def test_no_list_of_figures_is_no_lost_table(whole, monkeypatch, tmp_path):
    from hyperclip_nb.lab import figures
    monkeypatch.setattr(figures, '_figures', lambda done: 1/0)
    failed = figures.draw_all(whole[0], tmp_path)
    assert list(failed) == ['list'] and 'ZeroDivisionError' in failed['list']


def test_one_figure_takes_nothing_from_the_others(whole, monkeypatch, tmp_path):
    from hyperclip_nb.lab import figures
    real = dict(figures._figures(whole[0]))
    first, *others = real
    drawn = [(first, lambda: 1/0), *((name, real[name]) for name in others[:1])]
    monkeypatch.setattr(figures, '_figures', lambda done: drawn)
    failed = figures.draw_all(whole[0], tmp_path)
    assert list(failed) == [first]
    assert (tmp_path/f'{others[0]}.png').exists()


@pytest.mark.parametrize('module, name', [
    ('figures', 'draw_all'), ('history', 'write_tensorboard'),
])
def test_the_table_is_printed_before_all_extras(
    whole, module, name, monkeypatch, tmp_path, capsys,
):
    from hyperclip_nb.command import cli_reproduce
    from hyperclip_nb.lab import figures, history
    extras = dict(figures=figures, history=history)
    monkeypatch.setattr(figures, 'draw_all', lambda done, out: {})

    def broken(*args):
        raise ValueError('no extras')

    monkeypatch.setattr(extras[module], name, broken)
    with pytest.raises(ValueError, match='no extras'):
        cli_reproduce._report(whole[0], tmp_path, as_json=False, tensorboard=True)
    assert 'CLIP as Base Model' in capsys.readouterr().out


def test_tables_are_saved_before_the_model(whole, monkeypatch, tmp_path):
    from hyperclip_nb.lab import reports
    monkeypatch.setattr(reports, '_save_writers', lambda done, out: 1/0)
    with pytest.raises(ZeroDivisionError):
        reports.save_results(whole[0], tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    assert {'results.json', 'results.csv', 'table1.md', 'per_task.safetensors'} <= kept


def test_accuracies_of_tasks_belong_to_their_results(whole, tmp_path):
    "Those of another grid are whole and well made, and refused all the same"
    from hyperclip_nb.lab import reports
    reports.save_results(whole[0], tmp_path)
    tensors, _ = files.read_tensors(tmp_path/'per_task.safetensors')
    others = {name: x + 1 for name, x in tensors.items()}
    files.write_tensors(tmp_path/'per_task.safetensors', others)
    with pytest.raises(ValueError, match='not the one that belongs'):
        reports.read_results(tmp_path)


# ---- what a run keeps


def test_the_commit_is_of_this_library_alone(tmp_path):
    "A package that lies in somebody's repository has none"
    package = Path(hyperclip_nb.__file__).parent
    shutil.copytree(package, tmp_path/'env'/'hyperclip_nb')
    git = ['git', '-C', tmp_path, '-c', 'user.name=a', '-c', 'user.email=a@b']
    (tmp_path/'paper.tex').write_text('theirs')
    for command in ['init'], ['add', 'paper.tex'], ['commit', '-m', 'theirs']:
        subprocess.run([*git, *command], check=True, capture_output=True)
    program = 'from hyperclip_nb.lab.versions import versions; print(versions())'
    env = os.environ | dict(PYTHONPATH=str(tmp_path/'env'))
    found = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, env=env, capture_output=True,
        text=True, check=True,
    )
    assert "'commit': None" in found.stdout


def test_every_difference_from_the_paper_is_undone_by_an_option():
    for difference in DIFFERENCES:
        for stage, changes in (difference.undo or {}).items():
            texts = [f'{stage}.{name}={value}' for name, value in changes.items()]
            settings = parse_settings(texts, preset('smoke'))
            assert settings[stage] == preset('smoke')[stage] | changes


def test_data_may_be_moved(hyperclip, tmp_path, monkeypatch):
    "Tasks are known by their digest, and their path is relative to the run"
    monkeypatch.chdir(tmp_path)
    assert hyperclip('data', 'sample', '--to', 'vqa')[0] == 0
    assert hyperclip('data', 'build', '--vqa', 'vqa', '--to', 'a/tasks')[0] == 0
    assert hyperclip('data', 'features', 'a/tasks', '--images', 'vqa')[0] == 0
    words = ['reproduce', '--preset', 'tiny-cli', '--methods', 'clip', '--out', 'a/run']
    assert hyperclip(*words, '--data', 'a/tasks')[0] == 0
    config = json.loads(Path('a/run/config.json').read_text())
    assert config['data'] == '../tasks'
    Path('a').rename('b')  # both at once
    assert len(Run.open('b/run').data['test'])
    Path('b/tasks').rename('elsewhere')
    with pytest.raises(ValueError, match='say where they are now'):
        Run.open('b/run')
    words[-1] = 'b/run'
    assert hyperclip(*words, '--data', 'elsewhere')[0] == 0
    assert len(Run.open('b/run').data['test'])
    tasks = Path('elsewhere/meta_train.json')
    content = json.loads(tasks.read_text())
    shutil.copytree('elsewhere', 'changed')
    content.pop(next(iter(content)))
    Path('changed/meta_train.json').write_text(json.dumps(content))
    code, _, err = hyperclip(*words, '--data', 'changed')
    assert code == 2 and 'it was damaged or edited' in err
    Path('changed/SHA256SUMS').unlink()
    code, _, err = hyperclip(*words, '--data', 'changed')
    assert code == 2 and 'is for other tasks' in err


def test_curves_of_a_run(whole):
    done, out = whole
    curves = read_curves(out)
    stages = {file.stem for file in (out/'stages').glob('*.safetensors')}
    assert set(curves) == stages
    assert len(curves['seed0-hvae']) == 30 and 'error' in curves['seed0-hvae']
    trained = curves['seed1-cond_multitask-100']
    assert trained.accuracy.count() == 3  # before the first epoch, and after both
    assert len(curves['seed0-weights']) == 0  # it is adapted, in no training
    from hyperclip_nb.lab.figures import draw_all
    assert draw_all(done, out) == {}
    assert (out/'training.png').exists()


def test_a_stage_from_disk_has_no_curve(whole, tmp_path):
    out = tmp_path/'run'
    shutil.copytree(whole[1], out)
    (out/'curves'/'seed0-hvae.csv').unlink()
    reproduce(**GRID, out=out)
    note = curves_figure(out)._supxlabel.get_text()
    assert note == 'Read from disk, without a curve: seed0-hvae'
    assert curves_figure(whole[1])._supxlabel.get_text() == ''


# ---- the command


@pytest.mark.parametrize('args', [
    ['-h'], ['reproduce', '-h'], ['data'], ['audit'], ['data', 'stats', '-h'],
    ['audit', 'text', '-h'], ['merge', '-h'], ['ask', '-h'],
])
def test_help_is_no_mistake(hyperclip, args):
    code, out, err = hyperclip(*args)
    assert code == 0 and 'Usage: hyperclip' in out and not err


def test_version_and_module(hyperclip):
    code, out, _ = hyperclip('--version')
    assert (code, out) == (0, f'hyperclip {hyperclip_nb.__version__}\n')
    module = [sys.executable, '-m', 'hyperclip_nb', '--version']
    assert subprocess.run(module, capture_output=True, text=True).stdout == out


@pytest.mark.parametrize('words, expected', [
    ('hyperclip rep', 'reproduce'), ('hyperclip reproduce --sh', '--shard'),
])
def test_a_shell_can_complete(words, expected):
    env = dict(COMP_WORDS=words, COMP_CWORD=str(words.count(' ')))
    code, out, _ = run(**env, _HYPERCLIP_COMPLETE='complete_bash')
    assert code == 0 and out.decode().split() == [expected]


def test_results_and_notes_part(whole):
    code, out, err = run(*GRID_WORDS, '--out', whole[1])
    assert code == 0
    assert b'Zero-shot accuracy' in out and b'of descriptors, Cond' not in out
    assert b'of descriptors, Cond' in err and b'Zero-shot accuracy' not in err
    assert b'\x1b' not in out + err  # no colors in a file
    code, again, err = run(*GRID_WORDS, '--out', whole[1], '--quiet')
    assert (code, again, err) == (0, out, b'')


def test_no_color_is_heard():
    def colors(**env):
        _, out, _ = run('ask', 'What color is the star?', '--example', '--json', **env)
        return out
    assert b'\x1b[3' not in colors(FORCE_COLOR='1', NO_COLOR='1')


@pytest.mark.parametrize('encoding', ['ascii', 'cp1252', 'utf-8'])
def test_no_encoding_loses_a_table(whole, tmp_path, encoding):
    env = dict(PYTHONIOENCODING=encoding)
    code, out, err = run(*GRID_WORDS, '--out', whole[1], **env)
    text = out.decode(encoding)
    assert code == 0 and 'Cond. Multitask' in text and b'Traceback' not in err
    Image.effect_noise((40, 30), 90).convert('RGB').save(tmp_path/'звезда [1].png')
    words = ['ask', 'Где [/] [red]звезда[/red]?', tmp_path/'звезда [1].png']
    code, out, err = run(*words, '--answers', '[b]да,[i]нет γ', **env)
    text = out.decode(encoding)
    assert code == 0 and b'Traceback' not in err
    assert '[red]' in text and '[/]' in text and '[b]' in text and '[i]' in text
    assert ('да' in text) == (encoding == 'utf-8')
    assert ('█' in text) == (encoding == 'utf-8') and ('#' in text) != ('█' in text)
    rows = [line for line in text.splitlines() if '[b]' in line or '[i]' in line]
    assert rows[0][:1] == ('│' if encoding == 'utf-8' else '|')
    code, out, err = run('ask', 'γ?', 'нет.png', **env)
    assert code == 2 and err.count(b'\n') == 1 and err.startswith(b'error:')


def test_brackets_are_shown_as_typed(hyperclip, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = '[bold]data[/bold] [/]'
    code, out, _ = hyperclip('data', 'sample', '--to', folder)
    assert code == 0 and folder in out
    code, out, _ = hyperclip('data', 'build', '--vqa', folder, '--to', '[red]t')
    assert code == 0 and '[red]t' in out
    code, out, _ = hyperclip('data', 'stats', '[red]t')
    assert code == 0 and 'Tasks in [red]t' in out


# ---- several processes


def kill_when(folder, files, process):
    "Kill a process without a warning when it has left so many files"
    end = time.time() + 120
    while process.poll() is None and time.time() < end:
        if len(list(folder.glob('stages/[!.]*'))) >= files:
            break
        time.sleep(.01)
    assert process.poll() is None, 'it was over before it was killed'
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_two_shards_at_once_and_one_killed(whole, tmp_path):
    "They end with the rows that one process makes"
    out = tmp_path/'shards'
    words = [*GRID_WORDS, '--out', out, '--shard']
    first, second = start(*words, '0/2'), start(*words, '1/2')
    kill_when(out, 2, second)
    _, err = first.communicate(timeout=300)
    assert first.returncode == 0, err
    code, stdout, err = run('merge', out)
    assert code == 2 and b'start their shards again' in err and not stdout
    assert not (out/'results.json').exists()
    code, stdout, err = run(*words, '1/2', '--json')
    assert code == 0 and json.loads(stdout)['shard'] == '1/2'
    code, stdout, err = run('merge', out, '--json')
    assert code == 0, err
    there, here = read_results(out), read_results(whole[1])
    assert there['rows'] == here['rows']
    assert np.array_equal(there['test'], here['test'])
    assert json.loads(stdout)['rows'] == here['rows']
    assert there['command'] == here['command']
    for name in 'table1.md', 'summary.csv', 'curves/seed1-hvae.csv':
        assert (out/name).read_bytes() == (whole[1]/name).read_bytes()


def test_shards_that_need_the_same_stages(whole, tmp_path):
    "More shards than seeds, at once: some work is done twice, and nothing is harmed"
    words = [*GRID_WORDS, '--out', tmp_path/'out', '--shard']
    processes = [start(*words, f'{number}/4') for number in range(4)]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert merge(tmp_path/'out').rows == whole[0].rows
    assert not list((tmp_path/'out').rglob('.*.part'))


def test_merge_trains_nothing(whole, tmp_path, monkeypatch):
    out = tmp_path/'run'
    shutil.copytree(whole[1], out)
    shutil.rmtree(out/'stages')
    (out/'rows'/'hvae-regression-seed0-50.json').unlink()
    with pytest.raises(ValueError, match='1 of 12 jobs are not done'):
        merge(out)
    assert not (out/'stages').exists()
