"""What writes networks comes back from its file as it was; a file that is something
else is refused in one line, and nothing half-written is left behind."""
import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.generators.hvae import HVAE
from hyperclip_nb.language.hyperldm import HyperLDM
from hyperclip_nb.language.tuning import TunedLDM
from hyperclip_nb.language.whitening import fit_whitening
from hyperclip_nb.writer.writer import (
    load_hyperldm, load_tuned, load_writer, save_hyperldm, save_tuned,
)

D, Z = 6, 4
adapter = Adapter(D, hidden=3)


def seed(n=0):
    return torch.Generator().manual_seed(n)


def untrained(kind='v'):
    "An HVAE and a HyperLDM whose outputs are not zero"
    hvae = HVAE(adapter.n_weights, Z, (8, 5), seed(0))
    ldm = HyperLDM(Z, D, (8, 12), kind, seed(1))
    for layer in (hvae.decoder[-1], ldm.net.out):
        nn.init.normal_(layer.weight, std=.3, generator=seed(2))
    return hvae.requires_grad_(False), ldm.requires_grad_(False)


@pytest.fixture
def path(tmp_path):
    "A file of a HyperLDM"
    path = tmp_path/'hyperldm.safetensors'
    save_hyperldm(path, adapter, *untrained(), 'abc', gamma=1.5)
    return path


def is_refused(path, reason):
    with pytest.raises(ValueError) as caught:
        load_hyperldm(path)
    message = str(caught.value)
    assert str(path) in message and reason in message
    assert '\n' not in message and 'hyperclip reproduce' in message


def in_half(module):
    "A copy with its tensors rounded to half precision, as a file has them"
    other = copy.deepcopy(module)
    for x in other.state_dict().values():
        near = x.half().float()
        torch.testing.assert_close(near, x, atol=1e-3, rtol=1e-3)
        x.copy_(near)
    return other


@pytest.mark.parametrize('kind', ['v', 'eps'])
def test_round_trip(tmp_path, kind):
    hvae, ldm = untrained(kind)
    path = tmp_path/'hyperldm.safetensors'
    save_hyperldm(path, adapter, hvae, ldm, 'abc', gamma=1.5)
    adapter2, hvae2, ldm2, facts = load_hyperldm(path)
    assert adapter2 == adapter and ldm2.kind == kind
    assert facts == dict(clip='abc', gamma=1.5)
    e = torch.randn(4, D, generator=seed(100))
    hvae, ldm = in_half(hvae), in_half(ldm)
    W = hvae.decode(ldm.sample(e, 1.5, seed(0)))
    W2 = hvae2.decode(ldm2.sample(e, 1.5, seed(0)))
    torch.testing.assert_close(W2, W)
    with safe_open(path, 'pt') as file: # the encoder has done its work
        assert not any('encoder' in name for name in file.keys())


@pytest.mark.parametrize('kept', [0, 5, 200, .5, -1])
def test_truncated(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[:int(kept*len(data)) if isinstance(kept, float) else kept])
    is_refused(path, 'holds no readable HyperLDM')


def rewrite(path, change, **sizes):
    "Write a file again with other tensors or sizes"
    with safe_open(path, 'pt') as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors)
    about['sizes'] = json.dumps(json.loads(about['sizes']) | sizes)
    del about['sha256']
    save_file(tensors, path, about)


def test_another_shape(path):
    rewrite(path, lambda tensors: tensors.update({'ldm.mean': torch.zeros(Z + 1)}))
    is_refused(path, 'ldm.mean is missing or of another shape')


def test_other_sizes(path):
    rewrite(path, lambda tensors: None, latent=Z + 1)
    is_refused(path, 'another shape')


def test_a_tensor_is_missing(path):
    rewrite(path, lambda tensors: tensors.pop('hvae.decoder.0.weight'))
    is_refused(path, 'hvae.decoder.0.weight is missing')


def test_something_else(tmp_path):
    other = tmp_path/'other.safetensors'
    save_file(dict(W=torch.zeros(3)), other)
    is_refused(other, 'its header names no sizes')
    words = tmp_path/'words'
    words.write_text('hello')
    is_refused(words, 'holds no readable HyperLDM')
    is_refused(tmp_path/'nothing', 'No such file')


def test_nothing_half_written(path, monkeypatch):
    "When the last step of writing fails, the old file is whole and no other is left"
    before = path.read_bytes()

    def fail(*args):
        raise OSError('no space left')

    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError):
        save_hyperldm(path, adapter, *untrained(), 'def')
    assert path.read_bytes() == before
    assert [f.name for f in path.parent.iterdir()] == [path.name]


@pytest.fixture
def tuned(tmp_path):
    "A file of a tuned HyperLDM, and the whitening in it"
    path = tmp_path/'tuned.safetensors'
    whiten = fit_whitening(torch.randn(20, D, generator=seed(3)) + 1)
    model = TunedLDM(*untrained(), generator=seed(4)).eval()
    nn.init.normal_(model.direct[-1].weight, generator=seed(5))
    save_tuned(path, adapter, model, whiten, 'a clip', gamma=2.)
    return path, whiten


def test_a_tuned_model_comes_back_with_its_whitening(tuned):
    path, whiten = tuned
    e = torch.randn(7, D, generator=seed(6))
    adapter2, model, whiten2, facts = load_tuned(path)
    assert adapter2 == adapter and facts == dict(clip='a clip', gamma=2.)
    assert torch.allclose(whiten2(e), whiten(e), atol=.05)
    _, walk, _ = load_writer(path)
    noise = torch.randn(7, 8, Z, generator=seed())
    W = walk(e, 2., noise)
    assert torch.equal(W, model.sample(whiten2(e), seed(), 8, 2.))
    assert not torch.allclose(W, walk(e, 0., noise))
    assert torch.equal(walk.noise(seed=3), torch.randn(8, Z, generator=seed(3)))


def test_a_plain_model_is_a_writer_too(path):
    e = torch.randn(7, D, generator=seed(6))
    _, hvae, ldm, _ = load_hyperldm(path)
    _, walk, facts = load_writer(path)
    assert facts == dict(clip='abc', gamma=1.5)
    expected = hvae.decode(ldm.sample(e, 1.5, seed()))
    noise = torch.randn(7, 1, Z, generator=seed())
    assert torch.equal(walk(e, 1.5, noise), expected)
    three = torch.randn(7, 3, Z, generator=seed())
    singles = [walk(e, 1.5, three[:, [k]]) for k in range(3)]
    torch.testing.assert_close(walk(e, 1.5, three), sum(singles)/3)


def test_damaged_files_are_named(tuned):
    path, _ = tuned
    whole = path.read_bytes()
    for broken in (whole[:200], whole[:-50], b''):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match='tuned.safetensors'):
            load_writer(path)


def test_a_plain_model_is_no_tuned_one(path, tuned):
    with pytest.raises(ValueError, match='beside a HyperLDM it holds'):
        load_tuned(path)
    is_refused(tuned[0], "beside a HyperLDM it holds ['direct', 'whitening'], not []")
