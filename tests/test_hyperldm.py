"""A HyperLDM obeys its guidance scale, its classifier and its seed, and learns
from tasks without a question."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn

from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.base.training import bf16_autocast
from hyperclip_nb.generators.hvae import HVAE, kl_divergence, reparameterize
from hyperclip_nb.language import hyperldm as module
from hyperclip_nb.language.baselines import train_regression
from hyperclip_nb.language.ddpm import sample_ddim
from hyperclip_nb.language.hyperldm import HyperLDM, train_hyperldm
from hyperclip_nb.language.noise_net import NoiseNet

D, Z = 6, 4
P = Adapter(D, hidden=3).n_weights
few_examples = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31 - 1)


def seed(n=0):
    return torch.Generator().manual_seed(n)


def questions(n, s=0):
    return torch.randn(n, D, generator=seed(100 + s))


def untrained(kind='v'):
    "A HyperLDM whose output is not zero"
    ldm = HyperLDM(Z, D, (8, 12), kind, seed(1))
    nn.init.normal_(ldm.net.out.weight, std=.3, generator=seed(2))
    return ldm.requires_grad_(False)


def equal_states(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


# Sampling

@few_examples
@given(sizes, seeds, st.sampled_from(['v', 'eps']))
def test_zero_guidance_ignores_the_question(n, s, kind):
    ldm = untrained(kind)

    def sample(e, gamma):
        return ldm.sample(e, gamma, seed(s), steps=5)

    e, other = questions(n), questions(n, 1)
    assert torch.equal(sample(e, 0.), sample(other, 0.))
    assert not torch.equal(sample(e, 1.), sample(other, 1.))


@pytest.mark.parametrize('kind', ['v', 'eps'])
def test_guidance_of_one_is_the_conditional_model(kind):
    ldm = untrained(kind)
    ldm.mean.fill_(3.)
    ldm.std.fill_(2.)
    e = questions(5)
    noise = torch.randn(5, Z, generator=seed(3))

    def conditional(z, t):
        return ldm.net(z, t, e)

    expected = 3 + 2*sample_ddim(conditional, noise, ldm.schedule, kind, 10)
    found = ldm.sample(e, 1., seed(3), steps=10)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['v', 'eps'])
def test_a_classifier_is_asked_about_latents_and_followed(kind):
    ldm = untrained(kind)
    ldm.mean.fill_(50.)
    ldm.std.fill_(2.)
    e, seen = questions(30), []

    def log_p(z):
        seen.append(z.detach())
        return -(z - 52).square().sum(1)/4

    def guided(eta):
        return ldm.sample(e, 1., seed(3), log_p=log_p, eta=eta)

    plain = ldm.sample(e, 1., seed(3))
    assert torch.equal(guided(0.), plain)
    followed = guided(.5)
    assert not followed.requires_grad
    assert all(z.shape == (30, Z) for z in seen)
    assert (seen[-1] - 50).abs().mean() < 10 # in the decoder's units, not around 0
    assert log_p(followed).mean() > log_p(plain).mean()


def test_a_question_of_zeros_cannot_be_guided():
    "Where there is nothing to read, every guidance scale gives the same sample"
    ldm, e = untrained(), torch.zeros(5, D)
    ignored, exaggerated = ldm.sample(e, 0., seed(3)), ldm.sample(e, 4., seed(3))
    torch.testing.assert_close(ignored, exaggerated)


def test_seeds():
    ldm, e = untrained(), questions(5)
    z = ldm.sample(e, 1.5, seed(3))
    assert torch.equal(z, ldm.sample(e, 1.5, seed(3)))
    assert not torch.equal(z, ldm.sample(e, 1.5, seed(4)))


# The noise network

def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@few_examples
@given(sizes, seeds)
def test_a_network_for_given_questions_is_the_same_network(n, s):
    "Whether steps differ or are one number expanded; gradients reach its weights"
    net = untrained().net.double().requires_grad_()
    params = list(net.parameters())
    e = questions(n).double()
    z = torch.randn(n, Z, generator=seed(s)).double()
    different = torch.randint(350, (n,), generator=seed(s))
    common = torch.full((), s % 350).expand(n)
    for t in (different, common):
        fixed, free = net.given(e)(z, t), net(z, t.clone(), e)
        close(fixed, free)
        of_fixed = torch.autograd.grad(fixed.square().sum(), params)
        of_free = torch.autograd.grad(free.square().sum(), params)
        for a, b in zip(of_fixed, of_free):
            close(a, b)


@torch.no_grad()
def test_every_block_and_the_condition_are_used():
    net = NoiseNet(Z, D, (8, 8), seed(0))
    nn.init.normal_(net.out.weight, std=.3, generator=seed(1))
    z = torch.randn(7, Z, generator=seed(2))
    t, e = torch.arange(7)*50, questions(7)
    before = net(z, t, e)
    for block in net.blocks:
        weight = block.norm.weight.clone()
        block.norm.weight.zero_() # it adds nothing
        assert not torch.allclose(net(z, t, e), before)
        block.norm.weight.copy_(weight)
    assert not torch.allclose(net(z, t + 100, e), before)
    assert not torch.allclose(net(z, t, -e), before)


def test_the_network_of_the_paper_has_the_authors_number_of_parameters():
    with torch.device('meta'):
        net = NoiseNet(32, 768, (8192, 16384, 8192))
    assert sum(p.numel() for p in net.parameters()) == 567_866_080


# Training

@pytest.fixture(scope='module')
def latents():
    "Two kinds of weights that two questions tell apart, and an HVAE that passes them"
    hvae = HVAE(P, Z, (), seed(0)).requires_grad_(False) # no hidden layers: linear
    e = torch.eye(D)[:2].repeat_interleave(20, 0)*D**.5
    weights = torch.tensor([.5, -.5]).repeat_interleave(20)[:, None, None]
    weights = weights.repeat(1, 2, P)
    weights += .1*torch.randn(weights.shape, generator=seed(1))
    hvae.measure(weights)
    return hvae, weights, e


small = dict(steps=150, batch=32, hidden=(32, 32))


def learn(latents, **changes):
    hvae, weights, e = latents
    options = small | changes
    return train_hyperldm(*hvae.encode(weights), e, generator=seed(5), **options)


def falls(history):
    return sum(history[-30:]) < sum(history[:30])


def test_training_repeats_itself_and_learns_the_question(latents):
    hvae, weights, e = latents
    ldm, history = learn(latents)
    again, same = learn(latents)
    assert history == same and equal_states(ldm, again)
    assert falls(history)
    truth = hvae.encode(weights)[0].mean(1)
    z = ldm.sample(e, 1., seed(6))

    def distance(drawn, true):
        return (z[drawn] - truth[true].mean(0)).norm(dim=1).mean()

    first, second = slice(0, 20), slice(20, 40)
    assert distance(first, first) < distance(first, second)
    assert distance(second, second) < distance(second, first)


def test_every_parameter_is_trained_and_the_average_lags(latents):
    ldm, _ = learn(latents)
    raw, _ = learn(latents, ema=0.)
    start = HyperLDM(Z, D, (32, 32), generator=seed(5))
    last, first = dict(raw.net.named_parameters()), dict(start.net.named_parameters())
    for name, p in ldm.net.named_parameters():
        assert not torch.equal(p, first[name]), f'{name} is where it started'
        assert not torch.equal(p, last[name]), f'{name} was not averaged'


def test_training_in_half_precision_learns():
    "A block around a whole training must not keep the first step's weights"
    mu, e = torch.randn(40, 2, Z, generator=seed(1)), questions(40)
    losses = {}
    for on in (False, True):
        with bf16_autocast(on, 'cpu'):
            _, losses[on] = train_regression(
                mu, e, steps=60, lr=1e-2, generator=seed(2)
            )
    start, end = losses[False][0], losses[False][-1]
    assert end < .7*start
    assert abs(losses[True][-1] - end) < .05*start


def test_latents_are_normalized(latents):
    hvae, weights, _ = latents
    ldm, _ = learn(latents, steps=2)
    mu, log_var = (x.repeat(1, 50, 1) for x in hvae.encode(weights))
    z = reparameterize(mu, log_var, seed(0)).flatten(0, 1)
    z = (z - ldm.mean)/ldm.std
    torch.testing.assert_close(z.mean(0), torch.zeros(Z), atol=.05, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(Z), atol=.05, rtol=0)


def test_latents_without_a_variance(latents):
    "A log-variance of -inf is no noise, in the scale and in the draws"
    _, weights, e = latents
    mu = weights[..., :Z]*torch.tensor([1., 2., 3., 4.])
    certain = torch.full_like(mu, -torch.inf)
    ldm, history = train_hyperldm(mu, certain, e, generator=seed(5), **small)
    torch.testing.assert_close(ldm.mean, mu.mean((0, 1)))
    torch.testing.assert_close(ldm.std, mu.var((0, 1)).sqrt())
    z = ldm.sample(e, 1., seed(6))
    assert torch.isfinite(z).all() and torch.isfinite(torch.tensor(history)).all()
    assert falls(history)
    assert z[:20].mean() > z[20:].mean()


def test_only_described_tasks_are_read_and_all_are_learned_from(latents):
    "Of other tasks, questions are never read; their latents are, without a question"
    hvae, weights, e = latents
    mu, log_var = hvae.encode(weights)
    options = small | dict(steps=40)

    def fitted(e, mu=mu, task_ids=None):
        return train_hyperldm(mu, log_var, e, task_ids, generator=seed(5), **options)

    ldm, history = fitted(e, task_ids=range(20))
    spoiled = e.clone()
    spoiled[20:] = 7.
    other, same = fitted(spoiled, task_ids=range(20))
    assert history == same and equal_states(ldm, other)
    moved = mu.clone()
    moved[20:] += 1
    other, different = fitted(e, moved, range(20))
    assert different != history # the unconditional half has seen them
    torch.testing.assert_close(other.mean, moved.mean((0, 1)))
    assert fitted(e, task_ids=range(40))[1] == fitted(e)[1] # all tasks is no selection


def test_the_unconditional_half_stays_usable(latents):
    "With γ = 0, latents of both questions, although only one was ever described"
    hvae, weights, e = latents
    ldm, _ = learn(latents, task_ids=range(20), p_uncond=.5, steps=400)
    truth = hvae.encode(weights)[0].mean(1)
    centers = truth.unflatten(0, (2, 20)).mean(1)

    def share_of_second(gamma):
        z = ldm.sample(e[:1].repeat(200, 1), gamma, seed(6))
        return (torch.cdist(z, centers).argmin(1) == 1).float().mean()

    assert .25 < share_of_second(0.) < .75
    assert share_of_second(1.) < .1


def test_latents_are_drawn_anew_each_with_its_own_question(monkeypatch):
    "What the noise network gets in training, and that of `task_ids` alone it reads"
    n, drawn, conds = 8, [], []
    loss = module.diffusion_loss

    def recorded(net, z, schedule, kind, generator, cond):
        drawn.append(z)
        conds.append(cond)
        return loss(net, z, schedule, kind, generator, cond)

    monkeypatch.setattr(module, 'diffusion_loss', recorded)
    mu = 10.*torch.arange(n)[:, None, None].expand(n, 1, Z)
    log_var = torch.full_like(mu, 2*math.log(.5))
    e = questions(n)
    options = dict(steps=40, batch=32, hidden=(8,), p_uncond=.5, generator=seed(5))
    ldm, _ = train_hyperldm(mu, log_var, e, task_ids=[1, 3], **options)

    z, cond = torch.cat(drawn)*ldm.std + ldm.mean, torch.cat(conds)
    task, has_question = (z.mean(1)/10).round().long(), cond.any(1)
    noise = z - 10.*task[:, None]
    torch.testing.assert_close(noise.std(), torch.tensor(.5), atol=.02, rtol=0)
    assert len(z.unique(dim=0)) == len(z)
    assert set(task[has_question].tolist()) == {1, 3}
    assert set(task[~has_question].tolist()) == set(range(n))
    assert torch.equal(cond[has_question], e[task[has_question]])
    assert .4 < has_question.float().mean() < .6


def test_regression_finds_the_mean():
    mu = torch.tensor([[[-1.], [1.]], [[1.], [3.]], [[50.], [50.]]])
    e = torch.eye(3)
    e[2] = torch.nan # not described, never read
    options = dict(task_ids=[0, 1], steps=300, lr=1e-2, hidden=(16,))
    net, history = train_regression(mu, e, generator=seed(1), **options)
    again, same = train_regression(mu, e, generator=seed(1), **options)
    guess = net(e[:2])
    expected = torch.tensor([[0.], [2.]])
    torch.testing.assert_close(guess, expected, atol=.05, rtol=0)
    assert history == same and torch.equal(guess, again(e[:2]))
    assert history[-1] < history[0]


@few_examples
@given(st.integers(0, 1000), st.integers(1, 6))
def test_divergence(s, n):
    "Never negative, as PyTorch has it, and zero just for the standard normal"
    mu, log_var = torch.randn(2, n, Z, generator=seed(s)).unbind()
    kl = kl_divergence(mu, log_var)
    normal = torch.distributions.Normal(mu, (log_var/2).exp())
    standard = torch.distributions.Normal(0., 1.)
    expected = torch.distributions.kl_divergence(normal, standard).sum(-1)
    torch.testing.assert_close(kl, expected)
    assert (kl > 0).all()
    assert kl_divergence(0*mu, 0*mu).eq(0).all()


@pytest.mark.parametrize('mu', [
    torch.zeros(6, 2, 4), # all the same
    torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))*torch.eye(4)[0],
    torch.ones(1, 1, 4), # one latent alone
])
def test_a_constant_latent_is_learned_as_such(mu):
    "Nothing to divide by is no NaN: the loss is finite, and what is constant stays so"
    log_var = torch.full_like(mu, -torch.inf)
    e = torch.eye(len(mu), 8)
    ldm, losses = train_hyperldm(
        mu, log_var, e, steps=25, hidden=(16,),
        generator=torch.Generator().manual_seed(0))
    assert all(map(math.isfinite, losses))
    assert torch.isfinite(ldm.mean).all() and torch.isfinite(ldm.std).all()
    assert (ldm.std > 0).all()
    assert torch.allclose(ldm.mean, mu.mean((0, 1)))


@pytest.mark.parametrize('tasks', [1, 3])
def test_weights_that_are_all_the_same_have_latents(tasks):
    "Nothing to divide by: an autoencoder gives finite latents, and the weights back"
    W = torch.arange(12.).expand(tasks, 12)
    hvae = HVAE(12, 4, (8,))
    hvae.measure(W)
    mu, log_var = hvae.encode(W)
    assert torch.isfinite(mu).all() and torch.isfinite(log_var).all()
    assert torch.allclose(hvae.mean, W[0]) and hvae.scale == 1
