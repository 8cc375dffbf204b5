"Small promises, each of which a planted fault once broke without a test that failed."
import ast
import errno
import io
import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from hyperclip_nb.base.training import fit
from hyperclip_nb.command import cli, streams
from hyperclip_nb.command.cli_data import _warn_alike
from hyperclip_nb.data import files, vqa
from hyperclip_nb.data.batches import all_texts
from hyperclip_nb.data.images import as_rgb
from hyperclip_nb.data.metavqa import _check_parts
from hyperclip_nb.data.questions import EXTREMES, parse, possible_answers, true_answers
from hyperclip_nb.data.scenes import PLACES, SHAPES, SIZES, Scenes
from hyperclip_nb.data.tasks import Task, has_descriptor
from hyperclip_nb.language.hyperldm import train_hyperldm
from hyperclip_nb.lab.models import STAGES, Models
from hyperclip_nb.lab.runs import Run
from hyperclip_nb.lab.stages import override, preset
from hyperclip_nb.vision import photographs
from hyperclip_nb.vision.encoders import wrap_clip
from hyperclip_nb.vision.photographs import encode_files

root = Path(__file__).parent.parent
code = [
    path for name in ('hyperclip_nb', 'tools')
    for path in sorted((root/name).rglob('*.py'))
]


# ---- files that are not finished


@pytest.mark.parametrize('change', ['node', 'boot', 'namespace'])
def test_another_machine_start_or_container_has_another_name(change, monkeypatch):
    if not Path('/proc/self/ns/pid').exists():
        pytest.skip('Linux alone tells its starts and containers apart')
    name = files._machine.__wrapped__
    before = name()
    if change == 'node':
        monkeypatch.setattr(platform, 'node', lambda: 'elsewhere')
    if change == 'boot':
        monkeypatch.setattr(Path, 'read_text', lambda path: 'another start')
    if change == 'namespace':
        monkeypatch.setattr(os, 'readlink', lambda path: 'pid:[1]')
    assert name() != before


def test_a_large_file_shows_that_its_writer_lives(tmp_path, monkeypatch):
    "Each piece goes to the disk, so that the time of the unfinished file moves on"
    synced = []
    monkeypatch.setattr(os, 'fsync', synced.append)
    files._write_through(tmp_path/'x', memoryview(bytes(10)), piece=4)
    assert len(synced) == 3
    assert (tmp_path/'x').read_bytes() == bytes(10)


def memory_of_its_own():
    "Bytes of this process that are no file's"
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('RssAnon:'):
            return 1024*int(line.split()[1])
    pytest.skip('this system does not tell them apart')


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_tensors_are_mapped_and_not_copied(tmp_path):
    size = 2**28 # bytes
    files.write_tensors(tmp_path/'x.safetensors', dict(x=torch.ones(size//4)))
    before = memory_of_its_own()
    tensors, _ = files.read_tensors(tmp_path/'x.safetensors')
    assert tensors['x'].sum() == size//4 # every page was touched
    assert memory_of_its_own() - before < size/4


def test_each_official_file_is_read_once(tmp_path, monkeypatch):
    vqa.write_sample(tmp_path, tasks=5)
    paths = []

    def read_json(path, key):
        paths.append(path)
        return files.read_json(path, key)

    monkeypatch.setattr(vqa, 'read_json', read_json)
    vqa.read_vqa(tmp_path)
    assert len(paths) == len(set(paths)) == 4


# ---- stages


def test_a_stage_that_fails_leaves_those_before_it(tmp_path, monkeypatch):
    world = dict(tasks=(30, 10, 12), scenes=(300, 200, 200))
    settings = override(preset('smoke'), world=world, multitask=dict(epochs=1))

    def broken(models, **settings):
        models.multitask
        raise OSError('the disk is gone')

    monkeypatch.setitem(STAGES, 'lost', replace(STAGES['weights'], train=broken))
    run = Run(settings, folder=tmp_path)
    with pytest.raises(OSError, match='the disk is gone'):
        Models(run, seed=0).lost
    first = tmp_path/'stages'/'seed0-multitask.safetensors'
    tensors, _ = files.read_tensors(first)
    assert tensors['value'].equal(run.parts['seed0-multitask'])


def test_a_loop_over_no_epochs_leaves_things_as_they_are():
    theta = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([theta], lr=1.)
    for epochs in [], [[]]: # none, and one of no batches
        assert fit([theta], epochs, None, optimizer) == ([], [])
    assert theta.eq(1).all()


# ---- what is said


def test_the_name_of_a_stage_is_no_markup(monkeypatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=80)
    monkeypatch.setattr(streams, 'notes', terminal)
    with streams.progress_bars() as bars:
        for _ in streams.tracker(bars)(range(2), '[red]x[/]'):
            bars.refresh()
    assert '[red]x[/]' in terminal.file.getvalue()


@pytest.mark.parametrize('error', [
    MemoryError(), OSError(errno.ENOMEM, ''), RuntimeError('not enough memory: 9 GB'),
])
def test_each_way_to_lack_memory_is_the_same_line(error):
    line, code = cli._one_line(error)
    assert 'too little memory' in line and '\n' not in line
    assert code == 1


# ---- pictures


def test_whole_numbers_of_a_picture_are_scaled():
    picture = Image.fromarray(np.array([[0, 32639, 65535]], np.int32))
    assert picture.mode == 'I'
    assert np.asarray(as_rgb(picture))[0, :, 0].tolist() == [0, 127, 255]


class Mean(torch.nn.Module):
    "Two encoders that see the mean color, times a number"
    def __init__(self, scale=1.):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))

    def encode_image(self, pixels): # (n,3,H,W)
        return self.scale*(pixels.mean((2, 3)) + .1)

    def encode_text(self, numbers): # (n,3)
        return numbers.float() + 1


def own_clip(scale=1.):
    def pixels(image):
        return torch.from_numpy(np.array(image.resize((4, 4)))).permute(2, 0, 1)/255

    def tokens(texts):
        return torch.tensor([[len(text)]*3 for text in texts])

    return wrap_clip(Mean(scale), pixels, tokens)


def twelve_pictures(folder, damaged=0):
    "Names of twelve pictures; the first `damaged` of them cannot be read"
    folder.mkdir()
    names = [f'{i:02d}.png' for i in range(12)]
    for i, name in enumerate(names):
        Image.new('RGB', (8, 8), (20*i, 0, 0)).save(folder/name)
        if i < damaged:
            (folder/name).write_bytes(b'no picture')
    return names


def test_too_many_lost_pictures_stop_and_may_be_allowed(tmp_path):
    names = twelve_pictures(tmp_path/'[x] pics', damaged=3)
    asked = own_clip(), tmp_path/'[x] pics', names, ['a'], tmp_path/'features'
    with pytest.raises(ValueError, match='3 of 12 images cannot be read'):
        encode_files(*asked)
    assert encode_files(*asked, most_lost=1.) == names[:3]


def test_a_clip_that_gives_no_numbers_leaves_no_features(tmp_path):
    names = twelve_pictures(tmp_path/'pictures')
    clip = own_clip(float('nan'))
    with pytest.raises(FloatingPointError, match='no numbers'):
        encode_files(clip, tmp_path/'pictures', names, ['a'], tmp_path/'features')
    assert not list((tmp_path/'features').glob('*.safetensors'))


def test_features_keep_half_precision(tmp_path):
    names = twelve_pictures(tmp_path/'pictures')
    encode_files(own_clip(), tmp_path/'pictures', names, ['a'], tmp_path/'features')
    tensors, _ = files.read_tensors(tmp_path/'features'/'images-00000.safetensors')
    assert tensors['features'].dtype == torch.half


def test_two_batches_of_pictures_are_in_memory_and_no_more(monkeypatch):
    asked = []

    class Pool(photographs.ThreadPoolExecutor):
        def submit(self, function, number):
            asked.append(number)
            return super().submit(function, number)

    monkeypatch.setattr(photographs, 'ThreadPoolExecutor', Pool)
    pictures = [(number, torch.zeros(1)) for number in range(40)]
    monkeypatch.setattr(photographs, '_collate', list)
    for number, batch in enumerate(photographs._batches(pictures, 4, workers=2)):
        assert batch == pictures[4*number:4*number+4]
        assert len(asked) <= 4*(number + 2)
    assert asked == list(range(40))


def test_nothing_is_written_at_home(tmp_path):
    "The CLIP that comes with the package is read, and leaves no file elsewhere"
    program = 'from hyperclip_nb.vision.clip import load_clip\n'
    program += 'load_clip().encode_text(["a red star"])'
    env = os.environ | dict(HOME=str(tmp_path), PYTHONPATH=str(root))
    for name in 'XDG_CACHE_HOME', 'HF_HOME', 'TORCH_HOME':
        env.pop(name, None)
    subprocess.run([sys.executable, '-c', program], env=env, check=True)
    assert not list(tmp_path.rglob('*'))


# ---- tasks and questions


def test_the_smallest_share_leaves_one_description():
    assert has_descriptor(5, .01, seed=0).sum() == 1


@pytest.mark.parametrize('extreme', EXTREMES)
def test_each_extreme_is_the_thing_that_one_sees(extreme):
    things = [ # shape, size and place, as one would say
        ('heart', 'small', 'left'), ('star', 'large', 'bottom'),
        ('ring', 'medium', 'top right'),
    ]
    expected = dict(
        largest='star', smallest='heart', leftmost='heart', rightmost='ring',
        highest='ring', lowest='star',
    )
    objects = [
        [SHAPES.index(shape), 0, 0, SIZES.index(size), PLACES.index(place)]
        for shape, size, place in things
    ]
    scene = Scenes(np.array([objects]), np.zeros(1, int), np.zeros((1, 3, 3)))
    asked = parse(f'What shape is the {extreme} thing?')
    answer, = true_answers(asked, scene)
    assert possible_answers(asked.ask)[answer] == expected[extreme]


# ---- nothing harmful


@pytest.mark.parametrize('path', code, ids=lambda path: str(path.relative_to(root)))
def test_no_pickle_is_written_or_read(path):
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [getattr(node, 'module', None), *(name.name for name in node.names)]
            assert not {'pickle', 'cloudpickle', 'joblib', 'dill'} & set(names)
        if isinstance(node, ast.keyword):
            assert node.arg not in ('allow_pickle', 'weights_only')
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert text not in ('torch.save', 'torch.load')
            assert node.attr not in ('to_pickle', 'read_pickle')


# ---- words in files, and words that look alike


def test_text_is_read_as_utf8_in_any_locale(tmp_path):
    (tmp_path/'a.json').write_text('{"answer": "grün"}', encoding='utf-8')
    program = 'from hyperclip_nb.data.files import read_json as read\n'
    program += 'print(ascii(read("a.json")))'
    env = os.environ | dict(LC_ALL='C', PYTHONCOERCECLOCALE='0', PYTHONUTF8='0')
    env['PYTHONPATH'] = str(root)
    said = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, env=env, capture_output=True,
        text=True, check=True,
    )
    assert said.stdout.strip() == ascii(dict(answer='grün'))


def test_answers_that_a_clip_cannot_tell_apart_are_said_once(tmp_path):
    "To this CLIP two texts of one length are the same"
    pairs = np.array([[0, 0], [1, 1]])
    task = Task('What is it?', 'it is {}', ('a cat', 'a dog', 'nothing'), pairs, pairs)
    names = twelve_pictures(tmp_path/'pictures')
    texts, folder = all_texts([task]), tmp_path/'features'
    encode_files(own_clip(), tmp_path/'pictures', names, texts, folder)
    with pytest.warns(UserWarning) as said:
        _warn_alike([task], folder, names, 'own')
    line, = [str(warning.message) for warning in said]
    assert line.startswith('1 of 1 questions have answers that are the same to')
    assert 'such as "a cat" and "a dog" of "What is it?"' in line


def test_one_training_task_is_too_few():
    part_files = dict(train='train.json', valid='valid.json', test='test.json')
    found = {part: {part: {}} for part in part_files}
    with pytest.raises(ValueError, match='train.json holds 1 tasks, too few'):
        _check_parts(Path('tasks'), part_files, found)


def test_a_training_of_no_steps_is_one_line():
    mu = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match='needs one step or more, not 0'):
        train_hyperldm(mu, torch.zeros_like(mu), torch.eye(4), steps=0, hidden=(8,))
