"A HyperLDM obeys its guidance scale and its seed, and a file that is not one is refused in one line, with nothing left behind."
import os, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from hyperclip_nb.adapter import Adapter
from hyperclip_nb.hvae import HVAE, draw, kl_divergence
from hyperclip_nb.hyperldm import HyperLDM, NoiseNet, load_hyperldm, save_hyperldm, train_hyperldm

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


@few
@given(st.integers(1, 9), st.floats(-3, 8), st.integers(0, 1000))
def test_guidance_is_linear_and_one_pass_is_two(n, gamma, s):
    _, ldm = models()
    z, t, e = torch.randn(n, Z, generator=seed(s)), torch.randint(350, (n,), generator=seed(s)), questions(n)
    without, told = ldm.net(z, t, torch.zeros_like(e)), ldm.net(z, t, e)
    torch.testing.assert_close(ldm.guided(e, gamma)(z, t), without + gamma*(told - without), rtol=1e-4, atol=1e-4)


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
    return train_hyperldm(hvae, weights, e, **dict(steps=150, batch=32, hidden=(32, 32), generator=seed(5)) | kw)


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
    z = (draw(mu.repeat(1, 50, 1), log_var.repeat(1, 50, 1), seed(0)).flatten(0, 1) - ldm.mean)/ldm.std
    torch.testing.assert_close(z.mean(0), torch.zeros(Z), atol=.05, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(Z), atol=.05, rtol=0)


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
