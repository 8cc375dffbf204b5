"The grid of experiments: stopped at any moment it ends with the same rows, and nothing that is done is done again."
import json, os, signal, subprocess, sys, time
import numpy as np, pytest
from hyperclip_nb.lab import experiments, stages
from hyperclip_nb.lab.runs import Run
from hyperclip_nb.lab.methods import ABLATION, METHODS
from hyperclip_nb.lab.tables import PAPER, table1, table4
from hyperclip_nb.lab.stages import Models
from hyperclip_nb.lab.runs import PRESETS, override
from hyperclip_nb.lab.stats import bootstrap, summary
from hyperclip_nb.lab.experiments import (
    grid_rows, read_results, reproduce, support_subset,
)

TINY = override('smoke', multitask=dict(epochs=1), cond_multitask=dict(epochs=1), cond_strong=dict(epochs=1), tuned=dict(epochs=1), world=dict(tasks=(30, 10, 12), scenes=(1000, 400, 500)),
               weights=dict(steps=3), hvae=dict(steps=30), hyperldm=dict(steps=30), regression=dict(steps=30), few_shot=dict(steps=2))
GRID = dict(preset='tiny', seeds=(0, 1), shares=(1., .5), methods=('clip', 'multitask', 'cond-multitask', 'hvae-hyperldm', 'hvae-regression'), gammas=(0., 1.5))
PROGRAM = f'import torch; torch.set_num_threads(1); from hyperclip_nb.lab import experiments as x, runs; runs.PRESETS["tiny"] = {TINY!r}; x.reproduce(**{GRID!r}, out="OUT")'


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    PRESETS['tiny'] = TINY
    out = tmp_path_factory.mktemp('grid')
    yield reproduce(**GRID, out=out), out
    del PRESETS['tiny']


def test_a_killed_run_ends_with_the_same_rows(done, tmp_path):
    out = tmp_path/'killed'; out.mkdir()
    (out/'features.safetensors').write_bytes((done[1]/'features.safetensors').read_bytes())
    start = lambda: subprocess.Popen([sys.executable, '-c', PROGRAM.replace('OUT', str(out))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    count = lambda: sum(len(list((out/k).glob('[!.]*'))) for k in ('stages', 'rows'))
    for files in (2, 9, 17):                                      # killed without a warning, when so many files are there
        process, end = start(), time.time() + 120
        while count() < files and process.poll() is None and time.time() < end: time.sleep(.01)
        process.send_signal(signal.SIGKILL); process.wait()
        assert not (out/'results.json').exists(), 'the run was over before it was killed'
    assert start().wait(timeout=300) == 0
    assert not list(out.rglob('.*.part'))                         # nothing half-written stays behind
    there, here = read_results(out), read_results(done[1])
    assert there['rows'] == here['rows'] and np.array_equal(there['test'], here['test']) and np.array_equal(there['valid'], here['valid'])


def test_half_written_files_of_a_dead_process_go(done):
    part = done[1]/'stages'/'.seed0-hvae.safetensors.999999999.part'; part.write_bytes(b'half')
    mine = done[1]/'stages'/f'.seed0-hvae.safetensors.{os.getpid()}.part'; mine.write_bytes(b'being written')
    reproduce(**GRID, out=done[1])
    assert not part.exists() and mine.exists()
    mine.unlink()


def test_done_rows_are_not_run_again_unless_asked(done, monkeypatch):
    def never(*args): raise AssertionError('measured again')
    monkeypatch.setattr(experiments, 'evaluate_row', never)
    assert reproduce(**GRID, out=done[1]).rows == done[0].rows
    with pytest.raises(AssertionError, match='measured again'): reproduce(**GRID | dict(methods=('clip',), shares=(.25,)), out=done[1], again=True)


def test_rows_in_memory_equal_rows_on_disk(done):
    one = reproduce(**GRID | dict(seeds=(1,), shares=(.5,), methods=('hvae-hyperldm',)))
    assert one.rows == [r for r in done[0].rows if r['seed'] == 1 and r['descriptors'] == .5 and r['method'] == 'hvae-hyperldm']


def test_fewer_descriptors_change_only_what_reads_them(done):
    whole, half = Models(done[0].run, 0, 1.), Models(done[0].run, 0, .5)
    assert set(half.rows) < set(whole.rows) and len(half.rows) == 15
    assert (whole.multitask == half.multitask).all() and (whole.weights == half.weights).all()
    assert not (whole.regression[0].weight == half.regression[0].weight).all()


def test_a_folder_belongs_to_one_experiment(done):
    for other in (dict(world_seed=3), dict(preset='smoke')):
        with pytest.raises(ValueError, match='give another folder'): reproduce(**GRID | other, out=done[1])


def test_few_images_are_nested_support_images(done):
    data = done[0].run.data['test']
    masks = [support_subset(data, n, 0) for n in (1, 4, None)]
    assert all((a <= b).all() for a, b in zip(masks, masks[1:])) and (masks[2] == data.is_support).all()
    assert (masks[0].sum(1) == 1).all() and (masks[1].sum(1) == 4).all()


def test_every_row_of_the_paper_has_a_method():
    assert {slug for slug, _ in PAPER} <= set(METHODS)
    slugs = {'clip', 'multitask', 'mnet-maml', 'mnet-fomaml', 'hnet-maml', 'cond-multitask', 'cond-film', 'cond-hnet-maml', 'hnet-hyperclip', 'hvae-hyperclip', 'hnet-hyperldm', 'hvae-hyperldm'}
    assert {slug for slug, _ in PAPER} == slugs
    for slug in slugs: assert len(grid_rows(slug, 0, 1., (1.,), TINY)) >= 2    # zero-shot and few-shot


def test_tables(done):
    t1, t4 = table1(done[0].results), table4(done[0].results)
    assert list(t1) == ['method', '50%', '100%', 'paper 50%', 'paper 100%'] and t1['100%'].ne('').all()
    assert t1.set_index('method')['paper 100%']['HVAE + HyperLDM, γ = 1.5'].startswith('55.10')
    assert t1.set_index('method')['50%']['CLIP as Base Model'] == ''
    assert t4.few_shot.ne('').all() and len(t4) == len(GRID['methods'])
    files = {f.name for f in done[1].iterdir()}
    assert files >= {'results.json', 'results.csv', 'per_task.safetensors', 'table1.md', 'table1.csv', 'table4.md', 'table4.csv', 'summary.csv', 'hyperldm.safetensors', 'config.json'}


def test_results_say_what_made_them(done):
    r = json.loads((done[1]/'results.json').read_text())
    assert r['command'].startswith('hyperclip reproduce --preset tiny') and '--descriptors 1,0.5' in r['command']
    assert r['config']['settings'] == json.loads(json.dumps(TINY)) and {'hyperclip_nb', 'torch', 'python', 'commit'} <= r['versions'].keys()
    for row, a in zip(r['rows'], read_results(done[1])['test']): assert row['accuracy'] == pytest.approx(a.mean(), abs=1e-3)


def test_bootstrap_pairs_tasks():
    rng = np.random.default_rng(0)
    hard = rng.normal(50, 20, 300)                                # tasks differ much more than methods do
    a, b = hard + rng.normal(1, 2, 300), hard + rng.normal(0, 2, 300)
    low, high = bootstrap(a - b, np.arange(300))
    assert 0 < low < 1 < high and high - low < 1
    assert bootstrap(a - b, np.arange(300)) == (low, high)        # the same seed, the same interval


def test_the_gap_is_to_the_same_share(done):
    s = summary(done[0].results).set_index(['method', 'descriptors', 'setting', 'gamma', 'samples', 'images'])
    for share in (1., .5):
        assert s.gap['cond-multitask', share, 'zero-shot', -1., 1, 0.] == 0
        regression = ('hvae-regression', share, 'zero-shot', -1., 1, 0.)
        assert s.gap[regression] == pytest.approx(s.test[regression] - s.test['cond-multitask', share, 'zero-shot', -1., 1, 0.], abs=1e-3)


BEYOND = dict(methods=('cond-multitask-strong', 'hvae-ridge', 'hvae-hyperldm-white', *ABLATION), seeds=(0,), shares=(.5,), gammas=(2.,))

def test_what_goes_beyond_the_paper_resumes_too(done, tmp_path, monkeypatch):
    (tmp_path/'features.safetensors').write_bytes((done[1]/'features.safetensors').read_bytes())
    first = reproduce(**GRID | BEYOND, out=tmp_path)
    for name in ('tune', 'train_residual_hypernet', 'fit_ridge'): monkeypatch.setattr(stages, name, None)
    for file in (tmp_path/'rows').iterdir(): file.unlink()
    assert reproduce(**GRID | BEYOND, out=tmp_path).rows == first.rows               # models come from the folder, and are the same
    t1 = table1(first.results).method.tolist()
    assert 'HVAE + HyperLDM, tuned, γ = 2, mean of 8' in t1 and len(set(t1)) == len(t1)
    assert not any((tmp_path/'stages').glob('*tuned-100*'))                          # nothing was trained that nobody asked for


def test_a_damaged_stage_is_named(done):
    reproduce(**GRID | dict(seeds=(0,), shares=(1.,), methods=('hvae-hyperldm',)), out=done[1])
    Models(Run.open(done[1]), 0).hvae
    file = done[1]/'stages'/'seed0-hvae.safetensors'; whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match='seed0-hvae.safetensors.*remove it'): Models(Run.open(done[1]), 0).hvae
    file.write_bytes(whole)


def test_a_folder_without_a_whole_config_is_none(tmp_path):
    (tmp_path/'config.json').write_text('{}')
    with pytest.raises(ValueError, match='holds no experiment'): Run.open(tmp_path)
