"""A CLIP of any kind: what open_clip can build, and two encoders of one's own."""
import json
import warnings

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from hyperclip_nb.data.world import make_world
from hyperclip_nb.lab.runs import Run
from hyperclip_nb.lab.stages import override, preset
from hyperclip_nb.vision.clip import load_clip
from hyperclip_nb.vision.encoders import wrap_clip
from hyperclip_nb.vision.features import encode_world

VIT = dict(image_size=32, layers=1, width=64, patch_size=16)
TEXT = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)


def timm(name, size, **more):
    facts = dict(timm_model_name=name, timm_model_pretrained=False, image_size=size)
    return facts | more


KINDS = {
    'CLIP': dict(vision_cfg=VIT, text_cfg=TEXT),
    'ResNet': dict(
        vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=16), text_cfg=TEXT,
    ),
    'CustomTextCLIP': dict(custom_text=True, vision_cfg=VIT, text_cfg=TEXT),
    'CoCa': dict(
        custom_text=True,
        vision_cfg=VIT | dict(
            attentional_pool=True, attn_pooler_heads=2, output_tokens=True,
        ),
        text_cfg=TEXT | dict(embed_cls=True, output_tokens=True),
        multimodal_cfg=TEXT | dict(attn_pooler_heads=2),
    ),
    'Sigmoid': dict( # SigLIP; by that name open_clip wants another tokenizer
        custom_text=True, init_logit_bias=-10,
        vision_cfg=timm('vit_tiny_patch16_224', 224, timm_pool='', timm_proj='linear'),
        text_cfg=TEXT | dict(
            no_causal_mask=True, proj_bias=True, pool_type='last',
            norm_kwargs=dict(eps=1e-6),
        ),
    ),
    'EVA': dict(
        custom_text=True,
        vision_cfg=timm(
            'eva02_tiny_patch14_224', 224, timm_pool='token', timm_proj=None,
        ),
        text_cfg=TEXT,
    ),
    'MobileCLIP': dict(
        custom_text=True,
        vision_cfg=timm('fastvit_t8', 64, timm_pool='avg', timm_proj=None),
        text_cfg=TEXT,
    ),
}
WIDTHS = dict(EVA=192, MobileCLIP=768)  # of towers that have no projection


@pytest.fixture(params=KINDS)
def kind(request, tmp_path):
    "The name of a small architecture of a kind, and the width of its vectors"
    name, width = f'small-{request.param}', WIDTHS.get(request.param, 48)
    file = tmp_path/f'{name}.json'
    file.write_text(json.dumps(dict(embed_dim=width) | KINDS[request.param]))
    open_clip.add_model_config(file)
    return name, width


def test_each_kind_encodes_at_its_own_width(kind):
    name, width = kind
    clip = load_clip(f'{name}:random')
    assert clip.width == width
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    x = clip.encode_image(pictures)
    t = clip.encode_text(['a red star', 'two blue rings'])
    for vectors, n in (x, 3), (t, 2):
        assert vectors.shape == (n, width)
        norms = vectors.norm(dim=1)
        torch.testing.assert_close(norms, torch.full((n,), width**.5))
    assert not torch.equal(t[0], t[1]) and not torch.equal(x[0], x[1])
    again = load_clip(f'{name}:random')
    assert again.encode_text(['a red star', 'two blue rings']).equal(t)
    if 'CoCa' not in name:  # which has a parameter that nobody sets at first
        assert again.fingerprint == clip.fingerprint


# ---- one's own


class Own(nn.Module):
    "Two encoders that are nobody else's"
    def __init__(self, activation=nn.GELU):
        super().__init__()
        torch.manual_seed(0)
        self.picture = nn.Sequential(nn.Flatten(), nn.Linear(3*64, 10), activation())
        self.words = nn.Embedding(50, 10)

    def encode_image(self, pixels):
        return self.picture(pixels)

    def encode_text(self, tokens):
        return self.words(tokens).mean(1)


def small_square(image):
    pixels = np.asarray(image.resize((8, 8)), np.float32)/255
    return torch.from_numpy(pixels).permute(2, 0, 1)


def letters(texts):
    return torch.tensor([[ord(c) % 50 for c in f'{text:<60}'[:60]] for text in texts])


def test_two_encoders_of_ones_own_are_a_clip():
    clip = wrap_clip(Own(), small_square, letters)
    world = make_world(3, (20, 5, 5), (300, 150, 150))
    features = encode_world(clip, world)
    assert features.image.shape == (len(world.scenes), clip.width)
    assert not any(p.requires_grad for p in clip.model.parameters())


def test_the_fingerprint_is_of_all_that_vectors_depend_on():
    def fingerprint(model=None, transform=small_square, tokens=letters):
        return wrap_clip(model or Own(), transform, tokens).fingerprint

    def darker(image):
        return small_square(image)/2

    def backwards(texts):
        return letters([text[::-1] for text in texts])

    other = Own()
    with torch.no_grad():
        other.picture[1].weight[3, 77] *= 1 + 1e-6
    assert fingerprint() == fingerprint()
    changed = [
        fingerprint(other), fingerprint(Own(nn.SiLU)), fingerprint(Own(nn.ELU)),
        fingerprint(transform=darker), fingerprint(tokens=backwards),
    ]
    assert len({fingerprint(), *changed}) == 6


def test_a_run_takes_it_and_is_opened_with_it(tmp_path):
    settings = override(preset('smoke'), world=dict(
        tasks=(30, 10, 12), scenes=(300, 200, 200),
    ))
    run = Run(settings, folder=tmp_path, clip=wrap_clip(Own(), small_square, letters))
    assert run.config['clip']['name'] == 'own'
    with pytest.raises(ValueError, match="unknown CLIP 'own'"):
        Run.open(tmp_path)
    again = Run.open(tmp_path, clip=wrap_clip(Own(), small_square, letters))
    assert torch.equal(again.data['test'].e, run.data['test'].e)
    with pytest.raises(ValueError, match='another clip'):
        Run.open(tmp_path, clip=wrap_clip(Own(nn.SiLU), small_square, letters))


def test_words_that_it_does_not_know_are_said_once(tmp_path):
    clip = load_clip()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('default')
        for _ in range(3): # more texts than are encoded at a time
            clip.encode_text(['a zebra', *['a red star']*600, 'a star in Rome'])
    assert [str(w.message) for w in said] == [
        'the tiny CLIP was never taught 2 words of these texts: rome, zebra',
    ]
