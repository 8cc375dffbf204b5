"""Guidance is Bayes' rule on scores: the ways to it agree, a weight of nothing
changes nothing, and a classifier is followed."""
import copy
import pytest
import torch
from hypothesis import example, given, settings, strategies as st
from hyperclip_nb.language.cfg import (
    autoguided, classifier_free, classifier_guided, guidance_interval,
)
from hyperclip_nb.language.ddpm import linear_schedule, sample_ddim, split_prediction
from hyperclip_nb.language.noise_net import NoiseNet

D = 3
schedule = linear_schedule(dtype=torch.float64)
few = settings(max_examples=25, deadline=None)
both_kinds = pytest.mark.parametrize('kind', ['eps', 'v'])
assert_close = torch.testing.assert_close


def seed(n=0):
    return torch.Generator().manual_seed(n)


def randn(*size, s=0):
    return torch.randn(*size, generator=seed(s), dtype=torch.float64)


def points(n, s=0):
    "Noisy points (n,D), a step of each (n,), long, and a question of each (n,D)"
    t = torch.randint(350, (n,), generator=seed(s))
    return randn(n, D, s=s), t, randn(n, D, s=s + 1)


def normal(x, t, e):
    "The perfect prediction of ε for data from N(e, I): σ (x - √ᾱ e)"
    return schedule.noise[t][:, None]*(x - schedule.signal[t][:, None]*e)


def unconditional(x, t):
    "The perfect prediction of ε for data from N(0, I)"
    return normal(x, t, 0*x)


def as_kind(model, kind):
    "A model that predicts ε, in terms of `kind`"
    def velocity(x, t, *e):
        noise = schedule.noise[t][:, None]*x
        return (model(x, t, *e) - noise)/schedule.signal[t][:, None]
    return model if kind == 'eps' else velocity


def curved(x):
    "A classifier whose log-probability is no straight slope"
    return -(x - 2).square().sum(1)/2 + x[:, 0].sin()


@few
@example(n=1, gamma=1., s=0)
@given(st.integers(1, 9), st.floats(-3, 8), st.integers(0, 1000))
def test_one_pass_is_two(n, gamma, s):
    x, t, e = points(n, s)
    sizes = []

    def net(x, t, e):
        sizes.append(len(x))
        return normal(x, t, e).sin()

    guided = classifier_free(net, e, gamma)(x, t)
    uncond, cond = normal(x, t, 0*e).sin(), normal(x, t, e).sin()
    assert_close(guided, uncond + gamma*(cond - uncond))
    assert sizes == [n if gamma == 1 else 2*n] # at 1 the other half has no weight


@few
@given(st.integers(1, 9), st.integers(0, 1000))
def test_zero_is_deaf_and_one_is_conditional(n, s):
    x, t, e = points(n, s)
    assert torch.equal(classifier_free(normal, e, 0.)(x, t), normal(x, t, 0*e))
    assert torch.equal(classifier_free(normal, e, 1.)(x, t), normal(x, t, e))


@both_kinds
@pytest.mark.parametrize('gamma', [0., 1., 2.5])
def test_where_guidance_ends_is_known(kind, gamma):
    """Scores of N(0, I) and N(e, I) mix to that of N(γe, I) at every noise level,
    so the whole cloud is shifted by γe"""
    net, x, e = as_kind(normal, kind), randn(50, D), randn(50, D, s=1)
    uncond = as_kind(unconditional, kind)
    start = sample_ddim(uncond, x, schedule, kind, 350)
    guided = classifier_free(net, e, gamma)
    end = sample_ddim(guided, x, schedule, kind, 350)
    assert_close(end - start, gamma*e, atol=.01, rtol=.01)


@both_kinds
@pytest.mark.parametrize('eta', [.5, 2.])
def test_classifier_that_is_a_slope(kind, eta):
    """For data from N(0, I) and log p = a·x the guess of the clean point costs
    nothing: exact at every point, and samples end at N(ηa, I)"""
    x, t, a = points(200)
    model = as_kind(unconditional, kind)

    def slope(x):
        return (x*a).sum(1)

    guided = classifier_guided(model, slope, eta, schedule, kind)
    _, eps = split_prediction(guided(x, t), x, t, schedule, kind)
    assert_close(eps, normal(x, t, eta*a))
    plain_end = sample_ddim(model, x, schedule, kind, 350)
    guided_end = sample_ddim(guided, x, schedule, kind, 350)
    assert_close(guided_end - plain_end, eta*a, atol=.02, rtol=.02)


@few
@given(st.floats(0, 3), st.integers(0, 1000))
def test_eps_and_v_are_the_same_guidance(eta, s):
    x, t, e = points(7, s)

    def predicted_noise(kind):
        model = as_kind(lambda x, t: normal(x, t, e), kind)
        guided = classifier_guided(model, curved, eta, schedule, kind)
        return split_prediction(guided(x, t), x, t, schedule, kind)[1]

    assert_close(predicted_noise('v'), predicted_noise('eps'), atol=1e-8, rtol=1e-8)


@both_kinds
def test_no_weight_no_change_and_more_weight_more_liked(kind):
    model, x = as_kind(unconditional, kind), randn(100, D)

    def sample(eta):
        guided = classifier_guided(model, curved, eta, schedule, kind)
        return sample_ddim(guided, x, schedule, kind, 50)

    assert torch.equal(sample(0.), sample_ddim(model, x, schedule, kind, 50))
    liked = [float(curved(sample(eta)).mean()) for eta in (0., .3, 1., 2.)]
    assert liked == sorted(set(liked))


def test_rows_are_guided_on_their_own():
    """The classifier's gradient of a row is not mixed with other rows', and the
    model gets no gradient"""
    x, t, _ = points(6)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)

    def model(x, t):
        return weight*unconditional(x, t)

    guided = classifier_guided(model, curved, 1., schedule, 'eps')
    with torch.no_grad():
        together = guided(x, t)
        for i in range(6):
            assert_close(guided(x[[i]], t[[i]])[0], together[i])
    assert weight.grad is None and not together.requires_grad


def test_both_kinds_add_up():
    "γ by the conditional model and η by a slope: their shifts of N(0, I) add"
    x, t, e = points(40)
    a = randn(40, D, s=5)
    conditional = classifier_free(normal, e, 1.5)
    model = classifier_guided(conditional, lambda x: (x*a).sum(1), .7, schedule, 'eps')
    assert_close(model(x, t), normal(x, t, 1.5*e + .7*a))


@pytest.fixture
def net():
    "A noise network for latents (B,4) and questions (B,6) that is not silent"
    net = NoiseNet(4, 6, (16, 16), seed()).double()
    torch.nn.init.normal_(net.out.weight, std=.3, generator=seed(1))
    return net


def at_step(t):
    return torch.full((5,), t)


def test_an_interval_switches_between_two_models(net):
    z, e = randn(5, 4, s=6), randn(5, 6, s=5)
    strong, plain = classifier_free(net, e, 3.), classifier_free(net, e, 1.)
    limited = guidance_interval(strong, plain, 100, 200)
    for step in (0, 99, 100, 199, 200, 349):
        model = strong if 100 <= step < 200 else plain
        assert torch.equal(limited(z, at_step(step)), model(z, at_step(step)))


def test_autoguidance_leads_away_from_the_weaker_network(net):
    z, e, t = randn(5, 4, s=6), randn(5, 6, s=5), at_step(50)
    weak = copy.deepcopy(net)
    weak.out.weight.data *= .5
    assert torch.allclose(autoguided(net, weak, e, 1.)(z, t), net(z, t, e))
    assert torch.allclose(autoguided(net, weak, e, 0.)(z, t), weak(z, t, e))
    # away from oneself is nowhere
    assert torch.allclose(autoguided(net, net, e, 5.)(z, t), net(z, t, e))
