"HyperCLIP learns which question a network answers, and only that; guidance climbs what it is given, on a leash."
import math, pytest, torch, torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from hyperclip_nb.language.guidance import guide, hyperclip_score
from hyperclip_nb.generators.hypernet import mlp
from hyperclip_nb.language.hyperclip import (
    HyperCLIP, contrastive_loss, rank_of, task_similarity, train_hyperclip,
)

D, P, Z, T, NEW = 8, 40, 5, 120, 60
few = settings(max_examples=25, deadline=None)


def seed(n=0): return torch.Generator().manual_seed(n)


def unit(n, s=0, d=D): return F.normalize(torch.randn(n, d, generator=seed(s)), dim=-1)


@pytest.fixture(scope='module')
def tasks():
    "Weights that are a linear function of the question, plus a common start and some noise: (T+NEW,2,P) and (T+NEW,D)"
    e = 3*torch.randn(T + NEW, D, generator=seed(0))
    W = 5 + e@torch.randn(D, P, generator=seed(1))
    return W[:, None] + .5*torch.randn(T + NEW, 2, P, generator=seed(2)), e


@pytest.fixture(scope='module')
def reader(tasks):
    weights, e = tasks
    return train_hyperclip(weights[:T], e[:T], generator=seed(3), **quick)


quick = dict(steps=150, hidden=32, lr=3e-3, noise=.3)


def hits(net, tasks, n=1):
    "Share of new networks whose question is among the first n"
    weights, e = tasks
    return (rank_of(task_similarity(net, weights[T:, 0], e[T:]), torch.arange(NEW)) <= n).float().mean().item()


def test_the_loss_by_hand():
    h, e = torch.tensor([[1., 0.], [0., 1.]]), torch.tensor([[1., 0.], [.6, .8]])   # cosines 1, .6; 0, .8
    row = (math.log(math.exp(2) + math.exp(1.2)) - 2 + math.log(1 + math.exp(1.6)) - 1.6)/2
    column = (math.log(math.exp(2) + 1) - 2 + math.log(math.exp(1.2) + math.exp(1.6)) - 1.6)/2
    assert contrastive_loss(h, e, scale=2.).item() == pytest.approx((row + column)/2, abs=1e-6)


@few
@given(st.integers(2, 20), st.integers(0, 1000), st.floats(.1, 100))
def test_the_loss_is_symmetric_blind_to_order_and_bounded(n, s, scale):
    h, e = unit(n, s), unit(n, s + 1)
    loss = contrastive_loss(h, e, scale)
    torch.testing.assert_close(loss, contrastive_loss(e, h, scale), rtol=1e-4, atol=1e-4)
    order = torch.randperm(n, generator=seed(s))
    torch.testing.assert_close(loss, contrastive_loss(h[order], e[order], scale), rtol=1e-4, atol=1e-4)
    assert loss >= math.log(1 + (n - 1)*math.exp(-2*scale)) - 1e-4        # no cosines are further apart than 1 and -1
    same = unit(1, s).expand(n, -1)
    assert contrastive_loss(same, same, scale).item() == pytest.approx(math.log(n), abs=1e-3)


@pytest.mark.parametrize('s', range(5))
def test_matched_pairs_have_the_smallest_loss(s):
    h = unit(10, s, d=32)
    assert all(contrastive_loss(h, h) < contrastive_loss(h, h[torch.arange(10).roll(k)]) for k in range(1, 10))


def test_embeddings_have_norm_one_and_any_shape():
    net = HyperCLIP(P, D, 16, seed())
    for shape in ((P,), (3, P), (3, 2, P)):
        out = net(torch.randn(shape, generator=seed(1)))
        assert out.shape == (*shape[:-1], D)
        torch.testing.assert_close(out.norm(dim=-1), torch.ones(shape[:-1]))


def test_places():
    scores = torch.tensor([[.9, .1, .5], [.9, .1, .5], [.9, .9, .5]])
    assert rank_of(scores, torch.tensor([0, 1, 1])).tolist() == [1, 3, 1]


def test_new_tasks_are_inferred(reader, tasks):
    net, history = reader
    assert sum(history[-10:]) < .5*sum(history[:10])
    assert hits(net, tasks) > .3 and hits(net, tasks, 5) > .7             # chance: 1/60 and 5/60
    assert not any(p.requires_grad for p in net.parameters())


def test_exchanged_pairs_teach_nothing(tasks):
    weights, e = tasks
    net, _ = train_hyperclip(weights[:T], e[:T][torch.randperm(T, generator=seed(4))], generator=seed(3), **quick)
    assert hits(net, tasks, 5) < .3


def test_only_the_length_of_weights_and_questions_is_ignored(reader, tasks):
    net, (weights, e) = reader[0], tasks
    W = weights[T:, 0]
    torch.testing.assert_close(task_similarity(net, W, e), task_similarity(net, W, 7*e))
    torch.testing.assert_close(hyperclip_score(net, W, e[T:]), task_similarity(net, W, e[T:]).diag())
    assert not torch.allclose(net(W), net(2*W))                           # the size of weights does say something


def test_rows_are_all_that_is_read(tasks):
    weights, e = tasks
    rows = torch.arange(0, T, 3)
    blank = torch.full_like(e, torch.nan); blank[rows] = e[rows]
    a, b = (train_hyperclip(weights[:T], x[:T], task_ids=rows, generator=seed(3), **quick | dict(steps=20)) for x in (e, blank))
    everything = train_hyperclip(weights[:T], e[:T], generator=seed(3), **quick | dict(steps=20))
    assert a[1] == b[1] != everything[1]
    torch.testing.assert_close(a[0].mean, weights[:T].mean((0, 1)))       # the mean needs no question


def test_a_seed_repeats_the_training(reader, tasks):
    weights, e = tasks
    again = lambda s: train_hyperclip(weights[:T], e[:T], generator=seed(s), **quick)
    net, history = again(3)
    assert history == reader[1] and all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), reader[0].state_dict().values()))
    assert again(4)[1] != history


@pytest.fixture(scope='module')
def generator(tasks):
    "A decoder from latents to weights of the right size"
    weights, _ = tasks
    net, mean, scale = mlp(Z, 16, P, generator=seed(7)).requires_grad_(False), weights.mean((0, 1)), weights.std()
    return lambda z: mean.to(z) + scale.to(z)*net.to(z.dtype)(z)


def test_the_path_starts_at_the_start(reader, generator, tasks):
    z0, e = torch.randn(9, Z, generator=seed(8)), tasks[1][T:T+9]
    kept = z0.clone()
    path = guide(reader[0], generator, z0, e, steps=7)
    assert path.shape == (8, 9, Z) and path.isfinite().all() and not path.requires_grad
    assert torch.equal(path[0], kept) and torch.equal(z0, kept)
    assert torch.equal(path, guide(reader[0], generator, z0, e, steps=7))
    assert guide(reader[0], generator, z0, e, steps=0).shape == (1, 9, Z)
    one_start = guide(reader[0], generator, z0[:1].expand(9, -1), e)      # as with the HNet: one start for all, expanded
    assert not torch.allclose(one_start[-1, 0], one_start[-1, 1])


def test_guidance_raises_the_cosine(reader, generator, tasks):
    z0, e = torch.randn(NEW, Z, generator=seed(8)), tasks[1][T:]
    fit = lambda z: hyperclip_score(reader[0], generator(z), e)
    path = guide(reader[0], generator, z0, e)
    assert (fit(path[-1]) > fit(path[0])).float().mean() > .9
    wrong = guide(reader[0], generator, z0, e.roll(1, 0))
    assert fit(path[-1]).mean() > fit(wrong[-1]).mean() + .1
    torch.testing.assert_close(guide(reader[0], generator, z0, 5*e), path, atol=1e-3, rtol=1e-3)


def test_a_larger_penalty_is_a_shorter_leash(reader, generator, tasks):
    z0, e = torch.randn(NEW, Z, generator=seed(8)), tasks[1][T:]
    way = [(guide(reader[0], generator, z0, e, steps=60, penalty=p)[-1] - z0).norm(dim=-1).mean() for p in (0., .1, .5, 3.)]
    assert way[0] > way[1] > way[2] > way[3] and way[3] < .2*way[0]


def test_the_gradient_of_the_guidance_loss(reader, generator, tasks):
    "One step of plain gradient descent on Eq. 4 would go where finite differences say"
    net = HyperCLIP(P, D, 32); net.load_state_dict(reader[0].state_dict()); net.double()
    z0, e = torch.randn(3, Z, generator=seed(8)).double(), tasks[1][T:T+3].double()
    z = (z0 + .3).requires_grad_()
    loss = lambda z: (.2*(z - z0).norm(dim=-1) - hyperclip_score(net, generator(z), e)).sum()
    assert torch.autograd.gradcheck(loss, z)
