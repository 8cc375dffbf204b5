"Small promises, each of which a planted fault once broke without a test that failed."
import ast
import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyperclip_nb.command import cli
from hyperclip_nb.command.cli_data import _warn_alike
from hyperclip_nb.data import files
from hyperclip_nb.data.batches import all_texts
from hyperclip_nb.data.images import as_rgb
from hyperclip_nb.data.metavqa import _check_parts
from hyperclip_nb.data.questions import EXTREMES, parse, possible_answers, true_answers
from hyperclip_nb.data.scenes import PLACES, SHAPES, SIZES, Scenes
from hyperclip_nb.data.tasks import Task, has_descriptor
from hyperclip_nb.language.hyperldm import train_hyperldm
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


# ---- what is said


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
