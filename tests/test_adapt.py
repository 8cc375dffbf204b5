"""Padding never changes a result, for random sizes; batched is looped; gradients are
right; a tie flatters nobody; training keeps the best and reads only what it may."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclip_nb.base.adapt import (
    accuracy, adapt, adapt_all, adapt_reference, adaptation_delta, evaluate,
    task_losses,
)
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.base.training import fit_tasks
from hyperclip_nb.data.batches import Features, TaskBatch, TaskData, all_texts
from hyperclip_nb.data.tasks import make_task
from hyperclip_nb.generators.hypernet import HyperNet
from hyperclip_nb.generators.multitask import train_cond_multitask, train_multitask

D = 6
adapter = Adapter(D, hidden=4, temperature=5.)
images_and_answers = st.tuples(st.integers(1, 7), st.integers(2, 5))  # of a task
task_sizes = st.lists(images_and_answers, min_size=1, max_size=5)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)
close = torch.testing.assert_close


def seed(n=0):
    return torch.Generator().manual_seed(n)


def make_batch(sizes, n, filling):
    "Tasks of the given sizes in double precision; whatever is padding holds `filling`"
    g = seed(n)
    n_images, n_answers = torch.tensor(sizes).T[..., None]  # (T,1) each
    T, N, A = len(sizes), int(n_images.max()), int(n_answers.max())
    mask = torch.arange(N) < n_images
    answer_mask = torch.arange(A) < n_answers
    images = torch.randn(T, N, D, generator=g, dtype=torch.float64)
    answers = torch.randn(T, A, D, generator=g, dtype=torch.float64)
    e = torch.randn(T, D, generator=g, dtype=torch.float64)
    labels = (torch.rand(T, N, generator=g)*n_answers).long()
    images[~mask] = filling
    answers[~answer_mask] = filling
    labels[~mask] = 0
    return TaskBatch(images, labels, mask, answers, answer_mask, e)


def without_padding(batch, i):
    "Task i by itself"
    n, a = int(batch.mask[i].sum()), int(batch.answer_mask[i].sum())
    one = batch[i:i+1]
    return replace(
        one, images=one.images[:, :n], labels=one.labels[:, :n], mask=one.mask[:, :n],
        answers=one.answers[:, :a], answer_mask=one.answer_mask[:, :a])


def weights(n, number):
    return adapter.init(seed(number), (n,)).double()


def score(W, batch):
    return accuracy(adapter.logits(W, batch), batch.labels, batch.mask)


@few
@given(task_sizes, seeds, st.floats(-1e3, 1e3))
def test_padding_and_batching(sizes, number, filling):
    batch, W = make_batch(sizes, number, filling), weights(len(sizes), number)
    logits = adapter.logits(W, batch)
    losses = task_losses(adapter, W, batch)
    adapted = adapt(adapter, W, batch, steps=3)
    scores = score(W, batch)
    for i, (n, a) in enumerate(sizes):
        one, Wi = without_padding(batch, i), W[i:i+1]
        close(logits[i, :n, :a], adapter.logits(Wi, one)[0])
        close(losses[i:i+1], task_losses(adapter, Wi, one))
        close(adapted[i:i+1], adapt(adapter, Wi, one, steps=3))
        close(scores[i:i+1], score(Wi, one))


def longer(x, n, dim):
    "With n more rows of zeros along an axis"
    zeros = torch.zeros(*x.shape[:dim], n, *x.shape[dim+1:], dtype=x.dtype)
    return torch.cat([x, zeros], dim)


@few
@given(task_sizes, seeds)
def test_more_padding(sizes, number):
    batch, W = make_batch(sizes, number, 0.), weights(len(sizes), number)
    wide = replace(
        batch,
        images=longer(batch.images, 3, 1),
        labels=longer(batch.labels, 3, 1),
        mask=longer(batch.mask, 3, 1),
        answers=longer(batch.answers, 2, 1),
        answer_mask=longer(batch.answer_mask, 2, 1),
    )
    close(task_losses(adapter, W, wide), task_losses(adapter, W, batch))
    close(adapt(adapter, W, wide, steps=3), adapt(adapter, W, batch, steps=3))


@few
@given(task_sizes, seeds)
def test_order_of_answers_means_nothing(sizes, number):
    "Accuracy with the answers in another order is the same, also where scores tie"
    batch, g = make_batch(sizes, number, 0.), seed(number)
    shape = *batch.labels.shape, batch.answers.shape[1]
    no_answer = ~batch.answer_mask[:, None]
    logits = torch.randint(3, shape, generator=g).double()
    logits = logits.masked_fill(no_answer, -torch.inf)
    order = torch.randperm(shape[-1], generator=g)
    labels = order.argsort()[batch.labels]
    expected = accuracy(logits, batch.labels, batch.mask)
    close(accuracy(logits[..., order], labels, batch.mask), expected)
    all_tie = torch.zeros_like(logits).masked_fill(no_answer, -torch.inf)
    chance = 1/batch.answer_mask.sum(1).float()
    close(accuracy(all_tie, batch.labels, batch.mask), chance)


@settings(max_examples=10, deadline=None)
@given(task_sizes, seeds)
def test_gradient(sizes, number):
    batch = make_batch(sizes, number, 7.)
    W = weights(len(sizes), number).requires_grad_()
    direction = weights(len(sizes), number + 1)

    def loss(W):
        return task_losses(adapter, W, batch).sum()

    slope = (torch.autograd.grad(loss(W), W)[0]*direction).sum()
    with torch.no_grad():
        change = loss(W + 1e-6*direction) - loss(W - 1e-6*direction)
    close(change/2e-6, slope, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def tasks():
    "Forty tasks of very different sizes whose labels a network can learn"
    rng = np.random.default_rng(0)
    image = torch.randn(400, D, generator=seed())
    made = []
    for i in range(40):
        rows = rng.choice(400, int(30*np.exp(rng.random()*1.8)), replace=False)
        labels = (image[rows, i % 4] > 0).long().numpy()
        question = f'question {i % 4}'
        made.append(make_task(question, 'answer {}', rows, labels, ['no', 'yes'], rng))
    texts = all_texts(made)
    text = torch.randn(len(texts), D, generator=seed(1))
    return TaskData(made, Features(image, text, texts))


def copy_of(data, tasks=None, device='cpu'):
    "The same data set, or some of its tasks, with features of its own"
    features = Features(data.image, data.text.clone(), all_texts(data.tasks))
    return TaskData(tasks or data.tasks, features, device=device)


def test_buckets_change_nothing(tasks):
    W = adapter.init(seed())
    adapted = adapt_all(adapter, W, tasks, tasks.is_support, steps=5)
    in_one = adapt(adapter, W, tasks.batch(range(40), 'support'), steps=5)
    close(adapted, in_one, rtol=1e-3, atol=1e-4)
    expected = 100*score(adapted, tasks.batch(range(40))).numpy()
    np.testing.assert_allclose(evaluate(adapter, adapted, tasks), expected, atol=1e-3)


def test_multitask_learns_and_keeps_the_best(tasks):
    floor = evaluate(adapter, torch.zeros(adapter.n_weights), tasks).mean()
    h, history = train_cond_multitask(
        adapter, tasks, tasks, epochs=30, lr=5e-3, generator=seed())
    best = max(epoch['accuracy'] for epoch in history)
    assert evaluate(adapter, h(tasks.e), tasks).mean() == best > floor + 10
    assert history[-1]['loss'] < history[0]['loss']
    W, _ = train_multitask(adapter, tasks, tasks, epochs=3, generator=seed())
    again, _ = train_multitask(adapter, tasks, tasks, epochs=3, generator=seed())
    assert torch.equal(W, again)


def test_hidden_descriptors_are_not_read(tasks):
    "Only the given tasks are used: the embeddings of the others may hold anything"
    spoiled = copy_of(tasks)
    known = [i for i in range(40) if i % 4]  # the tasks of question 0 are hidden
    spoiled.e[::4] = torch.nan
    valid = copy_of(tasks, [tasks.tasks[i] for i in known])
    for data in (tasks, spoiled):
        h = HyperNet(D, adapter.n_weights, generator=seed())
        history = fit_tasks(
            h.parameters(), h, adapter, data, valid, 2, 1e-3, seed(), task_ids=known)
        assert np.isfinite([epoch['loss'] for epoch in history]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu(tasks):
    on_gpu = copy_of(tasks, device='cuda')
    W, _ = train_multitask(adapter, on_gpu, on_gpu, epochs=2, generator=seed())
    h, _ = train_cond_multitask(adapter, on_gpu, on_gpu, epochs=2, generator=seed())
    assert W.device.type == h(on_gpu.e).device.type == 'cuda'
    expected = adapt_all(adapter, W.cpu(), tasks, tasks.is_support, steps=5)
    adapted = adapt_all(adapter, W, on_gpu, on_gpu.is_support, steps=5)
    close(adapted.cpu(), expected, rtol=1e-3, atol=1e-3)


def awkward_batch(g, N, D, A):
    "Three tasks whose pictures and answers repeat; one is empty, and padding shows any"
    pictures = torch.randn(7, D, generator=g, dtype=torch.float64)
    texts = torch.randn(A, D, generator=g, dtype=torch.float64)
    pictures[0] = 0
    mask = torch.rand(3, N, generator=g) < .7
    mask[:, 0] = True
    answer_mask = torch.ones(3, A, dtype=torch.bool)
    answer_mask[1, 2:] = False
    images = pictures[torch.randint(7, (3, N), generator=g)]
    labels = torch.randint(2, (3, N), generator=g)
    answers = texts[torch.randint(A, (3, A), generator=g)]
    e = torch.zeros(3, D, dtype=torch.float64)
    return TaskBatch(images, labels, mask, answers, answer_mask, e), pictures


@settings(max_examples=40, deadline=None)
@given(
    number=st.integers(0, 10_000),
    N=st.integers(1, 40),
    D=st.sampled_from([12, 48, 90]),
    H=st.sampled_from([3, 8]),
    A=st.integers(2, 7),
    own=st.booleans(),
    silent=st.booleans(),
)
def test_descent_by_hand_is_descent_by_autograd(number, N, D, H, A, own, silent):
    g = seed(number)
    batch, pictures = awkward_batch(g, N, D, A)
    adapter = Adapter(D, H, 10.)
    W = torch.randn(3, adapter.n_weights, generator=g, dtype=torch.float64)
    if not own:
        W = W[0]
    if silent:  # a second layer of zeros, where plain CLIP starts
        for name in ('W2', 'b2'):
            adapter.split(W)[name].zero_()
        # nothing can be seen through it in an empty picture
        batch.images[batch.images.eq(0).all(-1)] = pictures[1]
    moved = adapt_reference(adapter, W.expand(3, -1), batch, 17, .05) - W
    with torch.no_grad():  # 17 are steps enough for a basis to pay
        delta = adaptation_delta(adapter, W, batch, 17, .05)
    # weights are of order 1: where all answers are the same, nothing moves
    assert (delta - moved).abs().max() <= 1e-8*moved.abs().max() + 1e-16
