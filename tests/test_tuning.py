"""Whitening, baselines and tuning: what must hold whatever the numbers are."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from hyperclip_nb.base.adapt import evaluate, task_losses
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.base.training import fit_tasks
from hyperclip_nb.data.batches import Features, TaskData, all_texts
from hyperclip_nb.data.tasks import Task
from hyperclip_nb.generators.hvae import HVAE
from hyperclip_nb.language.baselines import (
    ResidualHyperNet, Ridge, fit_ridge, train_residual_hypernet,
)
from hyperclip_nb.language.hyperldm import HyperLDM
from hyperclip_nb.language.tuning import TunedLDM, tune
from hyperclip_nb.language.whitening import fit_whitening


def seed(n=0):
    return torch.Generator().manual_seed(n)


# Whitening

def questions(n, spread, generator):
    "Embeddings that vary less and less from one direction to the next (n,6)"
    scale = torch.logspace(0, -spread, 6, dtype=torch.float64)
    return torch.randn(n, 6, generator=generator, dtype=torch.float64)*scale + 3


def whitening(e, eps=.05):
    return fit_whitening(e, eps).double()


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(2, 40), spread=st.floats(0, 3), eps=st.floats(1e-3, 1),
    s=st.integers(0, 99),
)
def test_whitening_has_one_length_and_ignores_order_and_scale(n, spread, eps, s):
    e = questions(n, spread, seed(s))
    out = whitening(e, eps)(e)
    assert torch.isfinite(out).all()
    length = torch.full((n,), 8., dtype=torch.float64)
    assert torch.allclose(out.norm(dim=1), length, atol=1e-3)
    assert torch.allclose(whitening(e.flip(0), eps)(e), out, atol=1e-2)
    # whoever scales all questions changes nothing
    assert torch.allclose(whitening(7*e, eps)(7*e), out, atol=1e-2)


def test_whitening_turns_quiet_directions_up():
    e = questions(500, 2, seed())

    def spread(x):
        singular = torch.linalg.svdvals(x - x.mean(0))
        return (singular[0]/singular[-1]).item()

    large, medium, small = [spread(whitening(e, eps)(e)) for eps in (1., .1, .01)]
    assert spread(e) > large > medium > small
    assert small < 4
    # all that must be stored with a model
    assert set(fit_whitening(e).state_dict()) == {'mean', 'turn'}


def test_questions_that_are_all_the_same_are_refused():
    with pytest.raises(ValueError, match='the same'):
        fit_whitening(torch.ones(5, 6))
    with pytest.raises(ValueError, match='at least two'):
        fit_whitening(torch.ones(1, 6))


# Baselines

def ridge_data():
    generator = seed(2)
    e = torch.randn(30, 6, generator=generator)
    mu = torch.randn(30, 2, 4, generator=generator)
    return e, mu, generator


def test_ridge_reads_described_tasks_only():
    e, mu, generator = ridge_data()
    task_ids = np.arange(12)
    other = mu.clone()
    other[12:] += 5*torch.randn(18, 2, 4, generator=generator)
    other[12:] -= other[12:].mean((0, 1)) - mu[12:].mean((0, 1))
    # of undescribed tasks it knows the mean only
    guess, same = fit_ridge(mu, e, task_ids)(e), fit_ridge(other, e, task_ids)(e)
    assert torch.allclose(guess, same, atol=1e-4)


@pytest.mark.parametrize('kappa', [.01, .5])
def test_ridge_survives_a_file(kappa):
    "How fast likeness fades is in the file too"
    e, mu, _ = ridge_data()
    ridge = fit_ridge(mu, e, np.arange(12), kappa=kappa)
    again = Ridge(12, 6, 4)
    again.load_state_dict(ridge.state_dict())
    assert torch.equal(again(e), ridge(e))


def test_ridge_without_a_penalty_knows_its_tasks_by_heart():
    e, mu, _ = ridge_data()
    guess = fit_ridge(mu, e, alpha=1e-6, kappa=.5)(e)
    assert (guess - mu.mean(1)).abs().max() < 1e-2


def test_residual_hypernet_starts_at_its_network_and_drops_only_in_training():
    W0 = torch.randn(20, generator=seed())
    net = ResidualHyperNet(W0, 6, hidden=32, generator=seed(1))
    e = torch.randn(5, 6, generator=seed(2))
    assert torch.allclose(net(e), W0.expand(5, -1))
    nn.init.normal_(net.h[-1].weight, generator=seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net.train()
        assert not torch.equal(net(e), net(e))
    net.eval()
    assert torch.equal(net(e), net(e))


# Through the sampler

@pytest.fixture
def ldm():
    ldm = HyperLDM(4, 6, (16, 16), generator=seed())
    nn.init.normal_(ldm.net.out.weight, std=.3, generator=seed(1))
    return ldm


@pytest.mark.parametrize('options', [dict(), dict(recompute=True)])
def test_gradient_through_the_sampler_is_the_derivative(ldm, options):
    ldm = ldm.double()
    e = torch.randn(3, 6, generator=seed(3), dtype=torch.float64)
    z = torch.randn(3, 4, generator=seed(4), dtype=torch.float64)

    def denoise(e, z):
        return ldm.denoise(z, e, 2., 4, **options)

    inputs = e.clone().requires_grad_(), z.clone().requires_grad_()
    assert torch.autograd.gradcheck(denoise, inputs)
    grad, = torch.autograd.grad(denoise(e, z).sum(), ldm.net.out.bias)

    def moved(step):
        other = copy.deepcopy(ldm)
        other.net.out.bias.data[1] += step
        return other.denoise(z, e, 2., 4).sum().item()

    numerical = (moved(1e-5) - moved(-1e-5))/2e-5
    expected = grad[1].item()
    assert abs(numerical - expected) < 1e-5*max(1, abs(expected))


@pytest.fixture
def model(ldm):
    "A tuned model, none of whose parts is zero"
    hvae = HVAE(20, 4, (8, 8), seed())
    model = TunedLDM(hvae, ldm, hidden=16, generator=seed(1)).eval()
    nn.init.normal_(model.hvae.decoder[-1].weight, generator=seed(7))
    nn.init.normal_(model.direct[-1].weight, generator=seed(2))
    return model


def test_sampling_leaves_no_graph(ldm, model):
    e = torch.randn(5, 6, generator=seed(3))
    assert not ldm.sample(e, 1., seed(4)).requires_grad
    assert not model.sample(e, seed(4)).requires_grad


def test_means_are_means(model):
    e = torch.randn(5, 6, generator=seed(3))
    z = torch.randn(15, 4, generator=seed(4))
    W = model.sample(e, seed(4), samples=3, gamma=2.)
    single = model.write(z, e.repeat_interleave(3, 0), 2.).unflatten(0, (5, 3))
    assert torch.allclose(W, single.mean(1).detach(), atol=1e-6)
    assert single.std(1).mean() > 1e-3 # three samples are three networks
    assert torch.equal(model.sample(e, seed(4), 3), W) # γ = 2 is its own
    other = model.sample(e.flip(0), seed(4))
    assert not torch.allclose(other, model.sample(e, seed(4)))


# Tuning

def toy_task(i):
    "Twelve images of its own and three answers"
    image, answer = np.arange(12) + 12*i, np.arange(12) % 3
    pairs = np.stack([image, answer], 1)
    return Task(f'question {i}', 'it is {}', ('a', 'b', 'c'), pairs, pairs, f'{i}')


def toy(n, generator):
    "A few toy tasks, with an HVAE, a plain HyperLDM and the latents it would learn"
    tasks = [toy_task(i) for i in range(n)]
    texts = all_texts(tasks)
    image = torch.randn(12*n, 6, generator=generator)
    text = torch.randn(len(texts), 6, generator=generator)
    data = TaskData(tasks, Features(image, text, texts))
    adapter = Adapter(6, 4)
    weights = torch.randn(n, 2, adapter.n_weights, generator=generator)
    hvae = HVAE(adapter.n_weights, 4, (8, 8), generator)
    hvae.measure(weights)
    hvae.requires_grad_(False)
    ldm = HyperLDM(4, 6, (16, 16), generator=generator).requires_grad_(False)
    return adapter, data, (hvae, ldm, *hvae.encode(weights))


def test_training_never_reads_an_undescribed_question():
    adapter, data, start = toy(12, seed(8))
    spoiled = data.reread(data.e.clone())
    spoiled.e[5:] = 1e3
    valid = data.reread(data.e.flip(0))
    options = dict(epochs=2, task_ids=np.arange(5))

    def tuned(data):
        return tune(
            adapter, *start, data, valid, keep=.1, generator=seed(9), **options
        )

    def residual(data):
        hvae = start[0]
        return train_residual_hypernet(
            adapter, hvae.mean, data, valid, generator=seed(9), **options
        )

    for train in (tuned, residual):
        one, other = train(data)[0].state_dict(), train(spoiled)[0].state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_tuning_without_steps_leaves_the_start():
    adapter, data, start = toy(8, seed(10))
    hvae, _, mu, _ = start
    model, _ = tune(
        adapter, *start, data, data, epochs=1, lr=0., generator=seed(11)
    )
    assert torch.equal(model.hvae.decode(mu), hvae.decode(mu))
    assert not model.direct(data.e).any()


def test_a_training_that_harms_leaves_the_start():
    adapter, data, _ = toy(8, seed(10))
    W = torch.zeros(adapter.n_weights, requires_grad=True)

    def score():
        return float(evaluate(adapter, W.detach(), data).mean())

    def to_be_wrong(batch):
        return -task_losses(adapter, W, batch).mean()

    start = score()
    history = fit_tasks(
        [W], lambda e: W, adapter, data, data, 3, 1., seed(), loss=to_be_wrong
    )
    best = max(epoch['accuracy'] for epoch in history)
    assert best > start or not W.any()
    assert score() == pytest.approx(max(start, best))
