"""The grid of experiments, and what it is made of.

Stopped at any moment it ends with the same rows, and nothing that is done is done
again. Stages and methods register themselves, and move no number of any other."""
import copy
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
import torch

from hyperclip_nb.data.files import _machine
from hyperclip_nb.lab import experiments, rows, stages
from hyperclip_nb.lab.experiments import read_results, reproduce
from hyperclip_nb.lab.methods import ABLATION, METHODS, PAPER_ROWS, Start, method
from hyperclip_nb.lab.models import DERIVED, stage, stream
from hyperclip_nb.lab.rows import grid_rows, support_subset
from hyperclip_nb.lab.runs import Run
from hyperclip_nb.lab.settings import SETTINGS
from hyperclip_nb.lab.stages import (
    PRESETS, STAGES, STREAMS, Models, add_preset, override, preset,
)
from hyperclip_nb.lab.stats import bootstrap, summary
from hyperclip_nb.lab.tables import PAPER, table1, table4

ONE_EPOCH = (
    'multitask', 'cond_multitask', 'cond_strong', 'tuned', 'mnet_maml', 'mnet_fomaml',
    'hnet_maml', 'cond_film', 'cond_hnet_maml',
)
TINY = {name: dict(epochs=1) for name in ONE_EPOCH} | dict(
    world=dict(tasks=(30, 10, 12), scenes=(300, 200, 200)),
    weights=dict(steps=3), hnet_latents=dict(steps=2), hvae=dict(steps=30),
    hyperclip=dict(steps=20), hyperldm=dict(steps=30), regression=dict(steps=30),
    paper_weights=dict(steps=3), paper_hvae=dict(steps=30),
    paper_hyperldm=dict(steps=30), few_shot=dict(steps=2),
)
GRID = dict(
    preset='tiny', seeds=(0, 1), shares=(1., .5), gammas=(0., 1.5),
    methods=(
        'clip', 'multitask', 'cond-multitask', 'hvae-hyperldm-ours', 'hvae-regression',
    ),
)
PROGRAM = f'''
import sys
import torch
from hyperclip_nb.lab.experiments import reproduce
from hyperclip_nb.lab.stages import add_preset
torch.set_num_threads(1)
add_preset('tiny', 'smoke', **{TINY!r})
reproduce(**{GRID!r}, out=sys.argv[1])
'''
add_preset('tiny', 'smoke', **TINY)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A finished grid, and its folder"
    out = tmp_path_factory.mktemp('grid')
    return reproduce(**GRID, out=out), out


@pytest.fixture
def tables():
    "What a test registers is forgotten after it"
    every = STAGES, STREAMS, SETTINGS, DERIVED, METHODS
    before = [dict(table) for table in every]
    yield
    for table, old in zip(every, before):
        table.clear()
        table.update(old)


def copy_features(done, folder):
    "Spare a new folder the encoding of the same world"
    folder.mkdir(exist_ok=True)
    features = (done[1]/'features.safetensors').read_bytes()
    (folder/'features.safetensors').write_bytes(features)


# ---- stopped and continued


def start(folder):
    "The grid in a process of its own"
    command = [sys.executable, '-c', PROGRAM, str(folder)]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, **quiet)


def kill_at(folder, files):
    "Start the grid, and kill it without a warning when so many files are there"
    process = start(folder)
    end = time.time() + 120
    while process.poll() is None and time.time() < end:
        found = [*folder.glob('stages/[!.]*'), *folder.glob('rows/[!.]*')]
        if len(found) >= files:
            break
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_ends_with_the_same_rows(done, tmp_path):
    out = tmp_path/'killed'
    copy_features(done, out)
    for files in (2, 9, 17):
        kill_at(out, files)
        over = (out/'results.json').exists()
        assert not over, 'the run was over before it was killed'
    assert start(out).wait(timeout=300) == 0
    assert not list(out.rglob('.*.part'))  # nothing half-written stays behind
    there, here = read_results(out), read_results(done[1])
    assert there['rows'] == here['rows']
    assert np.array_equal(there['test'], here['test'])
    assert np.array_equal(there['valid'], here['valid'])


def test_half_written_files_of_a_dead_process_go(done):
    stage_files = done[1]/'stages'
    host = _machine()
    dead = stage_files/f'.seed0-hvae.safetensors.{host}.999999999.part'
    dead.write_bytes(b'half')
    mine = stage_files/f'.seed0-hvae.safetensors.{host}.{os.getpid()}.part'
    mine.write_bytes(b'being written')
    elsewhere = stage_files/'.seed0-hvae.safetensors.another.999999999.part'
    elsewhere.write_bytes(b'being written on another machine')
    reproduce(**GRID, out=done[1])
    assert not dead.exists()
    assert mine.exists() and elsewhere.exists()
    mine.unlink()
    elsewhere.unlink()


def test_done_rows_are_not_run_again_unless_asked(done, tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError('measured again')

    monkeypatch.setattr(rows, 'evaluate_row', never)
    assert reproduce(**GRID, out=done[1]).rows == done[0].rows
    copy_features(done, tmp_path)
    (tmp_path/'rows').mkdir()
    for file in (done[1]/'rows').glob('clip-*'):
        (tmp_path/'rows'/file.name).write_bytes(file.read_bytes())
    one = GRID | dict(methods=('clip',), out=tmp_path)
    assert reproduce(**one).rows
    with pytest.raises(AssertionError, match='measured again'):
        reproduce(**one, overwrite=True)


def test_rows_in_memory_equal_rows_on_disk(done):
    asked = dict(seeds=(1,), shares=(.5,), methods=('hvae-hyperldm-ours',))
    in_memory = reproduce(**GRID | asked).rows
    names = dict(seed=1, descriptors=.5, method='hvae-hyperldm-ours')
    on_disk = [row for row in done[0].rows if names.items() <= row.items()]
    assert in_memory == on_disk


def test_what_goes_beyond_the_paper_resumes_too(done, tmp_path, monkeypatch):
    strong = 'cond-multitask-strong', 'hvae-ridge', 'hvae-hyperldm-ours-white'
    methods = (*strong, *ABLATION)
    beyond = GRID | dict(methods=methods, seeds=(0,), shares=(.5,), gammas=(2.,))
    copy_features(done, tmp_path)
    first = reproduce(**beyond, out=tmp_path)
    for name in ('tune', 'train_residual_hypernet', 'fit_ridge'):
        monkeypatch.setattr(stages, name, None)
    for file in (tmp_path/'rows').iterdir():
        file.unlink()
    again = reproduce(**beyond, out=tmp_path)  # models come from the folder
    assert again.rows == first.rows
    titles = table1(first.results).method.tolist()
    assert 'HVAE + HyperLDM, tuned, γ = 2, mean of 8' in titles
    assert len(set(titles)) == len(titles)
    unasked = list((tmp_path/'stages').glob('*tuned-100*'))
    assert not unasked


# ---- folders


def test_a_folder_belongs_to_one_experiment(done):
    for other in (dict(world_seed=3), dict(preset='smoke')):
        with pytest.raises(ValueError, match='give another folder'):
            reproduce(**GRID | other, out=done[1])


def test_a_folder_is_opened_with_its_settings(done):
    run = Run.open(done[1])
    assert run.settings == preset('tiny')
    assert run.config == done[0].run.config
    assert torch.equal(Models(run, 0).hvae.mean, done[0].models().hvae.mean)


def test_a_damaged_stage_is_named(done):
    Models(Run.open(done[1]), 0).hvae
    file = done[1]/'stages'/'seed0-hvae.safetensors'
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match='seed0-hvae.safetensors.*remove it'):
        Models(Run.open(done[1]), 0).hvae
    file.write_bytes(whole)


def test_a_folder_without_a_whole_config_is_none(tmp_path):
    (tmp_path/'config.json').write_text('{}')
    with pytest.raises(ValueError, match='holds no experiment'):
        Run.open(tmp_path)


# ---- settings


def test_presets_are_what_they_were():
    """The table stands apart from the code: no preset changes without a word.

    In a process of its own: other tests and notebooks register stages."""
    program = 'import json; from hyperclip_nb.lab.stages import PRESETS, preset\n'
    program += 'print(json.dumps([{n: preset(n) for n in PRESETS}, dict(PRESETS)]))'
    run = subprocess.run(
        [sys.executable, '-c', program], capture_output=True, text=True, check=True
    )
    written = json.loads((Path(__file__).parent/'presets.json').read_text())
    assert list(written) == ['default', 'smoke', 'paper', 'paper-small']
    assert json.loads(run.stdout) == [written, written]


def test_presets_are_made_and_named(tables):
    assert {'default', 'smoke', 'paper', 'tiny'} <= set(PRESETS)
    assert 'huge' not in PRESETS
    with pytest.raises(ValueError, match="unknown preset 'huge'"):
        preset('huge')
    assert preset('tiny') == override(preset('smoke'), **TINY)
    with pytest.raises(ValueError, match='no setting'):
        add_preset('wrong', 'smoke', hvea=dict(steps=1))


# ---- stages


def test_fewer_descriptors_change_only_what_reads_them(done):
    whole, half = Models(done[0].run, 0, 1.), Models(done[0].run, 0, .5)
    assert set(half.task_ids) < set(whole.task_ids)
    assert len(half.task_ids) == 15
    assert torch.equal(whole.multitask, half.multitask)
    assert torch.equal(whole.weights, half.weights)
    assert not torch.equal(whole.regression[0].weight, half.regression[0].weight)


def in_memory(run):
    "The same run without its folder and what it has trained"
    other = copy.copy(run)
    other.folder, other.parts = None, {}
    return other


def tensors(part):
    "Those of a stage: a tensor, or what its module would save"
    if isinstance(part, torch.Tensor):
        return dict(value=part)
    return dict(part.state_dict())


def test_new_stages_and_another_order_change_no_other_stage(done, tables):
    "Each stage, trained before and after the table of stages has changed"
    run = in_memory(done[0].run)
    names = list(STAGES)
    models = Models(run, seed=1, share=.5, white=True)
    before = {name: tensors(getattr(models, name)) for name in names}

    @stage(seed=900, default=dict(size=3))
    def inserted(models, size, generator, progress):
        torch.manual_seed(int(torch.rand(1)*1000))  # as bad as it can be
        return torch.rand(size, generator=generator)

    for table in (STAGES, STREAMS, SETTINGS):
        backwards = list(table.items())[::-1]
        table.clear()
        table.update(backwards)
    run.settings = preset('tiny')
    run.parts.clear()
    models = Models(run, seed=1, share=.5, white=True)
    assert next(iter(STAGES)) == 'inserted'
    assert models.inserted.shape == (3,)
    for name in reversed(names):
        after = tensors(getattr(models, name))
        assert after.keys() == before[name].keys()
        different = [k for k in after if not torch.equal(after[k], before[name][k])]
        assert not different, f'{name} is not what it was'


def test_a_stream_belongs_to_one_stage(tables):
    assert sorted(STREAMS.values()) == list(range(25))
    with pytest.raises(ValueError, match='seed 3 of second is that of hvae'):
        stream('second', 3)
    with pytest.raises(ValueError, match='seed 17 of second is that of few_shot'):
        @stage(seed=17)
        def second(models, generator, progress):
            return torch.rand(3, generator=generator)
    assert 'second' not in STAGES


def written(folder):
    "Files of stages, and when they were written"
    return {file.name: file.stat().st_mtime_ns for file in folder.glob('stages/*')}


def test_an_old_folder_goes_on_with_a_new_stage(done, tables, tmp_path):
    "Nothing of it is trained again, but for what the stage itself makes"
    out = tmp_path/'old'
    shutil.copytree(done[1], out)
    before = written(out)

    @stage(seed=900, default=dict(scale=2.))
    def scaled(models, scale, generator, progress):
        return scale*models.multitask

    @method('scaled', 'Scaled multitask', reads_questions=False)
    def _scaled(models, tasks):
        return Start(models.scaled)

    one = GRID | dict(seeds=(0,), methods=('multitask', 'scaled'))
    reproduce(**one, out=out)
    after = written(out)
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {'seed0-scaled.safetensors'}
    config = json.loads((out/'config.json').read_text())
    assert config['settings']['scaled'] == dict(scale=2.)


# ---- methods and rows


def test_a_method_is_one_decorated_function(done, tables):
    @method('shifted', 'Shifted multitask', gamma=2.)
    def _shifted(models, tasks, gamma=1., samples=2):
        W = models.multitask.expand(len(tasks.e), -1)
        return Start(W*gamma + samples)

    methods = 'multitask', 'shifted'
    new = reproduce(**GRID | dict(seeds=(0,), methods=methods, gammas=(2.,)))
    rows = [row for row in new.rows if row['method'] == 'shifted']
    found = [(r['descriptors'], r['setting'], r['gamma'], r['samples']) for r in rows]
    zero_shot = [('zero-shot', 2., 1), ('zero-shot', 2., 8)]
    whole = [(1., *row) for row in zero_shot]
    half = [(.5, *row) for row in zero_shot]
    assert found == [*whole, (1., 'few-shot', None, 1), *half]
    title = 'Shifted multitask, γ = 2, mean of 8'
    assert title in table1(new.results).method.tolist()


def test_few_images_are_nested_support_images(done):
    data = done[0].run.data['test']
    one, four, all_images = (support_subset(data, n, 0) for n in (1, 4, None))
    assert (one <= four).all()
    assert (four <= all_images).all()
    assert torch.equal(all_images, data.is_support)
    assert (one.sum(1) == 1).all()
    assert (four.sum(1) == 4).all()


def test_every_row_of_the_paper_has_a_method():
    slugs = {slug for slug, _ in PAPER}
    assert slugs == set(PAPER_ROWS) <= set(METHODS)
    assert slugs == {
        'clip', 'multitask', 'mnet-maml', 'mnet-fomaml', 'hnet-maml', 'cond-multitask',
        'cond-film', 'cond-hnet-maml', 'hnet-hyperclip', 'hvae-hyperclip',
        'hnet-hyperldm', 'hvae-hyperldm',
    }
    for slug in slugs:
        rows = grid_rows(slug, 0, 1., (1.,), preset('tiny'))
        assert {row['setting'] for row in rows} == {'zero-shot', 'few-shot'}


# ---- results


def test_tables(done):
    t1, t4 = table1(done[0].results), table4(done[0].results)
    other = "another question's network"
    shares = ['50%', '100%', f'50%, {other}', f'100%, {other}']
    assert list(t1) == ['method', *shares, 'paper 50%', 'paper 100%']
    assert t1['100%'].ne('').all()
    t1 = t1.set_index('method')
    assert t1['paper 100%']['Cond. Multitask'].startswith('54.12')
    assert t1['50%']['CLIP as Base Model'] == ''
    assert t4.few_shot.ne('').all()
    assert len(t4) == len(GRID['methods'])


def test_files(done):
    files = {file.name for file in done[1].iterdir()}
    assert files >= {
        'results.json', 'results.csv', 'per_task.safetensors', 'table1.md',
        'table1.csv', 'table4.md', 'table4.csv', 'summary.csv',
        'hyperldm.safetensors', 'config.json',
    }


def test_results_say_what_made_them(done, tmp_path):
    experiments.save_results(done[0], tmp_path)
    results = json.loads((tmp_path/'results.json').read_text())
    assert results['command'].startswith('hyperclip reproduce --preset tiny')
    assert '--descriptors 1,0.5' in results['command']
    assert results['config']['settings'] == json.loads(json.dumps(preset('tiny')))
    versions = {'hyperclip_nb', 'torch', 'python', 'commit'}
    assert versions <= results['versions'].keys()
    for row, accuracies in zip(results['rows'], read_results(tmp_path)['test']):
        assert row['accuracy'] == pytest.approx(accuracies.mean(), abs=1e-3)


def test_bootstrap_pairs_tasks():
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, 300)  # tasks differ much more than methods do
    a, b = hard + rng.normal(1, 2, 300), hard + rng.normal(0, 2, 300)
    low, high = bootstrap(a - b, np.arange(300))
    assert 0 < low < 1 < high
    assert high - low < 1
    assert bootstrap(a - b, np.arange(300)) == (low, high)  # the same seed


def test_the_gap_is_to_the_same_share(done):
    table = summary(done[0].results)
    table = table[table.setting == 'zero-shot'].set_index(['method', 'descriptors'])
    for share in (1., .5):
        conditional = table.loc[[('cond-multitask', share)]].iloc[0]
        regression = table.loc[[('hvae-regression', share)]].iloc[0]
        assert conditional.gap == 0
        difference = regression.test - conditional.test
        assert regression.gap == pytest.approx(difference, abs=1e-3)
