"Whitening, strong company, tuning and the laboratory: what must hold whatever the numbers are"
import copy
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hyperclip_nb.cfg import autoguided, classifier_free, on_interval
from hyperclip_nb.company import Ridge, StrongNet, fit_ridge
from hyperclip_nb.hvae import HVAE
from hyperclip_nb.hyperldm import HyperLDM
from hyperclip_nb.tuning import TunedLDM
from hyperclip_nb.whitening import fit_whitening


def seed(n=0): return torch.Generator().manual_seed(n)


@pytest.fixture
def ldm():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ldm = HyperLDM(4, 6, (16, 16), generator=seed())
    torch.nn.init.normal_(ldm.net.out.weight, std=.3, generator=seed(1))
    return ldm.double()


def questions(n, spread, g):
    return torch.randn(n, 6, generator=g, dtype=torch.float64)*torch.logspace(0, -spread, 6, dtype=torch.float64) + 3


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 40), spread=st.floats(0, 3), eps=st.floats(1e-3, 1), s=st.integers(0, 99))
def test_whitening_has_one_length_and_ignores_order_and_scale(n, spread, eps, s):
    e = questions(n, spread, seed(s))
    w = fit_whitening(e, eps).double()
    out = w(e)
    assert torch.isfinite(out).all() and torch.allclose(out.norm(dim=1), torch.full((n,), 8., dtype=torch.float64), atol=1e-3)
    assert torch.allclose(fit_whitening(e.flip(0), eps).double()(e), out, atol=1e-2)
    assert torch.allclose(fit_whitening(7*e, eps).double()(7*e), out, atol=1e-2)     # whoever scales all questions changes nothing


def test_whitening_turns_quiet_directions_up():
    e = questions(500, 2, seed())
    spread = lambda x: (lambda s: (s[0]/s[-1]).item())(torch.linalg.svdvals(x - x.mean(0)))
    by_eps = [spread(fit_whitening(e, eps).double()(e)) for eps in (1., .1, .01)]
    assert spread(e) > by_eps[0] > by_eps[1] > by_eps[2] and by_eps[2] < 4
    w = fit_whitening(e, .05)
    assert set(w.state_dict()) == {'mean', 'turn'}                                   # all that must be stored with a model


def test_ridge_reads_described_tasks_only_and_survives_a_file():
    g = seed(2)
    e, mu = torch.randn(30, 6, generator=g), torch.randn(30, 2, 4, generator=g)
    rows = np.arange(12)
    ridge = fit_ridge(mu, e, rows)
    other = mu.clone(); other[12:] += 5*torch.randn(18, 2, 4, generator=g); other[12:] -= other[12:].mean((0, 1)) - mu[12:].mean((0, 1))
    assert torch.allclose(fit_ridge(other, e, rows)(e), ridge(e), atol=1e-4)         # of undescribed tasks it knows the mean only
    again = Ridge(12, 6, 4); again.load_state_dict(ridge.state_dict())
    assert torch.equal(again(e), ridge(e))
    assert (fit_ridge(mu, e, alpha=1e-6, kappa=.5)(e) - mu.mean(1)).abs().max() < 1e-2  # without a penalty it knows its tasks by heart


def test_strong_net_starts_at_the_multitask_network_and_drops_only_in_training():
    W0 = torch.randn(20, generator=seed())
    net = StrongNet(W0, 6, hidden=32, generator=seed(1))
    e = torch.randn(5, 6, generator=seed(2))
    assert torch.allclose(net(e), W0.expand(5, -1))
    torch.nn.init.normal_(net.h[-1].weight, generator=seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(0); a, b = net.train()(e), net(e)
    assert not torch.equal(a, b) and torch.equal(net.eval()(e), net(e))


def test_gradient_through_the_sampler_is_the_derivative(ldm):
    e, z = torch.randn(3, 6, generator=seed(3), dtype=torch.float64), torch.randn(3, 4, generator=seed(4), dtype=torch.float64)
    ldm.schedule.__init__(ldm.schedule.beta.double(), torch.float64)
    for kw in (dict(), dict(recompute=True)):
        assert torch.autograd.gradcheck(lambda e, z: ldm.denoise(z, e, 2., 4, **kw), (e.requires_grad_(), z.requires_grad_()))
        (grad,) = torch.autograd.grad(ldm.denoise(z, e, 2., 4, **kw).sum(), ldm.net.out.bias)
        moved = []
        for step in (1e-5, -1e-5):
            other = copy.deepcopy(ldm); other.net.out.bias.data[1] += step; other.schedule = ldm.schedule
            moved.append(other.denoise(z, e, 2., 4).sum().item())
        assert abs((moved[0] - moved[1])/2e-5 - grad[1].item()) < 1e-5*max(1, abs(grad[1].item()))


def test_sampling_leaves_no_graph_and_means_are_means(ldm):
    model = TunedLDM(HVAE(20, 4, (8, 8), seed()), ldm.float(), 16, seed(1)).eval()
    torch.nn.init.normal_(model.hvae.decoder[-1].weight, generator=seed(7))
    torch.nn.init.normal_(model.direct[-1].weight, generator=seed(2))
    e = torch.randn(5, 6, generator=seed(3))
    z = torch.randn(15, 4, generator=seed(4))
    assert not ldm.sample(e, 1., seed(4)).requires_grad
    one_by_one = model.write(z, e.repeat_interleave(3, 0), 2.).unflatten(0, (5, 3))
    W = model.sample(e, 2., seed(4), samples=3)
    assert not W.requires_grad and torch.allclose(W, one_by_one.mean(1).detach(), atol=1e-6)
    assert one_by_one.std(1).mean() > 1e-3                                           # three samples are three networks
    assert not torch.allclose(model.sample(e.flip(0), 2., seed(4)), model.sample(e, 2., seed(4)))


def test_other_ways_to_guide(ldm):
    net, e = ldm.net, torch.randn(5, 6, generator=seed(5), dtype=torch.float64)
    z, at = torch.randn(5, 4, generator=seed(6), dtype=torch.float64), lambda t: torch.full((5,), t)
    weak = copy.deepcopy(net); weak.out.weight.data *= .5
    strong, plain = classifier_free(net, e, 3.), classifier_free(net, e, 1.)
    limited = on_interval(strong, plain, 100, 200)
    assert all(torch.equal(limited(z, at(t)), (strong if 100 <= t < 200 else plain)(z, at(t))) for t in (0, 99, 100, 199, 200, 349))
    assert torch.allclose(autoguided(net, weak, e, 1.)(z, at(50)), net(z, at(50), e)) and torch.allclose(autoguided(net, weak, e, 0.)(z, at(50)), weak(z, at(50), e))
    assert torch.allclose(autoguided(net, net, e, 5.)(z, at(50)), net(z, at(50), e))  # away from oneself is nowhere
