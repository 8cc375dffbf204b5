"""The protocol of the paper, as rules that results must keep.

Mathematics has its tests elsewhere. Here the question is who may see what: what is
chosen is chosen on validation tasks, a question that is not told is not read, support
and query never mix, and numbers of the paper stand where the paper has them. Each rule
is checked from outside: something is changed that must not matter, and results must
stay; or something that must matter, and they must not."""
import copy
import inspect
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from hyperclip_nb.base import training
from hyperclip_nb.base.adapt import adapt_all
from hyperclip_nb.data.metavqa import split_valid, unseen_queries
from hyperclip_nb.data.tasks import Task, has_descriptor
from hyperclip_nb.generators.maml import HNet, split_batch, train_mnet_maml
from hyperclip_nb.lab import models as lab_models
from hyperclip_nb.lab import rows as measuring
from hyperclip_nb.lab import sampler_steps, sweeps
from hyperclip_nb.lab.calibration_audit import calibration_error, confidences
from hyperclip_nb.lab.curves import descriptor_figure, few_shot_figure, gamma_figure
from hyperclip_nb.lab.experiments import reproduce
from hyperclip_nb.lab.memory_audit import candidates, memory_audit
from hyperclip_nb.lab.methods import ABLATION, ALL, METHODS, nearest_question
from hyperclip_nb.lab.reports import Experiment
from hyperclip_nb.lab.rows import evaluate_row, grid_rows, support_subset
from hyperclip_nb.lab.settings import FROM_PAPER
from hyperclip_nb.lab.stages import (
    STAGES, STREAMS, Models, add_preset, deviations, preset, with_needs,
)
from hyperclip_nb.lab.stats import best_gamma, summary
from hyperclip_nb.lab.tables import table1
from hyperclip_nb.lab.text_audit import descriptions, text_audit
from hyperclip_nb.language.ddpm import linear_schedule
from hyperclip_nb.language.noise_net import time_embedding

SHARE = .5 # of descriptors, in the trainings of this file
VARIANTS = [name for name in STAGES if name.startswith('tuned_')]
TRAINED = [name for name in STAGES if name not in VARIANTS]
READERS = [name for name in TRAINED if STAGES[name].reads_questions]
add_preset(
    'protocol', 'smoke', world=dict(tasks=(30, 10, 12), scenes=(300, 200, 200)),
    multitask=dict(epochs=2), mnet_maml=dict(epochs=4), mnet_fomaml=dict(epochs=4),
    hnet_maml=dict(epochs=1), cond_multitask=dict(epochs=2), cond_film=dict(epochs=8),
    cond_hnet_maml=dict(epochs=1), cond_strong=dict(epochs=5), tuned=dict(epochs=1),
    weights=dict(steps=3), hnet_latents=dict(steps=2), hvae=dict(steps=8),
    hyperclip=dict(steps=6), hyperldm=dict(steps=8), regression=dict(steps=8),
    paper_weights=dict(steps=3), paper_hvae=dict(steps=8),
    paper_hyperldm=dict(steps=8),
    few_shot=dict(steps=2), sampling=dict(steps=4),
)


@pytest.fixture(scope='module')
def run():
    return reproduce('protocol', methods=('clip',), world_seed=4).run


def changed(run, **data):
    "The same run with other tasks in some parts, of which nothing is trained yet"
    other = copy.copy(run)
    other.data = run.data | data
    other.parts = {}
    return other


def with_wrong_labels(data, pairs): # (T, longest) bool
    "The same tasks, with other labels on some pairs"
    other = copy.copy(data)
    answers = torch.tensor([len(task.answers) for task in data.tasks])[:, None]
    other.label = torch.where(pairs, (data.label + 1) % answers, data.label)
    return other


def with_other_questions(data, task_ids):
    "The same tasks; the questions of some are noise"
    e = data.e.clone()
    generator = torch.Generator().manual_seed(9)
    e[task_ids] = 3*torch.randn(len(task_ids), e.shape[1], generator=generator)
    return data.reread(e)


def values_of(part):
    "All numbers of a trained part, as one vector"
    tensors = [part] if isinstance(part, Tensor) else part.state_dict().values()
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def train_all(run, names=TRAINED, white=False):
    models = Models(run, 0, SHARE, white)
    return {name: values_of(getattr(models, name)) for name in names}


def different(a, b):
    "The parts that are not the same in two trainings"
    return [name for name in a if not torch.equal(a[name], b[name])]


@pytest.fixture(scope='module')
def trained(run):
    return train_all(run)


@pytest.fixture(scope='module')
def undescribed(run):
    "Training tasks whose question is not told"
    told = Models(run, 0, SHARE).task_ids
    return np.setdiff1d(np.arange(len(run.data['train'])), told)


# who may be seen in training

def test_nothing_is_trained_or_chosen_on_test_tasks(run, trained):
    test = run.data['test']
    other = with_wrong_labels(test, test.mask)
    other = with_other_questions(other, range(len(test)))
    assert not different(trained, train_all(changed(run, test=other)))


def test_validation_tasks_choose_and_do_not_teach(run, trained):
    "Parts without early stopping, from the same start, are the same without them"
    valid = run.data['valid']
    other = changed(run, valid=with_wrong_labels(valid, valid.mask))
    base = Models(run, 0, SHARE)
    models = Models(other, 0, SHARE)
    for name in 'multitask', 'mnet_maml', 'hnet_maml': # adaptation starts from these
        other.parts[f'seed0-{name}'] = getattr(base, name)
    taught = ['weights', 'hnet_latents', 'hvae', 'hyperclip', 'hyperldm', 'ridge']
    taught += ['hnet_hyperclip', 'hnet_hyperldm', 'our_hyperclip', 'regression']
    taught += ['paper_weights', 'paper_hvae', 'paper_hyperldm']
    found = {name: values_of(getattr(models, name)) for name in taught}
    assert not different(found, trained)


def test_training_tasks_teach(run, trained):
    "The other side of both rules: they can fail"
    train = run.data['train']
    other = train_all(changed(run, train=with_wrong_labels(train, train.mask)))
    assert len(different(trained, other)) == len(TRAINED)


# which questions are read

@pytest.mark.parametrize('share', [1., .5, .1, .03])
def test_a_share_of_the_descriptors_is_that_share(share):
    described = has_descriptor(870, share, seed=3)
    assert described.sum() == round(share*870)
    fewer = has_descriptor(870, share/2, seed=3)
    assert (fewer <= described).all() # a smaller share lies inside a larger one


@pytest.mark.parametrize('white', [False, True])
def test_a_question_that_is_not_told_is_not_read(run, trained, undescribed, white):
    "In hypernetworks, HyperCLIP, HyperLDM, baselines, tuning and whitening alike"
    other = with_other_questions(run.data['train'], undescribed)
    expected = train_all(run, READERS, white) if white else trained
    found = train_all(changed(run, train=other), READERS if white else TRAINED, white)
    assert not different(expected, found)


def test_a_question_that_is_told_is_read_by_those_who_read(run, trained, undescribed):
    told = np.setdiff1d(np.arange(len(run.data['train'])), undescribed)
    other = with_other_questions(run.data['train'], told)
    found = train_all(changed(run, train=other))
    assert set(different(trained, found)) == set(READERS)


def test_whitening_is_fitted_to_described_training_questions(run, undescribed):
    models = Models(run, 0, SHARE, white=True)
    e = run.data['train'].e[models.task_ids]
    torch.testing.assert_close(models.read.mean, e.mean(0))
    other = with_other_questions(run.data['train'], undescribed)
    again = Models(changed(run, train=other), 0, SHARE, white=True)
    assert torch.equal(again.read.turn, models.read.turn)


def test_the_nearest_question_is_the_nearest_described_one(run):
    models = Models(run, 0, SHARE)
    test, train = run.data['test'], run.data['train']
    written = nearest_question(models, test.e)
    for e, W in zip(test.e, written):
        angles = {}
        for task in models.task_ids:
            other = train.e[task]
            angles[task] = float(e@other/e.norm()/other.norm())
        best = max(angles, key=angles.get)
        mean = models.hvae.encode(models.weights[best])[0].mean(0)
        torch.testing.assert_close(W, models.hvae.decode(mean))


# epochs, steps and random numbers

@pytest.mark.parametrize('share', [1., .5, .1])
@pytest.mark.parametrize('name', TRAINED)
def test_what_a_stage_is_given(run, monkeypatch, name, share):
    "Its settings, its own stream, the tasks that are told, and longer at small shares"
    given = {}

    def record(models, **settings):
        given.update(settings)
        return torch.zeros(1)

    stage = replace(STAGES[name], train=record, untrained=None)
    monkeypatch.setitem(STAGES, name, stage)
    models = Models(changed(run), 2, share)
    getattr(models, name)
    expected = dict(preset('protocol')[stage.settings])
    conditional = [
        'cond_multitask', 'cond_film', 'cond_hnet_maml', 'cond_strong', 'tuned',
    ]
    if name in conditional: # few tasks make short epochs
        expected['epochs'] = round(expected['epochs']/share**.5)
    if name in READERS:
        told = np.flatnonzero(has_descriptor(30, share, seed=2))
        assert np.array_equal(given.pop('task_ids'), told)
    generator, _ = given.pop('generator'), given.pop('progress')
    assert generator.initial_seed() == 2000 + STREAMS[name]
    assert given == expected


def test_early_stopping_keeps_the_epoch_that_validation_tasks_like_best(
    run, monkeypatch,
):
    scores = iter([50., 40., 70., 60.]) # the start, and after each epoch
    seen, asked = [], []

    def examine(adapter, W, data, *rest):
        seen.append(W.detach().clone())
        asked.append(data)
        return np.array([next(scores)])

    monkeypatch.setattr(training, 'evaluate', examine)
    W = run.adapter.init(torch.Generator().manual_seed(0)).requires_grad_()
    train, valid = run.data['train'], run.data['valid']
    history = training.fit_tasks(
        [W], lambda e: W, run.adapter, train, valid, 3, .05, torch.Generator()
    )
    assert all(data is valid for data in asked) and len(asked) == 4
    assert torch.equal(W.detach(), seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert [epoch['accuracy'] for epoch in history] == [40., 70., 60.]


# support and query

def test_support_and_query_of_a_task_share_no_pair(run):
    for data in run.data.values():
        assert not (data.parts['support'] & data.parts['query']).any()
        assert ((data.parts['support'] | data.parts['query']) == data.mask).all()
        for task in data.tasks:
            assert not set(task.support[:, 0]) & set(task.query[:, 0])


def test_few_shot_learning_sees_support_images_alone(run):
    test = run.data['test']
    W = Models(run, 0).multitask
    for images in 1, 4, None:
        chosen = support_subset(test, images, 0)
        assert (chosen <= test.parts['support']).all()
        sizes = torch.as_tensor(test.size['support'])
        expected = sizes if images is None else sizes.clamp(max=images)
        assert torch.equal(chosen.sum(1), expected)
        first = adapt_all(run.adapter, W, test, chosen, 2, 1.)
        other = with_wrong_labels(test, test.parts['query'])
        assert torch.equal(first, adapt_all(run.adapter, W, other, chosen, 2, 1.))
        other = with_wrong_labels(test, test.parts['support'])
        assert not torch.equal(first, adapt_all(run.adapter, W, other, chosen, 2, 1.))


def plain_accuracy(adapter, W, data): # (P,) or (T,P)
    "Percent of right answers on the query pairs of each task, by the plainest loop"
    accuracies = []
    for i, task in enumerate(data.tasks):
        weights = W if W.ndim == 1 else W[i]
        batch = data.batch([i], 'all')
        logits = adapter.logits(weights, batch)[0]
        first_query = len(task.support)
        right = 0
        for n in range(first_query, first_query + len(task.query)):
            right += int(logits[n].argmax()) == task.query[n - first_query, 1]
        accuracies.append(100*right/len(task.query))
    return accuracies


def test_accuracy_is_the_plain_mean_over_tasks_of_that_on_query_images(run):
    row = grid_rows('cond-multitask', 0, 1., (1.,), run.settings)[0]
    models = Models(run, 0)
    found = evaluate_row(models, row)
    for part in 'valid', 'test':
        data = run.data[part]
        expected = plain_accuracy(run.adapter, models.cond_multitask(data.e), data)
        np.testing.assert_allclose(found[part], expected, atol=1e-3)
    rows = [row | {part: list(values) for part, values in found.items()}]
    config = dict(seeds=[0], shares=[1.], methods=['cond-multitask'], gammas=[1.])
    written = Experiment(run.config | config, rows, run).results
    sizes = run.data['test'].size['query']
    assert len(set(sizes)) > 1 # else a weighted mean would be the same
    assert written['rows'][0]['accuracy'] == pytest.approx(np.mean(expected), abs=1e-3)


@pytest.mark.parametrize('setting', ['zero-shot', 'few-shot'])
def test_what_moves_an_accuracy(run, setting):
    "Zero-shot: no support label. Both: the labels of query images"
    test = run.data['test']
    rows = grid_rows('multitask', 0, 1., (1.,), run.settings)
    row = next(r for r in rows if r['setting'] == setting)

    def measured(data):
        other = changed(run, test=data)
        other.parts = run.parts
        return evaluate_row(Models(other, 0), row)['test'].tolist()

    before = measured(test)
    with_support = measured(with_wrong_labels(test, test.parts['support']))
    assert (with_support == before) == (setting == 'zero-shot')
    assert measured(with_wrong_labels(test, test.parts['query'])) != before


def test_maml_adapts_on_one_part_of_the_images_and_learns_from_the_other(run):
    batch = run.data['train'].batch(range(30), 'all')
    support, query = split_batch(batch, torch.Generator().manual_seed(0))
    for i in range(30):
        images = batch.images[i][batch.mask[i]].tolist()
        parts = [part.images[i][part.mask[i]].tolist() for part in (support, query)]
        assert sorted(parts[0] + parts[1]) == sorted(images)
        assert len(parts[0]) == round(2/3*len(images))


def test_unseen_images_are_those_that_no_other_task_shows():
    def task(*images):
        pairs = np.array([(image, 0) for image in images])
        return Task('?', '{}', ('yes', 'no'), pairs[:1], pairs[1:])

    tasks = dict(train=[task(1, 2, 3)], valid=[task(4, 5)], test=[task(2, 6, 1, 5, 7)])
    assert unseen_queries(tasks).tolist() == [True, False, False, True]


def test_validation_tasks_are_held_out_of_the_training_tasks():
    train, valid = split_valid(list(range(100)))
    assert len(valid) == 10 and sorted(train + valid) == list(range(100))


# what is chosen

def results_with(rows):
    "Results of five tasks: method, gamma, validation and test accuracy"
    first = dict(eta=None, samples=1, descriptors=1., setting='zero-shot', images=0)
    described = []
    for method, gamma, *_ in rows:
        described.append(first | dict(method=method, gamma=gamma, seed=0))
    scores = np.array([row[2:] for row in rows], float)
    spread = np.linspace(-1, 1, 5)
    return dict(
        rows=described, valid=scores[:, :1] + spread, test=scores[:, 1:] + spread,
        concepts=np.arange(5),
    )


GRID = [
    ('clip', None, 30, 30), ('multitask', None, 40, 41),
    ('cond-multitask', None, 44, 46), ('hvae-hyperldm', 0., 99, 40),
    ('hvae-hyperldm', 1., 45, 50), ('hvae-hyperldm', 1.5, 46, 49),
    ('hvae-hyperldm', 3., 47, 44), ('hvae-hyperldm', 5., 46, 60),
]


def test_gamma_is_chosen_on_validation_tasks_among_those_that_read():
    results = results_with(GRID)
    assert best_gamma(results) == 3.
    results['test'] = results['test'][::-1]
    assert best_gamma(results) == 3.
    table = table1(results_with(GRID)).set_index('method')['paper 100%']
    assert 'HVAE + HyperLDM, γ = 3' in table and 'HVAE + HyperLDM, γ = 5' not in table
    assert table['HVAE + HyperLDM, γ = 1.5'].startswith('55.10') # the paper's own


def test_an_experiment_chooses_gamma_as_its_results_do(run):
    results = results_with(GRID)
    rows = []
    for row, valid, test in zip(results['rows'], results['valid'], results['test']):
        rows.append(row | dict(valid=valid.tolist(), test=test.tolist()))
    assert Experiment(dict(seeds=[0], shares=[1.]), rows, run).gamma == 3.


def test_sweeps_look_at_validation_tasks_alone(run, monkeypatch):
    seen = []

    def examine(adapter, W, data, *rest):
        seen.append(data)
        return np.zeros(len(data))

    monkeypatch.setattr(sweeps, 'evaluate', examine)
    monkeypatch.setattr(sweeps, 'sample_ensemble', lambda *_, **__: torch.zeros(10, 1))
    sweeps.sweep(run, tried=[dict(bench='guide', gamma=2.)])
    assert [data.tasks for data in seen] == [run.data['valid'].tasks]


def test_the_best_settings_of_a_sweep_are_those_of_highest_accuracy():
    knobs = dict(
        guide='classifier-free', eta=0., sampler='ddim', steps=6, samples=8,
        mean='weights', bench='guide', seed=0,
    )
    scores = {0.: 40., 1.: 52., 2.: 51., 3.: 30.}
    found = [knobs | dict(gamma=g, accuracy=a) for g, a in scores.items()]
    best = sweeps.best_settings(pd.DataFrame(found), n=2)
    assert best.accuracy.tolist() == [52., 51.]


def test_few_steps_says_which_tasks_it_measured(run, monkeypatch):
    def count(adapter, W, data):
        return np.full(len(data), float(len(data)))

    def no_latents(ldm, e, gamma, sampler, steps, draws):
        return torch.zeros(draws, len(e), len(ldm.mean))

    monkeypatch.setattr(sampler_steps, 'evaluate', count)
    monkeypatch.setattr(sampler_steps, '_latents', no_latents)
    found = sampler_steps.few_steps(run, draws=1)
    assert set(found.valid) == {10.} and set(found.test) == {12.}


# numbers of the paper

PAPER = [ # entry of the preset, its value, and where the paper has it
    ('multitask', dict(epochs=300, lr=1e-4), 'Table 3'),
    ('mnet_maml', dict(epochs=500, lr=3e-5, inner_lr=.01), 'Table 3'),
    ('mnet_fomaml', dict(epochs=500, lr=3e-5, inner_lr=.01), 'Table 3'),
    ('hnet_maml', dict(epochs=100, lr=3e-5, inner_lr=.1), 'Table 3'),
    ('cond_multitask', dict(epochs=60, lr=1e-4), 'Table 3'),
    ('cond_film', dict(epochs=300, lr=1e-4), 'Table 3'),
    ('cond_hnet_maml', dict(epochs=200, lr=1e-5, inner_lr=.1), 'Table 3'),
    ('paper_weights', dict(steps=50, lr=.01), 'A.7.1'),
    ('hnet_latents', dict(steps=50, lr=.1), 'A.7.2 and A.7.3'),
    ('paper_hvae', dict(latent=32, hidden=(256, 512)), 'A.2'),
    ('paper_hvae', dict(steps=2000*870//32, batch=32, lr=1e-4, clip=1000.), 'A.7.1'),
    ('hyperclip', dict(hidden=256), 'A.2'),
    ('hyperclip', dict(steps=600*870//64, batch=64, lr=3e-4), 'A.7.2'),
    ('guidance', dict(hnet=dict(steps=10, lr=.1, penalty=.01)), 'A.7.2'),
    ('guidance', dict(hvae=dict(steps=10, lr=.1, penalty=.01)), 'A.7.2'),
    ('paper_hyperldm', dict(hidden=(8192, 16384, 8192), kind='eps'), 'A.2 and Eq. 9'),
    ('paper_hyperldm', dict(steps=1000*870//128, batch=128, lr=2.5e-4), 'A.7.3'),
    ('paper_sampling', dict(sampler='ddpm', steps=350), 'Eq. 8 and A.7.3'),
    ('few_shot', dict(steps=50, weights=.01, latent=.1, question=.1), 'A.8'),
    ('adapter', dict(hidden=256), 'A.2'),
    ('paper_hvae', dict(schedule='constant'), 'A.7.1'),
    ('paper_hyperldm', dict(schedule='constant'), 'A.7.3'),
]


@pytest.mark.parametrize('entry, values, source', PAPER)
def test_the_paper_preset_has_the_papers_numbers(entry, values, source):
    found = preset('paper')[entry]
    assert {name: found[name] for name in values} == values, source


def test_the_table_in_the_code_holds_the_same_numbers():
    def flat(table):
        "(entry, name) -> value"
        return {
            (entry, name): value
            for entry, values, _ in table for name, value in values.items()
        }

    assert flat(FROM_PAPER) == flat(PAPER)
    assert not len(deviations('paper'))
    add_preset('hasty', 'paper', multitask=dict(epochs=3))
    line, = deviations('hasty').itertuples(index=False)
    assert tuple(line) == ('multitask', 'epochs', 300, 3, 'Table 3')


def test_few_shot_rates_are_those_of_the_counterparts(): # A.8
    rates = dict(mnet_maml='weights', hnet_maml='latent', cond_hnet_maml='question')
    for name in 'paper', 'paper-small':
        settings = preset(name)
        assert settings['few_shot']['steps'] == 50
        for stage, kind in rates.items():
            assert settings['few_shot'][kind] == settings[stage]['inner_lr']


def test_small_presets_are_of_the_papers_kind():
    for name in 'default', 'smoke', 'paper-small':
        settings = preset(name)
        assert settings['paper_hyperldm']['kind'] == 'eps' # Eq. 9
        assert settings['paper_sampling'] == dict(sampler='ddpm', steps=350) # Eq. 8
        assert settings['paper_hvae']['ce_weight'] == 0 # Algorithm 8
        changed = set(deviations(name).number)
        assert not changed & {'kind', 'sampler'}
    assert 'schedule' not in set(deviations('paper-small').number)
    assert preset('paper-small')['hyperclip']['noise'] == 0 # Algorithm 1


def test_what_a_method_needs_is_what_it_asks_for(run, monkeypatch):
    "What `plan` counts is what would be trained"
    asked = {}
    asking = []
    really = lab_models._trained

    def trained(models, stage):
        name = stage.train.__name__
        asked[asking[-1]].add(name)
        asked.setdefault(name, set())
        asking.append(name)
        part = really(models, stage)
        asking.pop()
        return part

    monkeypatch.setattr(lab_models, '_trained', trained)
    run = changed(run)
    for slug in ALL + ABLATION:
        asked[f'row {slug}'] = set()
        asking.append(f'row {slug}')
        models = Models(run, 0, SHARE, METHODS[slug].whitened)
        with torch.no_grad():
            METHODS[slug].start(models, models.valid).weights(len(models.valid))
        asking.pop()
    for name, parts in asked.items():
        row = METHODS.get(name.removeprefix('row '))
        written = STAGES[name].needs if name in STAGES else row.needs
        assert set(with_needs(parts)) == set(with_needs(written)), name


def test_what_is_read_is_a_setting_of_the_papers_rows_alone(run): # A.7.2, A.7.3
    "Stages that share these settings read what they have always read"
    def trained_with(read):
        models = Models(changed(run), 0)
        for name in 'hyperclip', 'paper_hyperldm':
            settings = models.settings[name] | read
            models.settings = models.settings | {name: settings}
        names = 'hyperclip', 'hnet_hyperclip', 'our_hyperclip', 'hnet_hyperldm'
        return {name: values_of(getattr(models, name)) for name in names}

    plain = trained_with({})
    assert different(plain, trained_with(dict(read='hnet_weights'))) == ['hyperclip']


def test_what_the_paper_adapts_starts_at_maml(run): # A.7.1
    models = Models(run, 0)
    settings = models.settings['paper_weights'] | dict(lr=0.)
    models = Models(changed(run), 0)
    models.settings = models.settings | dict(paper_weights=settings)
    assert torch.equal(models.paper_weights[0, 0], models.mnet_maml)


def test_few_shot_rows_take_the_rate_of_what_they_adapt(run, monkeypatch):
    seen = {}

    def adapt(adapter, start, data, where, steps, lr, decode=None):
        seen[slug].append(lr)
        return start

    monkeypatch.setattr(measuring, 'adapt_all', adapt)
    models = Models(run, 0)
    kinds = {
        'clip': 'weights', 'multitask': 'weights', 'mnet-maml': 'weights',
        'hnet-maml': 'latent', 'cond-multitask': 'question',
        'cond-hnet-maml': 'question', 'hvae-hyperldm': 'weights',
    }
    for slug, kind in kinds.items():
        seen[slug] = []
        row = grid_rows(slug, 0, 1., (1.,), run.settings)[-1] | dict(gamma=None)
        evaluate_row(models, row)
        assert seen[slug] == [run.settings['few_shot'][kind]]*2, slug


def defaults(function):
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters}


def test_numbers_that_no_preset_changes():
    assert defaults(training.fit_tasks)['tasks_per_step'] == 32 # Table 3
    assert defaults(training.fit)['max_norm'] == 10. # Table 3
    assert defaults(train_mnet_maml)['max_steps'] == 10 # Table 3
    assert defaults(HNet.__init__)['latent'] == 64 # A.2
    assert defaults(HNet.__init__)['hidden'] == 256 # A.2
    schedule = linear_schedule()
    assert len(schedule) == 350 # A.7.3
    ends = schedule.beta[[0, -1]].tolist()
    assert ends == pytest.approx([1e-4, .06]) # A.7.3
    assert defaults(time_embedding)['width'] == 150 # A.2


# audits

def test_descriptions_are_what_they_are_called(run):
    tasks = run.data['test'].tasks
    described = descriptions(tasks, np.random.default_rng(0))
    concept = {task.question: task.concept for task in tasks}
    for i, task in enumerate(tasks):
        assert described['true'][i] == task.question
        assert described['paraphrased'][i] != task.question
        assert concept[described['shuffled'][i]] != task.concept
        words = described['random'][i].split()
        assert len(words) == len(task.question.split())
        assert described['empty'][i] == ''


def test_the_text_audit_measures_what_each_description_makes_of_a_method(run):
    found = text_audit(run, methods=('cond-multitask',))
    found = found.set_index('description')
    test, models = run.data['test'], Models(run, 0)
    described = descriptions(test.tasks, np.random.default_rng(0))
    accuracy = {}
    for kind, texts in described.items():
        W = models.cond_multitask(run.clip.encode_text(texts))
        accuracy[kind] = np.mean(plain_accuracy(run.adapter, W, test))
    for kind, expected in accuracy.items():
        assert found.accuracy[kind] == pytest.approx(expected, abs=1e-3)
        difference = expected - accuracy['true']
        assert found.difference[kind] == pytest.approx(difference, abs=1e-3)


def test_the_store_of_the_memory_audit_does_not_hold_its_candidates(run):
    "A candidate comes from the part of each task's weights that is put aside"
    found = memory_audit(run)
    models = Models(run, 0)
    z = models.hvae.encode(models.weights)[0]
    store = models.hvae.decode(z[:, :-1].flatten(0, 1))
    typical = torch.pdist(models.hvae.decode(z[:, 0])).median()
    for name, W in candidates(models).items():
        distance = torch.stack([(store - w).norm(dim=1).min() for w in W])/typical
        rows = found[found.candidate == name]
        np.testing.assert_allclose(rows.distance, distance, rtol=1e-3, atol=1e-4)
        expected = plain_accuracy(run.adapter, W, run.data['test'])
        np.testing.assert_allclose(rows.accuracy, expected, atol=1e-3)
    aside = {tuple(w.tolist()) for w in models.hvae.decode(z[:, -1])}
    chosen = {tuple(w.tolist()) for w in candidates(models)['training network']}
    assert chosen <= aside


def test_calibration_counts_images_not_bins():
    bins = dict(method='m', seed=0, bin=[3, 9], images=[90, 10])
    table = pd.DataFrame(bins | dict(probability=[.35, .95], right=[.35, .45]))
    found = calibration_error(table).iloc[0]
    assert found.error == pytest.approx(100*(.9*0 + .1*.5))
    assert found.right == pytest.approx(100*(.9*.35 + .1*.45))
    assert found.probability == pytest.approx(100*(.9*.35 + .1*.95))


def test_confidences_are_of_query_images(run):
    test = run.data['test']
    W = Models(run, 0).multitask.expand(len(test), -1)
    sure, right = confidences(run.adapter, W, test)
    assert len(sure) == test.size['query'].sum()
    per_task = np.array(plain_accuracy(run.adapter, W[0], test))
    expected = np.average(per_task, weights=test.size['query'])
    assert 100*right.mean() == pytest.approx(expected, abs=.5)


# figures

def drawn(fig):
    "Accuracies of the first curve of a figure"
    return [float(y) for y in fig.axes[0].lines[0].get_ydata()]


def test_figures_draw_test_accuracies():
    results = results_with(GRID)
    fig = gamma_figure(results)
    assert drawn(fig) == pytest.approx([40, 50, 49, 44, 60]) # γ from 0 to 5
    assert '5 test tasks' in fig.axes[0].get_title()


def test_the_descriptor_figure_draws_each_share_where_it_belongs():
    results = results_with([('clip', None, 30, 30)] + [
        ('cond-multitask', None, 90, test) for test in (33, 44, 55)
    ])
    for row, share in zip(results['rows'], (1., 1., .1, .5)):
        row['descriptors'] = share
    fig = descriptor_figure(results)
    assert drawn(fig) == pytest.approx([44, 55, 33]) # 10, 50 and 100 %
    labels = [text.get_text() for text in fig.axes[0].get_xticklabels()]
    assert labels == ['10%', '50%', '100%']


def test_the_few_shot_figure_draws_each_number_of_images_where_it_belongs():
    results = results_with([('clip', None, 90, y) for y in (30, 50, 35, 40)])
    images = 0, None, 4, 16
    for row, n in zip(results['rows'], images):
        setting = 'zero-shot' if n == 0 else 'few-shot'
        row.update(setting=setting, images=n)
    fig = few_shot_figure(results)
    assert drawn(fig) == pytest.approx([30, 35, 40, 50]) # 0, 4, 16 and all images


def test_the_way_is_from_plain_clip_to_the_best_few_shot():
    results = results_with(GRID + [('multitask', None, 0, 70), ('clip', None, 0, 65)])
    for row in results['rows'][-2:]:
        row.update(setting='few-shot', images=None)
    table = summary(results).set_index(['method', 'setting', 'gamma'])
    way = table.way['hvae-hyperldm', 'zero-shot', 1.]
    assert way == pytest.approx(100*(50 - 30)/(70 - 30))


def test_every_method_that_reads_questions_has_rows_at_each_share():
    for slug, method in METHODS.items():
        rows = grid_rows(slug, 0, .5, (1.,), preset('smoke'))
        assert all(row['descriptors'] == .5 for row in rows)
        settings = {row['setting'] for row in rows}
        assert settings == {'zero-shot'}, slug
