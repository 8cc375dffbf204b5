"""The meta-gradient is the derivative that it claims to be; tasks of a batch do not
know of each other; FiLM writes weights."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hyperclip_nb.base.adapt import adapt, task_losses
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.data.batches import Features, TaskBatch, TaskData, all_texts
from hyperclip_nb.data.tasks import make_task
from hyperclip_nb.generators import maml
from hyperclip_nb.generators.fast_maml import defer_weight_grad
from hyperclip_nb.generators.hypernet import HyperNet
from hyperclip_nb.generators.maml import (
    HNet, inner_loop, maml_loss, split_batch, train_cond_hnet_maml, train_hnet_maml,
    train_mnet_maml,
)
from hyperclip_nb.generators.multitask import FiLM, train_cond_film

D = 6
adapter = Adapter(D, hidden=4, temperature=3.)
close = torch.testing.assert_close
few = settings(max_examples=30, deadline=None)
seeds = st.integers(0, 2**31 - 1)


def list_of_sizes(most_images, most_answers, most_tasks):
    "Images and answers of each task"
    size = st.tuples(st.integers(2, most_images), st.integers(2, most_answers))
    return st.lists(size, min_size=1, max_size=most_tasks)


def seed(n=0):
    return torch.Generator().manual_seed(n)


def make_batch(sizes, n, filling=0.):
    "Tasks of given sizes, in double precision; whatever is padding holds `filling`"
    rng = seed(n)
    n_images, n_answers = torch.tensor(sizes).T
    mask = torch.arange(n_images.max()) < n_images[:, None]
    answer_mask = torch.arange(n_answers.max()) < n_answers[:, None]

    def normal(*shape):
        return torch.randn(*shape, D, generator=rng, dtype=torch.float64)

    images = normal(*mask.shape)
    answers = normal(*answer_mask.shape)
    e = normal(len(sizes))
    labels = (torch.rand(mask.shape, generator=rng)*n_answers[:, None]).long()
    images[~mask] = filling
    answers[~answer_mask] = filling
    labels[~mask] = 0
    return TaskBatch(images, labels, mask, answers, answer_mask, e)


def weights(n=0, *shape):
    return adapter.init(seed(n), shape).double()


def constant(value):
    "Every task starts there"
    def start(e):
        return value
    return start


support = make_batch([(6, 3), (5, 2), (4, 3)], 0)
query = make_batch([(5, 3), (5, 2), (3, 3)], 1)


def query_loss(v, decode=None):
    W = decode(v) if decode else v
    return task_losses(adapter, W, query).mean()


def adapted(start, steps, second_order=True, decode=None):
    steps = torch.tensor(steps)
    return inner_loop(adapter, decode, start, support, steps, 1., second_order)


def loss_after(start, steps, second_order=True, decode=None):
    "Mean query loss after adaptation to the support images"
    return query_loss(adapted(start, steps, second_order, decode), decode)


def gradient(f, x, *args):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x, *args), x)[0]


def slope(f, x, direction, *args, eps=1e-6):
    "Of f in a direction, by central differences"
    rise = f(x + eps*direction, *args) - f(x - eps*direction, *args)
    return (rise/(2*eps)).detach()


def numerical(f, x, *args):
    "The gradient of f, entry by entry"
    axes = torch.eye(len(x), dtype=x.dtype)
    return torch.stack([slope(f, x, axis, *args) for axis in axes])


def small_hnet():
    return HNet(adapter.n_weights, latent=3, hidden=8, generator=seed(4)).double()


@pytest.mark.parametrize('through', ['weights', 'hypernetwork'])
@pytest.mark.parametrize('steps', [(1, 1, 1), (4, 2, 0), (7, 7, 3)])
def test_gradient(steps, through):
    "MAML's is the numerical derivative; FOMAML's is that at the adapted point"
    start, decode = weights(3), None
    if through == 'hypernetwork':
        net = small_hnet()
        start, decode = net.z0.detach(), net.decode
    exact = gradient(loss_after, start, steps, True, decode)
    first = gradient(loss_after, start, steps, False, decode)
    expected = numerical(loss_after, start, steps, True, decode)
    close(exact, expected, rtol=1e-5, atol=1e-7)
    assert (exact - first).norm() > 1e-2*exact.norm()
    losses = [loss_after(start, steps, order, decode) for order in (True, False)]
    close(*losses)
    reached = adapted(start, steps, False, decode)
    close(first, gradient(query_loss, reached, decode).sum(0))


def test_gradient_of_the_hypernetwork():
    "Its parameters act in every step, not only in the last"
    net = small_hnet()
    params = dict(net.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def loss(flat, second_order=True):
        parts = {}
        for (name, p), values in zip(params.items(), flat.split(sizes)):
            parts[name.removeprefix('h.')] = values.view_as(p)
        z0 = parts.pop('z0')

        def decode(z):
            return torch.func.functional_call(net.h, parts, z)

        return loss_after(z0, (4, 2, 1), second_order, decode)

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    exact = gradient(loss, flat)
    first = gradient(loss, flat, False)
    for n in range(5):
        direction = torch.randn(len(flat), generator=seed(n), dtype=torch.float64)
        expected = slope(loss, flat, direction)
        close(exact@direction, expected, rtol=1e-5, atol=1e-7)
        assert (first@direction - expected).abs() > 1e-3*expected.abs()


@pytest.mark.parametrize('steps', [(4, 2, 1), (3, 0, 0), (0, 0, 0)])
def test_deferred_gradient(steps):
    "One product at the end is the sum of all those that it stands for"
    net = HyperNet(3, adapter.n_weights, hidden=8, generator=seed(4)).double()
    z = torch.randn(3, 3, generator=seed(5), dtype=torch.float64)
    grads = []
    for decode in net, defer_weight_grad(net):
        loss = loss_after(z, steps, decode=decode)
        grads.append(torch.autograd.grad(loss, list(net.parameters())))
    for piecewise, deferred in zip(*grads):
        close(piecewise, deferred, rtol=1e-10, atol=1e-14)


def test_tasks_in_chunks(monkeypatch):
    "As many tasks at once as a cache takes: the same loss and gradient"
    W = weights(3).requires_grad_()
    batch = make_batch([(6, 3), (9, 2), (5, 4), (7, 2), (8, 3)], 5)

    def two_tasks(*_):
        return 2

    whole = maml_loss(adapter, None, constant(W), batch, .5, 4, seed())
    monkeypatch.setattr(maml, 'chunk_size', two_tasks)
    parts = maml_loss(adapter, None, constant(W), batch, .5, 4, seed())
    close(whole, parts)
    close(*(torch.autograd.grad(loss, W)[0] for loss in (whole, parts)))


def test_no_steps_is_the_plain_loss():
    W = weights(3)
    for second_order in (True, False):
        close(loss_after(W, (0, 0, 0), second_order), query_loss(W))
        grad = gradient(loss_after, W, (0, 0, 0), second_order)
        close(grad, gradient(query_loss, W))
    batch = make_batch([(6, 3), (9, 2)], 5)
    loss = maml_loss(adapter, None, constant(W), batch, 1., 0, seed())
    _, images = split_batch(batch, seed())
    close(loss, task_losses(adapter, W, images).mean())


def without_padding(batch, i, size):
    "Task i of a batch by itself"
    n_images, n_answers = size
    one = batch[i:i + 1]
    return TaskBatch(
        one.images[:, :n_images], one.labels[:, :n_images], one.mask[:, :n_images],
        one.answers[:, :n_answers], one.answer_mask[:, :n_answers], one.e,
    )


@few
@given(list_of_sizes(7, 5, 5), seeds, st.floats(-1e3, 1e3), st.data())
def test_tasks_do_not_know_of_each_other(sizes, n, filling, data):
    """Each makes its own number of steps, as if alone, whatever its padding holds;
    gradients are the mean of single ones"""
    batch = make_batch(sizes, n, filling)
    W = weights(n).requires_grad_()
    T = len(sizes)
    steps = sorted((data.draw(st.integers(0, 5)) for _ in sizes), reverse=True)

    def run(batch, steps):
        v = inner_loop(adapter, None, W, batch, torch.tensor(steps), .5)
        loss = task_losses(adapter, v, batch).mean()
        return v, torch.autograd.grad(loss, W, retain_graph=True)[0]

    together, mean_grad = run(batch, steps)
    grads = []
    for i in range(T):
        one = without_padding(batch, i, sizes[i])
        v, grad = run(one, steps[i:i + 1])
        close(together[i:i + 1], v)
        plain = adapt(adapter, W.detach()[None], one, steps[i], .5)
        close(together[i:i + 1].detach(), plain)
        grads.append(grad)
    close(mean_grad, torch.stack(grads).mean(0))
    # those of equal steps in the opposite order
    order = sorted(range(T), key=lambda i: (-steps[i], -i))
    close(run(batch[order], steps)[1], mean_grad)


def labelled_images(batch, i):
    "Images of task i with their labels, sorted"
    mask = batch.mask[i]
    pairs = zip(batch.images[i][mask].tolist(), batch.labels[i][mask].tolist())
    return sorted((tuple(image), label) for image, label in pairs)


@few
@given(list_of_sizes(30, 4, 6), seeds, st.floats(.02, .98))
def test_split(sizes, n, share):
    """Support and query are disjoint, complete, and never empty; a label stays with
    its image; padding is no image"""
    batch = make_batch(sizes, n, torch.nan)
    parts = split_batch(batch, seed(n), share)
    for i, (n_images, _) in enumerate(sizes):
        support, query = (labelled_images(part, i) for part in parts)
        assert sorted(support + query) == labelled_images(batch, i)
        assert support and query and len(support) + len(query) == n_images
        assert abs(len(support) - share*n_images) <= 1
    for part in parts:
        assert part.images.shape[1] == part.mask.sum(1).max()
        assert (part.labels[~part.mask] == 0).all()


def test_padding_never_matters():
    losses = []
    for filling in 0., 1e3:
        batch = make_batch([(9, 3), (4, 2), (6, 4)], 2, filling)
        start = constant(weights(3))
        losses.append(maml_loss(adapter, None, start, batch, 1., 4, seed()))
    close(*losses, rtol=1e-9, atol=0)


def test_film_writes_weights():
    """Folded weights do what modulating the hidden layer does; before training, the
    question is not read"""
    film = FiLM(adapter, seed()).double()
    images, e = support.images, support.e
    close(film(e), film.W.expand(3, -1), rtol=0, atol=0)
    nn.init.normal_(film.layer.weight, generator=seed(1))
    nn.init.normal_(film.layer.bias, generator=seed(2))
    w = adapter.split(film.W)
    scale, shift = film.layer(e)[:, None].chunk(2, -1)
    hidden = (1 + scale)*(images@w['W1'].T/D**.5 + w['b1']) + shift
    out = images + torch.relu(hidden)@w['W2'].T/adapter.hidden**.5 + w['b2']
    close(adapter(film(e), images), nn.functional.normalize(out, dim=-1))
    many = film(torch.randn(40, D, generator=seed(3), dtype=torch.float64))
    assert torch.linalg.matrix_rank(many - many.mean(0)) <= 2*adapter.hidden


@pytest.fixture(scope='module')
def tasks():
    "Thirty tasks, each about another direction of the image space"
    rng = np.random.default_rng(0)
    image = torch.randn(300, D, generator=seed())
    made = []
    for i in range(30):
        rows = rng.choice(300, int(rng.integers(25, 60)), replace=False)
        labels = (image[rows, i % 4] > 0).long().numpy()
        text = f'question {i % 4}', 'answer {}'
        made.append(make_task(*text, rows, labels, ['no', 'yes'], rng))
    texts = all_texts(made)
    text = torch.randn(len(texts), D, generator=seed(1))
    return TaskData(made, Features(image, text, texts))


def train_mnet_fomaml(*args, **kwargs):
    return train_mnet_maml(*args, second_order=False, **kwargs)


def flat(model):
    "What was learned, as one vector"
    if not isinstance(model, nn.Module):
        return model
    return torch.cat([p.flatten() for p in model.parameters()])


trainings = [
    train_mnet_maml, train_mnet_fomaml, train_hnet_maml, train_cond_hnet_maml,
    train_cond_film,
]


@pytest.mark.parametrize('train', trainings)
def test_same_seed_same_result(tasks, train):
    found = []
    for n in 0, 0, 1:
        model, history = train(adapter, tasks, tasks, epochs=2, generator=seed(n))
        found.append(flat(model))
        assert not found[-1].requires_grad
        assert all(np.isfinite(epoch['loss']) for epoch in history)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_training_makes_adaptation_better(tasks):
    "The loss after two steps in the latent space falls, and descent there helps"
    def loss(net, steps):
        batch = tasks.batch(range(30), 'support')
        z = adapt(adapter, net.z0, batch, steps, .5, net.decode)
        return task_losses(adapter, net.decode(z), tasks.batch(range(30))).mean().item()

    untrained = HNet(adapter.n_weights, generator=seed()).requires_grad_(False)
    rates = dict(lr=3e-3, inner_lr=.5)
    net, history = train_hnet_maml(
        adapter, tasks, tasks, epochs=15, generator=seed(), **rates)
    assert history[-1]['loss'] < history[0]['loss']
    assert loss(net, 2) < loss(untrained, 2) - .05
    assert loss(net, 2) < loss(net, 0)
