"The meta-gradient is the derivative that it claims to be; tasks of a batch do not know of each other; FiLM writes weights."
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hyperclip_nb.base.adapt import adapt, task_losses
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.generators import maml
from hyperclip_nb.generators.hypernet import HyperNet
from hyperclip_nb.generators.maml import (
    HNet, inner_loop, maml_loss, split_batch, train_cond_hnet_maml, train_hnet_maml,
    train_mnet_maml,
)
from hyperclip_nb.generators.fast_maml import defer_weight_grad
from hyperclip_nb.generators.multitask import FiLM, train_cond_film
from hyperclip_nb.data.batches import Features, TaskBatch, TaskData, all_texts
from hyperclip_nb.data.tasks import make_task

D = 6
adapter = Adapter(D, hidden=4, temperature=3.)
sizes = st.lists(st.tuples(st.integers(2, 7), st.integers(2, 5)), min_size=1, max_size=5)  # images and answers of each task
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=30, deadline=None)
close = torch.testing.assert_close
def seed(n=0): return torch.Generator().manual_seed(n)


def make_batch(sizes, n, filling=0.):
    "Tasks of the given sizes in double precision; whatever is padding holds `filling`"
    g, T = seed(n), len(sizes)
    N, A = (max(s) for s in zip(*sizes))
    count, a = torch.tensor(sizes).T
    mask, answer_mask = torch.arange(N) < count[:, None], torch.arange(A) < a[:, None]
    images, answers, e = (torch.randn(*s, D, generator=g, dtype=torch.float64) for s in ((T, N), (T, A), (T,)))
    labels = (torch.rand(T, N, generator=g)*a[:, None]).long()
    images[~mask], answers[~answer_mask], labels[~mask] = filling, filling, 0
    return TaskBatch(images, labels, mask, answers, answer_mask, e)


def weights(n=0, *shape): return adapter.init(seed(n), shape).double()
def slope(f, x, direction, eps=1e-6): return ((f(x + eps*direction) - f(x - eps*direction))/(2*eps)).detach()


batches = make_batch([(6, 3), (5, 2), (4, 3)], 0), make_batch([(5, 3), (5, 2), (3, 3)], 1)


def read(decode, v): return decode(v) if decode else v


def after(start, steps, second_order=True, decode=None):
    "Mean query loss after adaptation to the support images"
    v = inner_loop(adapter, decode, start, batches[0], torch.tensor(steps), 1., second_order)
    return task_losses(adapter, read(decode, v), batches[1]).mean()


def gradient(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


@pytest.mark.parametrize('steps', [(1, 1, 1), (4, 2, 0), (7, 7, 3)])
def test_gradient(steps):
    "MAML's is the numerical derivative, entry by entry; FOMAML's is the gradient at the adapted point, which is another"
    W, h = weights(3), HNet(adapter.n_weights, latent=3, hidden=8, generator=seed(4)).double()
    for start, decode in (W, None), (h.z0.detach(), h.decode):
        maml, fomaml = (lambda v, so=so: after(v, steps, so, decode) for so in (True, False))
        exact, first = gradient(maml, start), gradient(fomaml, start)
        close(exact, torch.stack([slope(maml, start, d) for d in torch.eye(len(start), dtype=torch.float64)]), rtol=1e-5, atol=1e-7)
        assert (exact - first).norm() > 1e-2*exact.norm()
        close(maml(start), fomaml(start))
        there = inner_loop(adapter, decode, start, batches[0], torch.tensor(steps), 1., False)
        close(first, gradient(lambda v: task_losses(adapter, read(decode, v), batches[1]).mean(), there).sum(0))


def test_gradient_of_the_hypernetwork():
    "Its parameters act in every step, not only in the last"
    h = HNet(adapter.n_weights, latent=3, hidden=8, generator=seed(4)).double()
    params = dict(h.named_parameters())
    def loss(flat, second_order=True):
        parts = dict(zip(params, (p.view_as(q) for p, q in zip(flat.split([q.numel() for q in params.values()]), params.values()))))
        decode = lambda z: torch.func.functional_call(h.h, {k[2:]: p for k, p in parts.items() if k != 'z0'}, z)
        return after(parts['z0'], (4, 2, 1), second_order, decode)
    flat = torch.cat([p.detach().flatten() for p in params.values()])
    exact, first = gradient(loss, flat), gradient(lambda v: loss(v, False), flat)
    for n in range(5):
        direction = torch.randn(len(flat), generator=seed(n), dtype=torch.float64)
        expected = slope(loss, flat, direction)
        close(exact@direction, expected, rtol=1e-5, atol=1e-7)
        assert (first@direction - expected).abs() > 1e-3*expected.abs()


def test_gradient_of_notes():
    "One product at the end is the sum of all those that it stands for, whatever the steps, also where no task makes any"
    h = HyperNet(3, adapter.n_weights, hidden=8, generator=seed(4)).double()
    z = torch.randn(3, 3, generator=seed(5), dtype=torch.float64)
    for steps in (4, 2, 1), (3, 0, 0), (0, 0, 0):
        grads = [torch.autograd.grad(after(z, steps, decode=decode), list(h.parameters())) for decode in (h, defer_weight_grad(h))]
        for a, b in zip(*grads): close(a, b, rtol=1e-10, atol=1e-14)


def test_tasks_in_bites(monkeypatch):
    "As many tasks at once as a cache takes: the same loss and gradient"
    W, b = weights(3).requires_grad_(), make_batch([(6, 3), (9, 2), (5, 4), (7, 2), (8, 3)], 5)
    whole = maml_loss(adapter, None, lambda e: W, b, .5, 4, seed())
    monkeypatch.setattr(maml, 'chunk_size', lambda *_: 2)
    parts = maml_loss(adapter, None, lambda e: W, b, .5, 4, seed())
    close(whole, parts); close(*(torch.autograd.grad(loss, W)[0] for loss in (whole, parts)))


def test_no_steps_is_the_plain_loss():
    W, plain = weights(3), lambda W: task_losses(adapter, W, batches[1]).mean()
    for second_order in (True, False):
        close(after(W, (0, 0, 0), second_order), plain(W))
        close(gradient(lambda W: after(W, (0, 0, 0), second_order), W), gradient(plain, W))
    b = make_batch([(6, 3), (9, 2)], 5)
    close(maml_loss(adapter, None, lambda e: W, b, 1., 0, seed()), task_losses(adapter, W, split_batch(b, seed())[1]).mean())


@few
@given(sizes, seeds, st.floats(-1e3, 1e3), st.data())
def test_tasks_do_not_know_of_each_other(sizes, n, filling, data):
    "Each makes its own number of steps, as if alone, whatever its padding holds; gradients are the mean of single ones"
    b, W = make_batch(sizes, n, filling), weights(n).requires_grad_()
    T, steps = len(sizes), sorted((data.draw(st.integers(0, 5)) for _ in sizes), reverse=True)
    def run(batch, steps):
        v = inner_loop(adapter, None, W, batch, torch.tensor(steps), .5)
        return v, torch.autograd.grad(task_losses(adapter, v, batch).mean(), W, retain_graph=True)[0]
    together, grad = run(b, steps)
    singles = []
    for i, (k, (N, A)) in enumerate(zip(steps, sizes)):
        one = b[i:i+1]
        one = TaskBatch(one.images[:, :N], one.labels[:, :N], one.mask[:, :N], one.answers[:, :A], one.answer_mask[:, :A], one.e)
        v, g = run(one, [k])
        close(together[i:i+1], v)
        close(together[i:i+1].detach(), adapt(adapter, W.detach()[None], one, k, .5))
        singles.append(g)
    close(grad, torch.stack(singles).mean(0))
    order = sorted(range(T), key=lambda i: (-steps[i], -i))             # equal steps in the opposite order
    turned = b[order]
    close(run(turned, steps)[1], grad)


@few
@given(st.lists(st.tuples(st.integers(2, 30), st.integers(2, 4)), min_size=1, max_size=6), seeds, st.floats(.02, .98))
def test_split(sizes, n, share):
    "Support and query are disjoint, complete, and never empty; a label stays with its image; padding is no image"
    b = make_batch(sizes, n, torch.nan)
    parts = split_batch(b, seed(n), share)
    for i, (N, _) in enumerate(sizes):
        found = [(tuple(x), int(y)) for p in parts for x, y in zip(p.images[i][p.mask[i]].tolist(), p.labels[i][p.mask[i]])]
        assert sorted(found) == sorted((tuple(x), int(y)) for x, y in zip(b.images[i, :N].tolist(), b.labels[i, :N]))
        support, query = (int(p.mask[i].sum()) for p in parts)
        assert support >= 1 and query >= 1 and support + query == N
        assert abs(support - share*N) <= 1
    for p in parts:
        assert p.images.shape[1] == p.mask.sum(1).max() and (p.labels[~p.mask] == 0).all()


def test_padding_never_matters():
    W = weights(3)
    def loss(filling):
        b = make_batch([(9, 3), (4, 2), (6, 4)], 2, filling)
        return maml_loss(adapter, None, lambda e: W, b, 1., 4, seed())
    close(loss(0.), loss(1e3), rtol=1e-9, atol=0)


def test_film_writes_weights():
    "Folded weights do what modulating the hidden layer does; before training, the question is not read"
    film, b = FiLM(adapter, seed()).double(), batches[0]
    close(film(b.e), film.W.expand(3, -1), rtol=0, atol=0)
    torch.nn.init.normal_(film.layer.weight, generator=seed(1)); torch.nn.init.normal_(film.layer.bias, generator=seed(2))
    w, (scale, shift) = adapter.split(film.W), film.layer(b.e)[:, None].chunk(2, -1)
    hidden = (1 + scale)*(b.images@w['W1'].T/D**.5 + w['b1']) + shift
    out = b.images + torch.relu(hidden)@w['W2'].T/adapter.hidden**.5 + w['b2']
    close(adapter(film(b.e), b.images), torch.nn.functional.normalize(out, dim=-1))
    many = torch.randn(40, D, generator=seed(3), dtype=torch.float64)
    assert torch.linalg.matrix_rank(film(many) - film(many).mean(0)) <= 2*adapter.hidden


@pytest.fixture(scope='module')
def tasks():
    "Thirty tasks, each about another direction of the image space"
    rng, image, made = np.random.default_rng(0), torch.randn(300, D, generator=seed()), []
    for i in range(30):
        rows = rng.choice(300, int(rng.integers(25, 60)), replace=False)
        made.append(make_task(f'question {i % 4}', 'answer {}', rows, (image[rows, i % 4] > 0).long().numpy(), ['no', 'yes'], rng))
    texts = all_texts(made)
    return TaskData(made, Features(image, torch.randn(len(texts), D, generator=seed(1)), texts))


flat = lambda x: torch.cat([p.flatten() for p in x.parameters()]) if isinstance(x, torch.nn.Module) else x
trainers = dict(mnet=train_mnet_maml, fomaml=lambda *a, **kw: train_mnet_maml(*a, second_order=False, **kw),
                hnet=train_hnet_maml, cond=train_cond_hnet_maml, film=train_cond_film)


@pytest.mark.parametrize('name', trainers)
def test_same_seed_same_result(tasks, name):
    (a, history), (b, _), (c, _) = (trainers[name](adapter, tasks, tasks, epochs=2, generator=seed(n)) for n in (0, 0, 1))
    assert torch.equal(flat(a), flat(b)) and not torch.equal(flat(a), flat(c))
    assert not flat(a).requires_grad and all(np.isfinite(e['loss']) for e in history)


def test_training_makes_adaptation_better(tasks):
    "The loss after two steps in the latent space falls, and descent there helps"
    def loss(net, steps):
        b = tasks.batch(range(30), 'support')
        v = adapt(adapter, net.z0, b, steps, .5, net.decode)
        return task_losses(adapter, net.decode(v), tasks.batch(range(30))).mean().item()
    untrained = HNet(adapter.n_weights, generator=seed()).requires_grad_(False)
    net, history = train_hnet_maml(adapter, tasks, tasks, epochs=15, lr=3e-3, inner_lr=.5, generator=seed())
    assert history[-1]['loss'] < history[0]['loss']
    assert loss(net, 2) < loss(untrained, 2) - .05 and loss(net, 2) < loss(net, 0)
