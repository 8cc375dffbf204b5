"""HyperCLIP learns which question a network answers, and only that.
Guidance climbs what it is given, on a leash."""
import math
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hyperclip_nb.generators.hypernet import mlp
from hyperclip_nb.language.guidance import guide, hyperclip_score
from hyperclip_nb.language.hyperclip import (
    HyperCLIP, contrastive_loss, rank_of, task_similarity, train_hyperclip,
)

D, P, Z = 8, 40, 5 # width of a question, weights of a network, width of a latent
TRAIN, NEW = 120, 60 # tasks
QUICK = dict(steps=150, hidden=32, lr=3e-3, noise=.3)
few = settings(max_examples=25, deadline=None)
assert_close = torch.testing.assert_close


def seed(n=0):
    return torch.Generator().manual_seed(n)


def unit(n, s=0, d=D):
    return F.normalize(torch.randn(n, d, generator=seed(s)), dim=-1)


@pytest.fixture(scope='module')
def tasks():
    "Weights (TRAIN+NEW,2,P): linear in the questions (TRAIN+NEW,D), a start, noise"
    n = TRAIN + NEW
    e = 3*torch.randn(n, D, generator=seed(0))
    W = 5 + e@torch.randn(D, P, generator=seed(1))
    return W[:, None] + .5*torch.randn(n, 2, P, generator=seed(2)), e


@pytest.fixture(scope='module')
def training(tasks):
    "A trained reader and its losses"
    weights, e = tasks
    return train_hyperclip(weights[:TRAIN], e[:TRAIN], generator=seed(3), **QUICK)


@pytest.fixture(scope='module')
def reader(training):
    return training[0]


@pytest.fixture(scope='module')
def new_tasks(tasks):
    "One network (NEW,P) and the question (NEW,D) of each new task"
    weights, e = tasks
    return weights[TRAIN:, 0], e[TRAIN:]


def share_among_first(n, reader, new_tasks):
    "Share of new networks whose question is among the first n"
    rank = rank_of(task_similarity(reader, *new_tasks), torch.arange(NEW))
    return (rank <= n).float().mean().item()


def test_the_loss_by_hand():
    h = torch.tensor([[1., 0.], [0., 1.]])
    e = torch.tensor([[1., 0.], [.6, .8]]) # cosines 1, .6; 0, .8
    rows = (
        math.log(math.exp(2) + math.exp(1.2)) - 2,
        math.log(1 + math.exp(1.6)) - 1.6,
    )
    columns = (
        math.log(math.exp(2) + 1) - 2,
        math.log(math.exp(1.2) + math.exp(1.6)) - 1.6,
    )
    expected = (sum(rows) + sum(columns))/4
    assert contrastive_loss(h, e, scale=2.).item() == pytest.approx(expected, abs=1e-6)


@few
@given(st.integers(2, 20), st.integers(0, 1000), st.floats(.1, 100))
def test_the_loss_is_symmetric_blind_to_order_and_bounded(n, s, scale):
    h, e = unit(n, s), unit(n, s + 1)
    loss = contrastive_loss(h, e, scale)
    assert_close(loss, contrastive_loss(e, h, scale), rtol=1e-4, atol=1e-4)
    order = torch.randperm(n, generator=seed(s))
    reordered = contrastive_loss(h[order], e[order], scale)
    assert_close(loss, reordered, rtol=1e-4, atol=1e-4)
    # no cosines are further apart than 1 and -1
    assert loss >= math.log(1 + (n - 1)*math.exp(-2*scale)) - 1e-4
    same = unit(1, s).expand(n, -1)
    of_same = contrastive_loss(same, same, scale).item()
    assert of_same == pytest.approx(math.log(n), abs=1e-3)


@pytest.mark.parametrize('s', range(5))
def test_matched_pairs_have_the_smallest_loss(s):
    h = unit(10, s, d=32)
    matched = contrastive_loss(h, h)
    for shift in range(1, 10):
        assert matched < contrastive_loss(h, h.roll(shift, 0))


def test_embeddings_have_norm_one_and_any_shape():
    net = HyperCLIP(P, D, 16, seed())
    for shape in ((P,), (3, P), (3, 2, P)):
        out = net(torch.randn(shape, generator=seed(1)))
        assert out.shape == (*shape[:-1], D)
        assert_close(out.norm(dim=-1), torch.ones(shape[:-1]))


def test_ranks():
    scores = torch.tensor([[.9, .1, .5], [.9, .1, .5], [.9, .9, .5]])
    assert rank_of(scores, torch.tensor([0, 1, 1])).tolist() == [1, 3, 1]


def test_new_tasks_are_inferred(training, new_tasks):
    reader, losses = training
    assert sum(losses[-10:]) < .5*sum(losses[:10])
    assert share_among_first(1, reader, new_tasks) > .3 # chance: 1/60
    assert share_among_first(5, reader, new_tasks) > .7 # chance: 5/60
    assert not any(p.requires_grad for p in reader.parameters())


def test_exchanged_pairs_teach_nothing(tasks, new_tasks):
    weights, e = tasks
    exchanged = e[:TRAIN][torch.randperm(TRAIN, generator=seed(4))]
    reader, _ = train_hyperclip(weights[:TRAIN], exchanged, generator=seed(3), **QUICK)
    assert share_among_first(5, reader, new_tasks) < .3


def test_only_the_length_of_weights_and_questions_is_ignored(reader, new_tasks):
    W, e = new_tasks
    assert_close(task_similarity(reader, W, e), task_similarity(reader, W, 7*e))
    own = task_similarity(reader, W, e).diag()
    assert_close(hyperclip_score(reader, W, e), own)
    # the size of weights does say something
    assert not torch.allclose(reader(W), reader(2*W))


def test_no_question_of_other_tasks_is_read(tasks):
    weights, e = tasks[0][:TRAIN], tasks[1][:TRAIN]
    task_ids = torch.arange(0, TRAIN, 3)
    blank = torch.full_like(e, torch.nan)
    blank[task_ids] = e[task_ids]

    def train(e, task_ids=None):
        settings = QUICK | dict(steps=20, task_ids=task_ids)
        return train_hyperclip(weights, e, generator=seed(3), **settings)

    net, losses = train(e, task_ids)
    _, blank_losses = train(blank, task_ids)
    _, all_losses = train(e)
    assert losses == blank_losses
    assert losses != all_losses
    assert_close(net.mean, weights.mean((0, 1))) # the mean needs no question


def test_a_seed_repeats_the_training(training, tasks):
    weights, e = tasks[0][:TRAIN], tasks[1][:TRAIN]
    reader, losses = training
    again, again_losses = train_hyperclip(weights, e, generator=seed(3), **QUICK)
    assert again_losses == losses
    for name, value in reader.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    _, other_losses = train_hyperclip(weights, e, generator=seed(4), **QUICK)
    assert other_losses != losses


@pytest.fixture(scope='module')
def decode(tasks):
    "A generator of weights of the right size from latents"
    weights, _ = tasks
    net = mlp(Z, 16, P, generator=seed(7)).requires_grad_(False)
    mean, scale = weights.mean((0, 1)), weights.std()

    def decode(z):
        return mean.to(z) + scale.to(z)*net.to(z.dtype)(z)
    return decode


def test_the_path_starts_at_the_start(reader, decode, new_tasks):
    z0 = torch.randn(9, Z, generator=seed(8))
    e = new_tasks[1][:9]
    untouched = z0.clone()
    path = guide(reader, decode, z0, e, steps=7)
    assert path.shape == (8, 9, Z)
    assert path.isfinite().all() and not path.requires_grad
    assert torch.equal(path[0], untouched) and torch.equal(z0, untouched)
    assert torch.equal(path, guide(reader, decode, z0, e, steps=7))
    assert guide(reader, decode, z0, e, steps=0).shape == (1, 9, Z)


def test_one_start_leads_to_many_ends(reader, decode, new_tasks):
    "As with the HNet: one start for all, expanded"
    z0 = torch.randn(1, Z, generator=seed(8)).expand(9, -1)
    end = guide(reader, decode, z0, new_tasks[1][:9])[-1]
    assert not torch.allclose(end[0], end[1])


def test_guidance_raises_the_cosine(reader, decode, new_tasks):
    z0, e = torch.randn(NEW, Z, generator=seed(8)), new_tasks[1]

    def score(z):
        return hyperclip_score(reader, decode(z), e)

    path = guide(reader, decode, z0, e)
    assert (score(path[-1]) > score(path[0])).float().mean() > .9
    wrong = guide(reader, decode, z0, e.roll(1, 0))
    assert score(path[-1]).mean() > score(wrong[-1]).mean() + .1
    of_longer_e = guide(reader, decode, z0, 5*e)
    assert_close(of_longer_e, path, atol=1e-3, rtol=1e-3)


def test_a_larger_penalty_is_a_shorter_leash(reader, decode, new_tasks):
    z0, e = torch.randn(NEW, Z, generator=seed(8)), new_tasks[1]
    distances = []
    for penalty in (0., .1, .5, 3.):
        z = guide(reader, decode, z0, e, steps=60, penalty=penalty)[-1]
        distances.append(float((z - z0).norm(dim=-1).mean()))
    assert distances == sorted(set(distances), reverse=True)
    assert distances[-1] < .2*distances[0]


def test_the_gradient_of_the_guidance_loss(reader, decode, new_tasks):
    "A step of plain descent on Eq. 4 would go where finite differences say"
    exact = HyperCLIP(P, D, 32)
    exact.load_state_dict(reader.state_dict())
    exact.double()
    z0 = torch.randn(3, Z, generator=seed(8)).double()
    e = new_tasks[1][:3].double()

    def loss(z):
        score = hyperclip_score(exact, decode(z), e)
        return (.2*(z - z0).norm(dim=-1) - score).sum()

    assert torch.autograd.gradcheck(loss, (z0 + .3).requires_grad_())
