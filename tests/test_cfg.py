"Guidance is Bayes' rule on scores: the ways to it agree, a weight of nothing changes nothing, and a classifier is followed."
import copy, pytest, torch
from hypothesis import given, settings, strategies as st
from hyperclip_nb.language.cfg import (
    autoguided, classifier_free, classifier_guided, guidance_interval,
)
from hyperclip_nb.language.ddpm import linear_schedule, sample_ddim, split_prediction
from hyperclip_nb.language.hyperldm import NoiseNet

schedule = linear_schedule(dtype=torch.float64)
few = settings(max_examples=25, deadline=None)
D = 3


def seed(n=0): return torch.Generator().manual_seed(n)
def randn(*size, s=0): return torch.randn(*size, generator=seed(s), dtype=torch.float64)


def normal(x, t, e):
    "The perfect prediction of ε for data from N(e, I): σ (x - √ᾱ e); with zeros, data from N(0, I)"
    return schedule.noise[t][:, None]*(x - schedule.signal[t][:, None]*e)


def velocity(eps):
    "The same prediction as v"
    return lambda x, t, *e: (eps(x, t, *e) - schedule.noise[t][:, None]*x)/schedule.signal[t][:, None]


def points(n, s=0): return randn(n, D, s=s), torch.randint(350, (n,), generator=seed(s)), randn(n, D, s=s + 1)


@few
@given(st.integers(1, 9), st.floats(-3, 8), st.integers(0, 1000))
def test_one_pass_is_two(n, gamma, s):
    x, t, e = points(n, s)
    sizes = []
    net = lambda x, t, e: (sizes.append(len(x)), normal(x, t, e).sin())[1]
    without, told = normal(x, t, 0*e).sin(), normal(x, t, e).sin()
    torch.testing.assert_close(classifier_free(net, e, gamma)(x, t), without + gamma*(told - without))
    assert sizes == [2*n]


@few
@given(st.integers(1, 9), st.integers(0, 1000))
def test_zero_is_deaf_and_one_is_conditional(n, s):
    x, t, e = points(n, s)
    assert torch.equal(classifier_free(normal, e, 0.)(x, t), normal(x, t, 0*e))
    assert torch.equal(classifier_free(normal, e, 1.)(x, t), normal(x, t, e))


@pytest.mark.parametrize('kind', ['eps', 'v'])
@pytest.mark.parametrize('gamma', [0., 1., 2.5])
def test_where_guidance_ends_is_known(kind, gamma):
    "Scores of N(0, I) and N(e, I) mix to that of N(γe, I) at every noise level, so the whole cloud is shifted by γe"
    net, x, e = (normal if kind == 'eps' else velocity(normal)), randn(50, D), randn(50, D, s=1)
    start = sample_ddim(lambda x, t: net(x, t, 0*e), x, schedule, kind, 350)
    torch.testing.assert_close(sample_ddim(classifier_free(net, e, gamma), x, schedule, kind, 350) - start, gamma*e, atol=.01, rtol=.01)


@pytest.mark.parametrize('kind', ['eps', 'v'])
@pytest.mark.parametrize('eta', [.5, 2.])
def test_classifier_that_is_a_slope(kind, eta):
    "For data from N(0, I) and log p = a·x the guess of the clean point costs nothing: exact at every point, and samples end at N(ηa, I)"
    eps = lambda x, t: normal(x, t, 0*x)
    model, (x, t, a) = (eps if kind == 'eps' else velocity(eps)), points(200)
    log_p = lambda x: (x*a).sum(1)
    noise = split_prediction(classifier_guided(model, log_p, eta, schedule, kind)(x, t), x, t, schedule, kind)[1]
    torch.testing.assert_close(noise, normal(x, t, eta*a))
    walk = lambda model: sample_ddim(model, x, schedule, kind, 350)
    torch.testing.assert_close(walk(classifier_guided(model, log_p, eta, schedule, kind)) - walk(model), eta*a, atol=.02, rtol=.02)


def curved(x): return -(x - 2).square().sum(1)/2 + x[:, 0].sin()


@few
@given(st.floats(0, 3), st.integers(0, 1000))
def test_eps_and_v_are_the_same_guidance(eta, s):
    x, t, e = points(7, s)
    eps = lambda x, t: normal(x, t, e)
    as_eps = classifier_guided(eps, curved, eta, schedule, 'eps')(x, t)
    as_v = classifier_guided(velocity(eps), curved, eta, schedule, 'v')(x, t)
    torch.testing.assert_close(split_prediction(as_v, x, t, schedule, 'v')[1], as_eps, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize('kind', ['eps', 'v'])
def test_no_weight_no_change_and_more_weight_more_liked(kind):
    model, x = (lambda f: f if kind == 'eps' else velocity(f))(lambda x, t: normal(x, t, 0*x)), randn(100, D)
    walk = lambda eta: sample_ddim(classifier_guided(model, curved, eta, schedule, kind), x, schedule, kind, 50)
    assert torch.equal(walk(0.), sample_ddim(model, x, schedule, kind, 50))
    liked = [curved(walk(eta)).mean() for eta in (0., .3, 1., 2.)]
    assert all(a < b for a, b in zip(liked, liked[1:]))


def test_rows_are_guided_on_their_own():
    "The classifier's gradient of a row is not mixed with other rows', and the model gets no gradient"
    x, t, e = points(6)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        together = classifier_guided(lambda x, t: weight*normal(x, t, 0*x), curved, 1., schedule, 'eps')(x, t)
        for i in range(6):
            alone = classifier_guided(lambda x, t: weight*normal(x, t, 0*x), curved, 1., schedule, 'eps')(x[[i]], t[[i]])
            torch.testing.assert_close(alone[0], together[i])
    assert weight.grad is None and not together.requires_grad


def test_both_kinds_add_up():
    "γ by the conditional model and η by a slope: their shifts of N(0, I) add"
    x, t, e = points(40)
    a = randn(40, D, s=5)
    model = classifier_guided(classifier_free(normal, e, 1.5), lambda x: (x*a).sum(1), .7, schedule, 'eps')
    torch.testing.assert_close(model(x, t), normal(x, t, 1.5*e + .7*a))


def test_other_ways_to_guide():
    net, e = NoiseNet(4, 6, (16, 16), seed()).double(), randn(5, 6, s=5)
    torch.nn.init.normal_(net.out.weight, std=.3, generator=seed(1))
    z, at = randn(5, 4, s=6), lambda t: torch.full((5,), t)
    weak = copy.deepcopy(net); weak.out.weight.data *= .5
    strong, plain = classifier_free(net, e, 3.), classifier_free(net, e, 1.)
    limited = guidance_interval(strong, plain, 100, 200)
    assert all(torch.equal(limited(z, at(t)), (strong if 100 <= t < 200 else plain)(z, at(t))) for t in (0, 99, 100, 199, 200, 349))
    assert torch.allclose(autoguided(net, weak, e, 1.)(z, at(50)), net(z, at(50), e)) and torch.allclose(autoguided(net, weak, e, 0.)(z, at(50)), weak(z, at(50), e))
    assert torch.allclose(autoguided(net, net, e, 5.)(z, at(50)), net(z, at(50), e))  # away from oneself is nowhere
