"Whitening, strong company, tuning and the laboratory: what must hold whatever the numbers are"
import copy
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from hyperclip_nb.base.adapt import evaluate, task_losses
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.language.baselines import (
    ResidualHyperNet, Ridge, fit_ridge, train_residual_hypernet,
)
from hyperclip_nb.generators.hvae import HVAE
from hyperclip_nb.language.hyperldm import HyperLDM
from hyperclip_nb.writer.writer import save_hyperldm
from hyperclip_nb.base.training import fit_tasks
from hyperclip_nb.data.batches import Features, TaskData, all_texts
from hyperclip_nb.data.tasks import Task
from hyperclip_nb.language.tuning import TunedLDM, tune
from hyperclip_nb.writer.writer import load_tuned, load_writer, save_tuned
from hyperclip_nb.language.whitening import fit_whitening


def seed(n=0): return torch.Generator().manual_seed(n)


@pytest.fixture
def ldm():
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
    for kappa in (.01, .5):                                                          # how fast likeness fades is in the file too
        once = fit_ridge(mu, e, rows, kappa=kappa); again = Ridge(12, 6, 4); again.load_state_dict(once.state_dict())
        assert torch.equal(again(e), once(e))
    assert (fit_ridge(mu, e, alpha=1e-6, kappa=.5)(e) - mu.mean(1)).abs().max() < 1e-2  # without a penalty it knows its tasks by heart


def test_strong_net_starts_at_the_multitask_network_and_drops_only_in_training():
    W0 = torch.randn(20, generator=seed())
    net = ResidualHyperNet(W0, 6, hidden=32, generator=seed(1))
    e = torch.randn(5, 6, generator=seed(2))
    assert torch.allclose(net(e), W0.expand(5, -1))
    torch.nn.init.normal_(net.h[-1].weight, generator=seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(0); a, b = net.train()(e), net(e)
    assert not torch.equal(a, b) and torch.equal(net.eval()(e), net(e))


def test_gradient_through_the_sampler_is_the_derivative(ldm):
    e, z = torch.randn(3, 6, generator=seed(3), dtype=torch.float64), torch.randn(3, 4, generator=seed(4), dtype=torch.float64)
    for kw in (dict(), dict(recompute=True)):
        assert torch.autograd.gradcheck(lambda e, z: ldm.denoise(z, e, 2., 4, **kw), (e.requires_grad_(), z.requires_grad_()))
        (grad,) = torch.autograd.grad(ldm.denoise(z, e, 2., 4, **kw).sum(), ldm.net.out.bias)
        moved = []
        for step in (1e-5, -1e-5):
            other = copy.deepcopy(ldm); other.net.out.bias.data[1] += step
            moved.append(other.denoise(z, e, 2., 4).sum().item())
        assert abs((moved[0] - moved[1])/2e-5 - grad[1].item()) < 1e-5*max(1, abs(grad[1].item()))


def test_sampling_leaves_no_graph_and_means_are_means(ldm):
    model = TunedLDM(HVAE(20, 4, (8, 8), seed()), ldm.float(), hidden=16, generator=seed(1)).eval()
    torch.nn.init.normal_(model.hvae.decoder[-1].weight, generator=seed(7))
    torch.nn.init.normal_(model.direct[-1].weight, generator=seed(2))
    e = torch.randn(5, 6, generator=seed(3))
    z = torch.randn(15, 4, generator=seed(4))
    assert not ldm.sample(e, 1., seed(4)).requires_grad
    one_by_one = model.write(z, e.repeat_interleave(3, 0), 2.).unflatten(0, (5, 3))
    W = model.sample(e, seed(4), samples=3, gamma=2.)
    assert not W.requires_grad and torch.allclose(W, one_by_one.mean(1).detach(), atol=1e-6)
    assert one_by_one.std(1).mean() > 1e-3                                           # three samples are three networks
    assert torch.equal(model.sample(e, seed(4), 3), W)                               # γ = 2 is its own
    assert not torch.allclose(model.sample(e.flip(0), seed(4)), model.sample(e, seed(4)))


def tasks(n, g):
    "A few toy tasks whose answers hang on the question, with a plain HyperLDM"
    made = [Task(f'question {i}', 'it is {}', ('a', 'b', 'c'), np.stack([np.arange(12) + 12*i, np.arange(12) % 3], 1), np.stack([np.arange(12) + 12*i, np.arange(12) % 3], 1), f'{i}') for i in range(n)]
    texts = all_texts(made)
    data = TaskData(made, Features(torch.randn(12*n, 6, generator=g), torch.randn(len(texts), 6, generator=g), texts))
    adapter = Adapter(6, 4)
    weights = torch.randn(n, 2, adapter.n_weights, generator=g)
    hvae = HVAE(adapter.n_weights, 4, (8, 8), g); hvae.measure(weights); hvae.requires_grad_(False)
    ldm = HyperLDM(4, 6, (16, 16), generator=g).requires_grad_(False)
    return adapter, hvae, ldm, *hvae.encode(weights), data


def test_tuning_never_reads_an_undescribed_question():
    adapter, hvae, ldm, mu, log_var, data = tasks(12, seed(8))
    rows = np.arange(5)
    spoiled = data.reread(data.e.clone()); spoiled.e[5:] = 1e3
    valid = data.reread(data.e.flip(0))
    for train in (lambda d: tune(adapter, hvae, ldm, mu, log_var, d, valid, rows, epochs=2, keep=.1, generator=seed(9))[0].state_dict(),
                  lambda d: train_residual_hypernet(adapter, hvae.mean, d, valid, epochs=2, generator=seed(9), task_ids=rows)[0].state_dict()):
        one, other = train(data), train(spoiled)
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_a_training_that_harms_leaves_the_start():
    adapter, hvae, ldm, mu, log_var, data = tasks(8, seed(10))
    model, history = tune(adapter, hvae, ldm, mu, log_var, data, data, epochs=1, lr=0., generator=seed(11))
    assert torch.equal(model.hvae.decode(mu), hvae.decode(mu)) and not model.direct(data.e).any()
    W = torch.zeros(adapter.n_weights, requires_grad=True)
    worse = lambda batch: -task_losses(adapter, W, batch).mean()                     # it learns to be wrong
    start = float(evaluate(adapter, W.detach(), data).mean())
    history = fit_tasks([W], lambda e: W, adapter, data, data, 3, 1., seed(), loss=worse)
    assert max(h['accuracy'] for h in history) > start or not W.any()
    assert float(evaluate(adapter, W.detach(), data).mean()) == pytest.approx(max(start, *(h['accuracy'] for h in history)))


def test_damaged_files_are_named(tmp_path):
    adapter, hvae, ldm, mu, _, data = tasks(4, seed(12))
    path, whiten = tmp_path/'tuned.safetensors', fit_whitening(data.e)
    model = TunedLDM(hvae, ldm).eval()
    save_tuned(path, adapter, model, whiten, 'a clip', gamma=2.)
    _, back, white, facts = load_tuned(path)
    assert facts == dict(clip='a clip', gamma=2.) and torch.allclose(white(data.e), whiten(data.e), atol=.05)
    assert torch.allclose(load_writer(path)[1](data.e, 2., seed()), back.sample(white(data.e), seed(), 8, 2.))
    whole = path.read_bytes()
    for broken in (whole[:200], whole[:-50], b''):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match='tuned.safetensors'): load_writer(path)
    save_hyperldm(path, adapter, hvae, ldm, 'a clip')
    with pytest.raises(ValueError, match='beside a HyperLDM it holds'): load_tuned(path)


def test_questions_that_are_all_the_same_are_refused():
    with pytest.raises(ValueError, match='the same'): fit_whitening(torch.ones(5, 6))
    with pytest.raises(ValueError, match='at least two'): fit_whitening(torch.ones(1, 6))
