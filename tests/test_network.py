"""Networks leave the house: ten lines in an empty folder write one, and plain PyTorch,
NumPy and ONNX Runtime say the same of five pictures. A file says what it is, twice with
the same bytes, and a hub that does not answer is one line."""
import json
import os
import runpy
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import setuptools
import torch
from PIL import Image

import hyperclip_nb
from hyperclip_nb import Network, Writer
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.writer.ask import draw_example
from hyperclip_nb.writer.pretrained import SHIPPED, describe
from hyperclip_nb.writer.writer import load_tuned, save_hyperldm

root = Path(__file__).parent.parent
STAR = 'What color is the large star?'


@pytest.fixture(scope='module')
def writer():
    return Writer.from_pretrained()


@pytest.fixture(scope='module')
def network(writer):
    return writer.write(STAR)


def run_python(program, cwd):
    "What a program prints in a fresh interpreter, in another folder"
    run = subprocess.run(
        [sys.executable, '-c', program], cwd=cwd, capture_output=True, text=True,
        env=os.environ | dict(PYTHONPATH=str(root)),
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


TEN_LINES = '''
from hyperclip_nb import Network, Writer
network = Writer.from_pretrained().write('What color is the large star?')
pictures = [f'{i}.png' for i in range(5)]
print(network.predict(pictures))
network.save('star.safetensors')
network.to_onnx('star.onnx')
x, a = Network.load('star.safetensors').features(pictures)
import numpy
numpy.savez('features.npz', x=x, a=a, p=network.predict_proba(pictures))
'''
PLAIN_TORCH = '''
import json, sys
import numpy, torch
from safetensors import safe_open
from torch.nn.functional import normalize
with safe_open('star.safetensors', 'pt') as file:
    W1, b1, W2, b2 = [file.get_tensor(name) for name in ('W1', 'b1', 'W2', 'b2')]
    about = file.metadata()
given = {name: torch.tensor(x) for name, x in numpy.load('features.npz').items()}
H, D = W1.shape
x = D**.5*normalize(given['x'], dim=1)
r = x + (x@W1.T/D**.5 + b1).relu()@W2.T/H**.5 + b2
cosines = normalize(r, dim=1)@normalize(given['a'], dim=1).T
p = (float(about['temperature'])*cosines).softmax(1)
print((p - given['p']).abs().max().item() < 1e-4)
print([json.loads(about['answers'])[i] for i in p.argmax(1)])
assert not any(name.startswith('hyperclip') for name in sys.modules)
'''
ONNX = '''
import json, sys
import numpy, onnxruntime
session = onnxruntime.InferenceSession('star.onnx')
about = session.get_modelmeta().custom_metadata_map
given = numpy.load('features.npz')
logits, = session.run(None, dict(images=given['x'], answers=given['a']))
p = numpy.exp(logits - logits.max(1, keepdims=True))
p /= p.sum(1, keepdims=True)
print(abs(p - given['p']).max() < 1e-4)
print([json.loads(about['answers'])[i] for i in p.argmax(1)])
assert not {'torch', 'hyperclip_nb'} & set(sys.modules)
'''


def test_ten_lines_in_an_empty_folder(tmp_path):
    pytest.importorskip('onnx', reason='onnx is an extra')
    pytest.importorskip('onnxruntime', reason='onnxruntime is an extra')
    right = []
    for i in range(5):
        scene, answer = draw_example(STAR, i)
        scene.save(tmp_path/f'{i}.png')
        right.append(answer)
    said = run_python(TEN_LINES, tmp_path)
    assert sum(a == b for a, b in zip(eval(said), right)) >= 3
    assert run_python(PLAIN_TORCH, tmp_path) == f'True\n{said}'
    assert run_python(ONNX, tmp_path) == f'True\n{said}'


IMPORT = '''
import time
start = time.perf_counter()
import hyperclip_nb
seconds = time.perf_counter() - start
import sys
print(seconds, not {'torch', 'numpy'} & set(sys.modules), dir(hyperclip_nb))
'''


def test_the_package_is_there_at_once(tmp_path):
    seconds, is_light, names = run_python(IMPORT, tmp_path).split(' ', 2)
    assert float(seconds) < .2 and is_light == 'True'
    assert {'Network', 'Writer', 'ask', '__version__'} <= set(eval(names))
    assert hyperclip_nb.__all__ == ['Network', 'Writer', 'ask']
    with pytest.raises(AttributeError, match='Reader'):
        hyperclip_nb.Reader


def test_a_network_is_the_same_alone_and_in_company(writer):
    "Many questions, more than one portion of the walk"
    questions = [STAR, 'What size is the lowest thing?', 'How many rings are there?']
    many = writer.write(questions*50, seed=7)
    assert len(many) == 150
    for question, one in zip(questions, many[147:]):
        alone = writer.write(question, seed=7)
        torch.testing.assert_close(one.W, alone.W, rtol=1e-4, atol=1e-5)
        assert (one.question, one.answers) == (question, alone.answers)
        assert one.about | dict(digest=0) == alone.about | dict(digest=0)
    assert many[0].W.untyped_storage().nbytes() == 4*len(many[0].W) # and nothing else


def test_one_question_is_written_as_the_model_does_it(writer):
    "Bit by bit what the tuned model gives from a generator of this seed"
    _, model, whitening, _ = load_tuned(SHIPPED)
    e = whitening(writer.clip.encode_text([STAR]))
    for seed, samples in (0, 8), (3, 8), (0, 1):
        generator = torch.Generator().manual_seed(seed)
        expected = model.sample(e, generator, samples, 2.)[0]
        assert torch.equal(writer.write(STAR, 2., samples, seed).W, expected)


def test_a_gamma_of_zero_is_kept(writer, tmp_path):
    path = tmp_path/'model.safetensors'
    writer.walk.save(path, **writer.facts | dict(gamma=0.))
    assert Writer.from_pretrained(path).gamma == 0
    facts = {name: x for name, x in writer.facts.items() if name != 'gamma'}
    writer.walk.save(path, **facts)
    assert Writer.from_pretrained(path).gamma == 1.5


def test_a_plain_hyperldm_is_a_writer(tmp_path):
    "A file as the chapter on the writer saves it, with no facts at all"
    adapter, model, _, facts = load_tuned(SHIPPED)
    path = tmp_path/'plain.safetensors'
    save_hyperldm(path, adapter, model.hvae, model.ldm, facts['clip'])
    plain = Writer.from_pretrained(path)
    network = plain.write(STAR)
    assert (network.made_by['samples'], network.made_by['steps']) == (1, 25)
    plain.save_pretrained(tmp_path/'shared')
    again = Writer.from_pretrained(tmp_path/'shared')
    assert torch.equal(again.write(STAR).W, network.W)
    assert 'Not measured' in (tmp_path/'shared'/'README.md').read_text()


def test_equal_bytes_in_every_process(network, tmp_path):
    "The order of the metadata is not left to chance"
    network.save(tmp_path/'here.safetensors')
    program = f'''
from hyperclip_nb import Writer
for i in range(3):
    Writer.from_pretrained().write({STAR!r}).save(f'{{i}}.safetensors')
'''
    run_python(program, tmp_path)
    here = (tmp_path/'here.safetensors').read_bytes()
    assert all((tmp_path/f'{i}.safetensors').read_bytes() == here for i in range(3))
    network.save(tmp_path/'deep'/'again.safetensors')
    assert (tmp_path/'deep'/'again.safetensors').read_bytes() == here


@pytest.mark.parametrize('at', [9, 300, -1, -20_000])
def test_a_changed_byte_is_an_error_or_changes_nothing(network, tmp_path, at):
    "Weights are not read where they are damaged"
    path = tmp_path/'w.safetensors'
    network.save(path)
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    try:
        assert torch.equal(Network.load(path).W, network.W)
    except ValueError as error:
        assert str(path) in str(error) and '\n' not in str(error)
        return
    assert 0 < at < 2000 # in the header


def test_pictures_of_all_kinds(network, tmp_path):
    scene = draw_example(STAR, 0)[0]
    scene.save(tmp_path/'a.png')
    p = network.predict_proba(scene)
    kinds = [scene, np.array(scene), tmp_path/'a.png', str(tmp_path/'a.png')]
    for row in network.predict_proba(kinds):
        np.testing.assert_allclose(row, p[0], atol=1e-5)
    grey = Image.new('L', (20, 10), 128)
    assert network.predict_proba([grey, grey.convert('RGB')]).shape == (2, 10)
    many = np.stack([np.array(scene.resize((96, 96)))]*70)
    assert network.predict(many) == network.predict(many[:1])*70
    for wrong in (None, 3, [None], np.zeros((2, 2, 4), np.uint8), torch.zeros(3, 2, 2)):
        with pytest.raises((ValueError, TypeError)):
            network.predict(wrong)


def kinds_of_files(picture, folder):
    "The same picture as people keep it"
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.rotate(90, expand=True).save(folder/'telephone.png', exif=turned)
    clear = picture.convert('RGBA')
    clear.putalpha(Image.new('L', picture.size, 255))
    clear.save(folder/'clear.webp', lossless=True)
    picture.convert('P', palette=Image.ADAPTIVE, colors=256).save(folder/'few.gif')
    picture.convert('CMYK').save(folder/'print.tif')
    frames = [picture.rotate(180)]
    picture.save(folder/'moves.png', save_all=True, append_images=frames)
    return sorted(folder.iterdir())


def test_a_picture_is_what_a_person_sees(network, tmp_path):
    scene, _ = draw_example(STAR, 3)
    paths = kinds_of_files(scene, tmp_path)
    assert len(paths) == 5
    expected = network.predict_proba(scene)[0]
    for path in paths:
        for given in path, Image.open(path):
            p = network.predict_proba(given)[0]
            assert abs(p - expected).max() < .1, path
            assert p.argmax() == expected.argmax(), path


@pytest.mark.parametrize('kept', [0, 1, 20, 200, -1])
def test_half_a_picture_is_one_line(network, tmp_path, kept, hyperclip):
    scene, _ = draw_example(STAR, 0)
    path = tmp_path/'half.png'
    scene.save(path)
    path.write_bytes(path.read_bytes()[:kept])
    code, out, err = hyperclip('ask', STAR, path)
    if kept == -1 and code == 0: # its last byte belongs to no pixel
        return
    assert code == 2 and err.count('\n') == 1 and 'half.png' in err and not out


def test_plain_modules(network):
    "State dict, export and trace stand without this library's classes"
    x, a = network.features([draw_example(STAR, i)[0] for i in range(3)])
    module = network.to_torch()
    assert all(type(m).__module__.startswith('torch.') for m in module.children())
    other = type(module)(module.hidden.in_features, module.out.in_features, 30.)
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x, a), module(x, a))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # of PyTorch: there are newer ways
            traced = torch.jit.trace(module, (x[:1], a[:2]))
        torch.testing.assert_close(traced(x, a), module(x, a))


class TestHub:
    "What a model hub gives, or does not give"

    def test_its_folder_is_read(self, writer, tmp_path, monkeypatch):
        import huggingface_hub
        writer.save_pretrained(tmp_path/'hub')
        asked = []

        def download(name, **options):
            asked.append((name, options))
            return str(tmp_path/'hub')

        monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
        fetched = Writer.from_pretrained('owner/name', revision='v1')
        assert torch.equal(fetched.write(STAR).W, writer.write(STAR).W)
        (name, options), = asked
        assert name == 'owner/name' and options['revision'] == 'v1'
        assert options['local_files_only'] is False

    def test_no_answer_is_one_line(self, monkeypatch):
        import huggingface_hub

        def download(name, **options):
            raise ConnectionError('no route\n\nto host')

        monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
        with pytest.raises(ValueError, match=r'owner/name .*\(no route to host\)$'):
            Writer.from_pretrained('owner/name')

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
        with pytest.raises(ValueError, match='pip install huggingface_hub'):
            Writer.from_pretrained('owner/name')

    @pytest.mark.parametrize(
        'source', ['a/b/c', 'nothing', 'a/b.safetensors', Path('a/b')], ids=str,
    )
    def test_what_is_no_name_is_not_asked_for(self, source, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
        with pytest.raises(ValueError, match='No such file'):
            Writer.from_pretrained(source)


def test_show(hyperclip, network, writer, tmp_path):
    network.save(tmp_path/'w.safetensors')
    code, out, _ = hyperclip('show', tmp_path/'w.safetensors', '--json')
    assert code == 0 and json.loads(out) == describe(tmp_path/'w.safetensors')
    code, out, _ = hyperclip('show', tmp_path/'w.safetensors')
    assert code == 0 and out.startswith('holds          network\n') and STAR in out

    writer.save_pretrained(tmp_path/'model')
    code, out, _ = hyperclip('show', tmp_path/'model', '--json')
    config = json.loads((tmp_path/'model'/'config.json').read_text())
    assert code == 0 and json.loads(out) == dict(holds='model') | config

    for wrong in tmp_path, tmp_path/'none', SHIPPED.with_name('tiny-clip.safetensors'):
        code, _, err = hyperclip('show', wrong)
        assert code == 2 and err.startswith('error:') and err.count('\n') == 1


def test_a_question_is_shown_as_it_was_typed(hyperclip, writer, tmp_path):
    question = 'Is this [red] or “größer”?'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        network = writer.write(question, answers=['[b]yes', 'no'])
    network.save(tmp_path/'w.safetensors')
    assert Network.load(tmp_path/'w.safetensors').question == question
    _, out, _ = hyperclip('show', tmp_path/'w.safetensors')
    assert question in out and '[b]yes' in out


def test_a_network_of_another_size_is_no_traceback(hyperclip, network, tmp_path):
    small = Adapter(160, 8)
    other = replace(network, adapter=small, W=torch.zeros(small.n_weights))
    other.save(tmp_path/'w.safetensors')
    draw_example(STAR)[0].save(tmp_path/'a.png')
    args = 'ask', STAR, tmp_path/'a.png', '--weights', tmp_path/'w.safetensors'
    code, _, err = hyperclip(*args)
    assert code == 2 and 'another size' in err


def test_the_extras_are_told_to_pip(monkeypatch):
    "setup.py offers what settings.ini lists, and what users may install is tested"
    given = {}
    monkeypatch.setattr(setuptools, 'setup', given.update)
    runpy.run_path(root/'setup.py')
    extras = given['extras_require']
    named = {'dev', 'notebooks', 'onnx', 'tensorboard', 'umap'}
    assert set(extras) == named
    for name in named - {'notebooks'}:
        assert set(extras[name]) <= set(extras['dev'])


def test_each_requirement_has_a_lowest_version(monkeypatch):
    "which .ci/lowest installs"
    given = {}
    monkeypatch.setattr(setuptools, 'setup', given.update)
    runpy.run_path(root/'setup.py')
    for requirement in given['install_requires']:
        assert '>=' in requirement, requirement


def test_no_heavy_import_is_a_requirement(monkeypatch):
    "what only one figure needs is an extra, and its absence is told with a remedy"
    from hyperclip_nb.lab.maps import question_figure
    monkeypatch.setitem(sys.modules, 'umap', None)
    with pytest.raises(ValueError, match=r"pip install 'hyperclip_nb\[umap\]'"):
        question_figure(torch.randn(4, 3), [])
