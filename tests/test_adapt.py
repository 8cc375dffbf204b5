"Padding never changes a result, for random sizes; batched is looped; gradients are right; a tie flatters nobody."
from dataclasses import replace

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from hyperclip_nb.base.adapt import (
    accuracy, adapt, adapt_all, adapt_reference, adaptation_delta, evaluate,
    task_losses,
)
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.generators.hypernet import HyperNet
from hyperclip_nb.base.training import fit_tasks
from hyperclip_nb.generators.multitask import train_cond_multitask, train_multitask
from hyperclip_nb.data.batches import Features, TaskBatch, TaskData, all_texts
from hyperclip_nb.data.tasks import make_task

D = 6
adapter = Adapter(D, hidden=4, temperature=5.)
sizes = st.lists(st.tuples(st.integers(1, 7), st.integers(2, 5)), min_size=1, max_size=5)  # images and answers of each task
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)


def make_batch(sizes, seed, filling):
    "Tasks of the given sizes in double precision; whatever is padding holds `filling`"
    g = torch.Generator().manual_seed(seed)
    N, A = (max(s) for s in zip(*sizes))
    T, (n, a) = len(sizes), torch.tensor(sizes).T
    mask, answer_mask = torch.arange(N) < n[:, None], torch.arange(A) < a[:, None]
    images, answers, e = (torch.randn(*s, D, generator=g, dtype=torch.float64) for s in ((T, N), (T, A), (T,)))
    labels = (torch.rand(T, N, generator=g)*a[:, None]).long()
    images[~mask], answers[~answer_mask], labels[~mask] = filling, filling, 0
    return TaskBatch(images, labels, mask, answers, answer_mask, e)


def alone(b, i):
    "Task i by itself, without padding"
    n, a = int(b.mask[i].sum()), int(b.answer_mask[i].sum())
    return TaskBatch(b.images[i:i+1, :n], b.labels[i:i+1, :n], b.mask[i:i+1, :n], b.answers[i:i+1, :a], b.answer_mask[i:i+1, :a], b.e[i:i+1])


def weights(n, seed): return adapter.init(torch.Generator().manual_seed(seed), (n,)).double()


@few
@given(sizes, seeds, st.floats(-1e3, 1e3))
def test_padding_and_batching(sizes, seed, filling):
    b, W = make_batch(sizes, seed, filling), weights(len(sizes), seed)
    logits, losses, adapted = adapter.logits(W, b), task_losses(adapter, W, b), adapt(adapter, W, b, steps=3)
    score = accuracy(logits, b.labels, b.mask)
    for i, (n, a) in enumerate(sizes):
        one, Wi = alone(b, i), W[i:i+1]
        torch.testing.assert_close(logits[i, :n, :a], adapter.logits(Wi, one)[0])
        torch.testing.assert_close(losses[i:i+1], task_losses(adapter, Wi, one))
        torch.testing.assert_close(adapted[i:i+1], adapt(adapter, Wi, one, steps=3))
        torch.testing.assert_close(score[i:i+1], accuracy(adapter.logits(Wi, one), one.labels, one.mask))


@few
@given(sizes, seeds)
def test_more_padding(sizes, seed):
    b, W = make_batch(sizes, seed, 0.), weights(len(sizes), seed)
    longer = lambda x, n, dim: torch.cat([x, torch.zeros(*x.shape[:dim], n, *x.shape[dim+1:], dtype=x.dtype)], dim)
    wide = replace(b, images=longer(b.images, 3, 1), labels=longer(b.labels, 3, 1), mask=longer(b.mask, 3, 1),
                   answers=longer(b.answers, 2, 1), answer_mask=longer(b.answer_mask, 2, 1))
    torch.testing.assert_close(task_losses(adapter, W, wide), task_losses(adapter, W, b))
    torch.testing.assert_close(adapt(adapter, W, wide, steps=3), adapt(adapter, W, b, steps=3))


@few
@given(sizes, seeds)
def test_order_of_answers_means_nothing(sizes, seed):
    "Accuracy with the answers in another order is the same, also where scores tie"
    b, g = make_batch(sizes, seed, 0.), torch.Generator().manual_seed(seed)
    logits = torch.randint(3, (*b.labels.shape, b.answers.shape[1]), generator=g).double().masked_fill(~b.answer_mask[:, None], -torch.inf)
    order = torch.randperm(b.answers.shape[1], generator=g)
    torch.testing.assert_close(accuracy(logits[..., order], order.argsort()[b.labels], b.mask), accuracy(logits, b.labels, b.mask))
    nothing = torch.zeros_like(logits).masked_fill(~b.answer_mask[:, None], -torch.inf)
    torch.testing.assert_close(accuracy(nothing, b.labels, b.mask), 1/b.answer_mask.sum(1).float())


@settings(max_examples=10, deadline=None)
@given(sizes, seeds)
def test_gradient(sizes, seed):
    b, W = make_batch(sizes, seed, 7.), weights(len(sizes), seed).requires_grad_()
    direction = weights(len(sizes), seed + 1)
    slope = (torch.autograd.grad(task_losses(adapter, W, b).sum(), W)[0]*direction).sum()
    at = lambda s: task_losses(adapter, W.detach() + s*direction, b).sum()
    torch.testing.assert_close((at(1e-6) - at(-1e-6))/2e-6, slope, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope='module')
def tasks():
    "Forty tasks of very different sizes whose labels a network can learn"
    rng = np.random.default_rng(0)
    image = torch.randn(400, D, generator=torch.Generator().manual_seed(0))
    made = []
    for i in range(40):
        rows = rng.choice(400, int(30*np.exp(rng.random()*1.8)), replace=False)
        made.append(make_task(f'question {i % 4}', 'answer {}', rows, (image[rows, i % 4] > 0).long().numpy(), ['no', 'yes'], rng))
    texts = all_texts(made)
    features = Features(image, torch.randn(len(texts), D, generator=torch.Generator().manual_seed(1)), texts)
    return TaskData(made, features)


def test_buckets_change_nothing(tasks):
    W = adapter.init(torch.Generator().manual_seed(0))
    adapted = adapt_all(adapter, W, tasks, tasks.is_support, steps=5)
    torch.testing.assert_close(adapted, adapt(adapter, W, tasks.batch(range(40), 'support'), steps=5), rtol=1e-3, atol=1e-4)
    q = tasks.batch(range(40))
    expected = 100*accuracy(adapter.logits(adapted, q), q.labels, q.mask).numpy()
    np.testing.assert_allclose(evaluate(adapter, adapted, tasks), expected, atol=1e-3)


def test_multitask_learns_and_keeps_the_best(tasks):
    g = lambda: torch.Generator().manual_seed(0)
    floor = evaluate(adapter, torch.zeros(adapter.n_weights), tasks).mean()
    h, history = train_cond_multitask(adapter, tasks, tasks, epochs=30, lr=5e-3, generator=g())
    assert evaluate(adapter, h(tasks.e), tasks).mean() == max(e['accuracy'] for e in history) > floor + 10
    assert history[-1]['loss'] < history[0]['loss']
    W, _ = train_multitask(adapter, tasks, tasks, epochs=3, generator=g())
    again, _ = train_multitask(adapter, tasks, tasks, epochs=3, generator=g())
    assert torch.equal(W, again)


def test_hidden_descriptors_are_not_read(tasks):
    "Only the given rows are used: the others may hold anything"
    spoiled = TaskData(tasks.tasks, Features(tasks.image, tasks.text.clone(), all_texts(tasks.tasks)))
    rows = [i for i in range(40) if i % 4]                   # the tasks of question 0 are hidden
    spoiled.e[::4] = torch.nan
    for data in (tasks, spoiled):
        h = HyperNet(D, adapter.n_weights, generator=torch.Generator().manual_seed(0))
        seen = TaskData([tasks.tasks[i] for i in rows], Features(tasks.image, tasks.text, all_texts(tasks.tasks)))
        history = fit_tasks(h.parameters(), h, adapter, data, seen, 2, 1e-3, torch.Generator().manual_seed(0), task_ids=rows)
        assert np.isfinite([e['loss'] for e in history]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_gpu(tasks):
    there = TaskData(tasks.tasks, Features(tasks.image, tasks.text, all_texts(tasks.tasks)), device='cuda')
    W, _ = train_multitask(adapter, there, there, epochs=2, generator=torch.Generator().manual_seed(0))
    h, _ = train_cond_multitask(adapter, there, there, epochs=2, generator=torch.Generator().manual_seed(0))
    assert W.device.type == h(there.e).device.type == 'cuda'
    expected = adapt_all(adapter, W.cpu(), tasks, tasks.is_support, steps=5)
    torch.testing.assert_close(adapt_all(adapter, W, there, there.is_support, steps=5).cpu(), expected, rtol=1e-3, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(s=st.integers(0, 10_000), N=st.integers(1, 40), D=st.sampled_from([12, 48, 90]), H=st.sampled_from([3, 8]), A=st.integers(2, 7), own=st.booleans(), silent=st.booleans())
def test_descent_by_hand_is_descent_by_autograd(s, N, D, H, A, own, silent):
    g, double = torch.Generator().manual_seed(s), dict(dtype=torch.float64)
    images, answers = torch.randn(7, D, generator=g, **double), torch.randn(A, D, generator=g, **double)
    images[0] = 0                                                                    # pictures repeat, one is empty, and padding shows whatever comes first
    mask = torch.rand(3, N, generator=g) < .7; mask[:, 0] = True
    answer_mask = torch.ones(3, A, dtype=torch.bool); answer_mask[1, 2:] = False
    batch = TaskBatch(images[torch.randint(7, (3, N), generator=g)], torch.randint(2, (3, N), generator=g), mask, answers[torch.randint(A, (3, A), generator=g)], answer_mask, torch.zeros(3, D, **double))
    adapter = Adapter(D, H, 10.)
    W = torch.randn(3, adapter.n_weights, generator=g, **double); W = W if own else W[0]
    if silent:                                                                       # a second layer of zeros, where plain CLIP starts; nothing can be seen through it in an empty picture
        for k in ('W2', 'b2'): adapter.split(W)[k].zero_()
        batch.images[batch.images.eq(0).all(-1)] = images[1]
    moved = adapt_reference(adapter, W.expand(3, -1), batch, 17, .05) - W
    with torch.no_grad(): change = adaptation_delta(adapter, W, batch, 17, .05)           # enough steps for a basis to pay
    assert (change - moved).abs().max() <= 1e-8*moved.abs().max() + 1e-16         # weights are of order 1: where all answers are the same, nothing moves
