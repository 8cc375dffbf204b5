"A HyperLDM obeys its guidance scale, its classifier and its seed, learns from tasks without a question, and a file that is not one is refused in one line, with nothing left behind."
import math, os, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from hyperclip_nb.language import hyperldm as module
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.language.ddpm import sample_ddim
from hyperclip_nb.generators.hvae import HVAE, kl_divergence, reparameterize
from hyperclip_nb.base.training import bf16_autocast
from hyperclip_nb.language.hyperldm import HyperLDM, NoiseNet, train_hyperldm
from hyperclip_nb.writer.writer import load_hyperldm, save_hyperldm
from hyperclip_nb.language.baselines import train_regression

D, Z = 6, 4
adapter = Adapter(D, hidden=3)
few = settings(max_examples=25, deadline=None)


def seed(n=0): return torch.Generator().manual_seed(n)


def models(kind='v'):
    "An untrained HVAE and HyperLDM whose outputs are not zero"
    hvae, ldm = HVAE(adapter.n_weights, Z, (8, 5), seed(0)), HyperLDM(Z, D, (8, 12), kind, seed(1))
    for layer in (hvae.decoder[-1], ldm.net.out): nn.init.normal_(layer.weight, std=.3, generator=seed(2))
    return hvae.requires_grad_(False), ldm.requires_grad_(False)


def questions(n, s=0): return torch.randn(n, D, generator=seed(100 + s))


@few
@given(st.integers(1, 9), st.integers(0, 2**31 - 1), st.sampled_from(['v', 'eps']))
def test_zero_guidance_ignores_the_question(n, s, kind):
    _, ldm = models(kind)
    sample = lambda e, gamma: ldm.sample(e, gamma, seed(s), steps=5)
    assert torch.equal(sample(questions(n), 0.), sample(questions(n, 1), 0.))
    assert not torch.equal(sample(questions(n), 1.), sample(questions(n, 1), 1.))


@pytest.mark.parametrize('kind', ['v', 'eps'])
def test_guidance_of_one_is_the_conditional_model(kind):
    _, ldm = models(kind)
    ldm.mean.fill_(3.); ldm.std.fill_(2.)
    e, z = questions(5), torch.randn(5, Z, generator=seed(3))
    told = sample_ddim(lambda z, t: ldm.net(z, t, e), z, ldm.schedule, kind, 10)
    torch.testing.assert_close(ldm.sample(e, 1., seed(3), steps=10), 3 + 2*told, rtol=1e-4, atol=1e-4)


def test_training_in_half_precision_learns():
    "A block around a whole training must not keep the first step's weights"
    mu, e = torch.randn(40, 2, Z, generator=seed(1)), questions(40)
    losses = {}
    for on in False, True:
        with bf16_autocast(on, 'cpu'): _, losses[on] = train_regression(mu, e, steps=60, lr=1e-2, generator=seed(2))
    assert losses[False][-1] < .7*losses[False][0] and abs(losses[True][-1] - losses[False][-1]) < .05*losses[False][0]


@few
@given(st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_what_is_given_once_is_not_forgotten(n, s):
    "A network that was told the questions beforehand says the same, whether steps differ or are one number expanded; gradients reach its weights"
    net, e, z = models()[1].net.double().requires_grad_(), questions(n).double(), torch.randn(n, Z, generator=seed(s)).double()
    for t in torch.randint(350, (n,), generator=seed(s)), torch.full((), s % 350).expand(n):
        close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
        told, asked = net.given(e)(z, t), net(z, t.clone(), e)
        close(told, asked)
        for a, b in zip(*(torch.autograd.grad(x.square().sum(), list(net.parameters())) for x in (told, asked))): close(a, b)


@pytest.mark.parametrize('kind', ['v', 'eps'])
def test_a_classifier_is_asked_about_latents_and_followed(kind):
    _, ldm = models(kind)
    ldm.mean.fill_(50.); ldm.std.fill_(2.)
    e, asked = questions(30), []
    def log_p(z):
        asked.append(z.detach())
        return -(z - 52).square().sum(1)/4
    draw = lambda eta: ldm.sample(e, 1., seed(3), log_p=log_p, eta=eta)
    plain = ldm.sample(e, 1., seed(3))
    assert torch.equal(draw(0.), plain)
    guided = draw(.5)
    assert log_p(guided).mean() > log_p(plain).mean() and not guided.requires_grad
    assert all(z.shape == (30, Z) for z in asked) and (asked[-3] - 50).abs().mean() < 10   # in the decoder's units, not around 0


def test_a_question_of_zeros_cannot_be_guided():
    "Where there is nothing to read, every guidance scale gives the same sample"
    _, ldm = models()
    e = torch.zeros(5, D)
    torch.testing.assert_close(ldm.sample(e, 0., seed(3)), ldm.sample(e, 4., seed(3)))


def test_seeds():
    _, ldm = models()
    e = questions(5)
    assert torch.equal(ldm.sample(e, 1.5, seed(3)), ldm.sample(e, 1.5, seed(3)))
    assert not torch.equal(ldm.sample(e, 1.5, seed(3)), ldm.sample(e, 1.5, seed(4)))


@pytest.fixture(scope='module')
def latents():
    "Two kinds of weights that two questions tell apart, and an HVAE that lets them through"
    hvae = HVAE(adapter.n_weights, Z, (), seed(0)).requires_grad_(False)   # without hidden layers: linear
    e = torch.cat([torch.eye(D)[:1].repeat(20, 1), torch.eye(D)[1:2].repeat(20, 1)])*D**.5
    weights = torch.cat([torch.full((20, 2, adapter.n_weights), .5), torch.full((20, 2, adapter.n_weights), -.5)])
    weights += .1*torch.randn(weights.shape, generator=seed(1))
    hvae.measure(weights)
    return hvae, weights, e


def learn(latents, **kw):
    hvae, weights, e = latents
    return train_hyperldm(*hvae.encode(weights), e, **dict(steps=150, batch=32, hidden=(32, 32), generator=seed(5)) | kw)


def test_training_repeats_itself_and_learns_the_question(latents):
    hvae, weights, e = latents
    ldm, history = learn(latents)
    again, same = learn(latents)
    assert history == same and all(torch.equal(a, b) for a, b in zip(ldm.state_dict().values(), again.state_dict().values()))
    assert sum(history[-30:]) < sum(history[:30])
    true = hvae.encode(weights)[0].mean(1)
    z = ldm.sample(e, 1., seed(6))
    near = lambda a, b: (z[a] - true[b].mean(0)).norm(dim=1).mean()
    first, second = slice(0, 20), slice(20, 40)
    assert near(first, first) < near(first, second) and near(second, second) < near(second, first)


def test_every_parameter_is_trained_and_the_average_lags(latents):
    ldm, _ = learn(latents)
    start, raw = HyperLDM(Z, D, (32, 32), generator=seed(5)), learn(latents, ema=0.)[0]
    for (n, a), b, c in zip(ldm.net.named_parameters(), start.net.parameters(), raw.net.parameters()):
        assert not torch.equal(a, b), f'{n} is where it started'
        assert not torch.equal(a, c), f'{n} was not averaged'


def test_latents_are_normalised(latents):
    hvae, weights, _ = latents
    ldm, _ = learn(latents, steps=2)
    mu, log_var = hvae.encode(weights)
    z = (reparameterize(mu.repeat(1, 50, 1), log_var.repeat(1, 50, 1), seed(0)).flatten(0, 1) - ldm.mean)/ldm.std
    torch.testing.assert_close(z.mean(0), torch.zeros(Z), atol=.05, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(Z), atol=.05, rtol=0)


def test_latents_without_a_variance(latents):
    "A generator that gives points: a log-variance of -inf is no noise, in the scale and in the draws"
    _, weights, e = latents
    mu = weights[..., :Z]*torch.tensor([1., 2., 3., 4.])
    ldm, history = train_hyperldm(mu, torch.full_like(mu, -torch.inf), e, steps=150, batch=32, hidden=(32, 32), generator=seed(5))
    torch.testing.assert_close(ldm.mean, mu.mean((0, 1))); torch.testing.assert_close(ldm.std, mu.var((0, 1)).sqrt())
    z = ldm.sample(e, 1., seed(6))
    assert torch.isfinite(z).all() and torch.isfinite(torch.tensor(history)).all() and sum(history[-30:]) < sum(history[:30])
    assert z[:20].mean() > z[20:].mean()


def test_only_described_tasks_are_told_and_all_are_learned_from(latents):
    "Questions of tasks outside `rows` are never read; their latents are, but only without a question"
    hvae, weights, e = latents
    mu, log_var = hvae.encode(weights)
    fit = lambda e, mu=mu, **kw: train_hyperldm(mu, log_var, e, **dict(steps=40, batch=32, hidden=(32, 32), generator=seed(5)) | kw)
    ldm, history = fit(e, task_ids=range(20))
    unread = e.clone(); unread[20:] = 7.
    other, same = fit(unread, task_ids=range(20))
    assert history == same and all(torch.equal(a, b) for a, b in zip(ldm.state_dict().values(), other.state_dict().values()))
    moved = mu.clone(); moved[20:] += 1
    assert fit(e, moved, task_ids=range(20))[1] != history     # the untold half has seen them
    torch.testing.assert_close(fit(e, moved, task_ids=range(20))[0].mean, moved.mean((0, 1)))
    everything = fit(e, task_ids=range(40))[1]
    assert everything == fit(e)[1]                                 # all rows are the same as no rows


def test_the_unconditional_half_stays_usable(latents):
    "With γ = 0, samples are like latents of both questions, although only one was ever described"
    hvae, weights, e = latents
    ldm, _ = learn(latents, task_ids=range(20), p_uncond=.5, steps=400)
    true = hvae.encode(weights)[0].mean(1)
    centres = torch.stack([true[:20].mean(0), true[20:].mean(0)])
    second = lambda gamma: (torch.cdist(ldm.sample(e[:1].repeat(200, 1), gamma, seed(6)), centres).argmin(1) == 1).float().mean()
    assert .25 < second(0.) < .75 and second(1.) < .1


def test_regression_finds_the_mean():
    mu = torch.tensor([[[-1.], [1.]], [[1.], [3.]], [[50.], [50.]]])
    e = torch.eye(3); e[2] = torch.nan                             # not described, never read
    fit = lambda: train_regression(mu, e, task_ids=[0, 1], steps=300, lr=1e-2, hidden=(16,), generator=seed(1))
    (net, history), (again, same) = fit(), fit()
    torch.testing.assert_close(net(e[:2]).flatten(), torch.tensor([0., 2.]), atol=.05, rtol=0)
    assert history == same and torch.equal(net(e[:2]), again(e[:2])) and history[-1] < history[0]


def test_the_gate_and_the_condition_are_used():
    net = NoiseNet(Z, D, (8, 8), seed(0))
    nn.init.normal_(net.out.weight, std=.3, generator=seed(1))
    z, t, e = torch.randn(7, Z, generator=seed(2)), torch.arange(7)*50, questions(7)
    before = net(z, t, e)
    for block in net.blocks:
        bias, kept = block.gate[2].bias, block.gate[2].bias.detach().clone()
        with torch.no_grad(): bias.fill_(-1e4)
        assert not torch.allclose(net(z, t, e), before)
        with torch.no_grad(): bias.copy_(kept)
    assert not torch.allclose(net(z, t + 100, e), before) and not torch.allclose(net(z, t, -e), before)


@few
@given(st.integers(0, 1000), st.integers(1, 6))
def test_divergence(s, n):
    "Never negative, as PyTorch has it, and zero just for the standard normal"
    mu, log_var = torch.randn(2, n, Z, generator=seed(s)).unbind()
    kl = kl_divergence(mu, log_var)
    normal = torch.distributions.Normal(mu, (log_var/2).exp())
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(normal, torch.distributions.Normal(0., 1.)).sum(-1))
    assert (kl > 0).all() and kl_divergence(0*mu, 0*mu).eq(0).all()


@pytest.fixture
def saved(tmp_path):
    hvae, ldm = models()
    path = tmp_path/'hyperldm.safetensors'
    save_hyperldm(path, adapter, hvae, ldm, 'abc', gamma=1.5)
    return path, hvae, ldm


@pytest.mark.parametrize('kind', ['v', 'eps'])
def test_round_trip(tmp_path, kind):
    hvae, ldm = models(kind)
    path = tmp_path/'hyperldm.safetensors'
    save_hyperldm(path, adapter, hvae, ldm, 'abc', gamma=1.5)
    adapter2, hvae2, ldm2, facts = load_hyperldm(path)
    assert adapter2 == adapter and facts == dict(clip='abc', gamma=1.5) and ldm2.kind == kind
    e = questions(4)
    torch.testing.assert_close(hvae2.decode(ldm2.sample(e, 1.5, seed(0))), hvae.decode(ldm.sample(e, 1.5, seed(0))), atol=.05, rtol=.05)
    with safe_open(path, 'pt') as f: assert not [k for k in f.keys() if 'encoder' in k]   # it has done its work


def refused(path, why):
    with pytest.raises(ValueError) as caught: load_hyperldm(path)
    message = str(caught.value)
    assert str(path) in message and why in message and '\n' not in message and 'hyperclip reproduce' in message


@pytest.mark.parametrize('keep', [0, 5, 200, .5, -1])
def test_truncated(saved, keep):
    path, data = saved[0], saved[0].read_bytes()
    path.write_bytes(data[:int(keep*len(data)) if isinstance(keep, float) else keep])
    refused(path, 'holds no readable HyperLDM')


def changed(path, change, **sizes):
    "Rewrite a file with other tensors or sizes"
    import json
    with safe_open(path, 'pt') as f: about, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    change(tensors)
    if sizes: about['sizes'] = json.dumps(json.loads(about['sizes']) | sizes)
    save_file(tensors, path, about)


def test_another_shape(saved):
    path = saved[0]
    changed(path, lambda t: t.update({'ldm.mean': torch.zeros(Z + 1)}))
    refused(path, 'ldm.mean is missing or of another shape')


def test_other_sizes(saved):
    changed(saved[0], lambda t: None, latent=Z + 1)
    refused(saved[0], 'another shape')


def test_a_tensor_is_missing(saved):
    changed(saved[0], lambda t: t.pop('hvae.decoder.0.weight'))
    refused(saved[0], 'hvae.decoder.0.weight is missing')


def test_something_else(tmp_path):
    save_file(dict(W=torch.zeros(3)), tmp_path/'else.safetensors')
    refused(tmp_path/'else.safetensors', 'its header names no sizes')
    (tmp_path/'words').write_text('hello')
    refused(tmp_path/'words', 'holds no readable HyperLDM')
    refused(tmp_path/'nothing', 'No such file')


def test_nothing_half_written(saved, monkeypatch):
    "When the last step of writing fails, the old file is whole and no other is left"
    path, hvae, ldm = saved
    before = path.read_bytes()
    def fail(*args): raise OSError('no space left')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError): save_hyperldm(path, adapter, hvae, ldm, 'def')
    assert path.read_bytes() == before and [f.name for f in path.parent.iterdir()] == [path.name]


def test_latents_are_drawn_and_only_described_tasks_are_told(monkeypatch):
    "What the noise network is given: latents drawn anew around their means, the right question with each, and questions of `rows` alone"
    n, z, heard, loss = 8, [], [], module.diffusion_loss
    def recorded(net, z0, schedule, kind, generator, e):
        z.append(z0); heard.append(e)
        return loss(net, z0, schedule, kind, generator, e)
    monkeypatch.setattr(module, 'diffusion_loss', recorded)
    mu, e, spread = 10.*torch.arange(n)[:, None, None].expand(n, 1, Z), questions(n), .5
    ldm, _ = train_hyperldm(mu, torch.full_like(mu, 2*math.log(spread)), e, task_ids=[1, 3], steps=40, batch=32, hidden=(8,), p_uncond=.5, generator=seed(5))
    z, heard = torch.cat(z)*ldm.std + ldm.mean, torch.cat(heard)
    task, told = (z.mean(1)/10).round().long(), heard.any(1)
    off = z - 10.*task[:, None]
    torch.testing.assert_close(off.std(), torch.tensor(spread), atol=.02, rtol=0); assert len(z.unique(dim=0)) == len(z)
    assert set(task[told].tolist()) == {1, 3} and set(task[~told].tolist()) == set(range(n))
    assert torch.equal(heard[told], e[task[told]]) and .4 < told.float().mean() < .6
