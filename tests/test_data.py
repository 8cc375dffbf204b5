"""Data sets of files: tasks by the rules, features of any CLIP, and accuracies for all
images and for unseen ones."""
import json
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.command import cli_data
from hyperclip_nb.data.metavqa import (
    VQA, build_tasks, load_metavqa, save_metavqa, split_questions, stats,
    unseen_queries,
)
from hyperclip_nb.data.statements import statement
from hyperclip_nb.data.batches import all_texts
from hyperclip_nb.data.tasks import Task
from hyperclip_nb.data.vqa import FILES, read_vqa, write_sample
from hyperclip_nb.generators.hvae import HVAE
from hyperclip_nb.generators.maml import HNet
from hyperclip_nb.lab.experiments import read_results
from hyperclip_nb.lab.runs import Run
from hyperclip_nb.lab.stages import PRESETS, add_preset, override, preset
from hyperclip_nb.lab.tables import table1
from hyperclip_nb.language.ddpm import linear_schedule
from hyperclip_nb.language.noise_net import NoiseNet
from hyperclip_nb.vision.clip import load_clip
from hyperclip_nb.vision.photographs import (
    drop_images, encode_files, image_ids, open_features,
)


@pytest.fixture(scope='module')
def vqa(tmp_path_factory):
    "A folder with a small data set in the layout of VQA v2"
    folder = tmp_path_factory.mktemp('vqa')
    write_sample(folder, tasks=60, seed=3)
    return folder


@pytest.fixture(scope='module')
def small_clip(tmp_path_factory):
    "A small open_clip model with random weights: its name, and the file of its weights"
    folder = tmp_path_factory.mktemp('clip')
    vision = dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16)
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)
    config = dict(embed_dim=32, vision_cfg=vision, text_cfg=text)
    (folder/'test-small.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    weights = open_clip.create_model('test-small').state_dict()
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(weights, folder/'weights.safetensors')
    return 'test-small', folder/'weights.safetensors'


def all_tasks(data):
    "Training and test tasks in one list"
    return [task for tasks in data.tasks.values() for task in tasks]


def texts_of(data):
    "All texts that features are needed of"
    return all_texts(all_tasks(data))


def copy_questions(vqa, folder):
    "Copy the files of questions and annotations, not the images"
    for names in FILES.values():
        for name in names:
            (folder/name).write_text((vqa/name).read_text())


# --- statements and rules ---

@given(st.text())
@settings(max_examples=300, deadline=None)
def test_every_question_becomes_a_statement_with_one_gap(text):
    prompt = statement(text)
    assert prompt.count('{}') == 1
    assert prompt.format('red').count('{') == 0
    assert '  ' not in prompt


def random_questions(seed, n):
    "A table as `read_vqa` gives it: few images, some answers rare, some kinds unwanted"
    rng = np.random.default_rng(seed)
    rows = []
    for q in range(n):
        for _ in range(rng.integers(10, 120)):
            image = f'image{rng.integers(60)}'
            answer = 'abcdefgh'[min(rng.geometric(.4) - 1, 7)]
            kind = rng.choice(['other', 'number', 'yes/no'], p=[.8, .15, .05])
            rows.append((f'What is nr {q}?', image, answer, kind))
    return pd.DataFrame(rows, columns=['question', 'image', 'answer', 'kind'])


def check_task(task, images, answer):
    "The rules of one task; `answer` is what was said first of each image"
    assert len(task.pairs) > 20
    assert len(task.answers) > 1
    assert list(task.answers) == sorted(task.answers)
    pairs = {images[i]: task.answers[a] for i, a in task.pairs.tolist()}
    assert pairs == answer[answer.isin(task.answers)].to_dict()
    count = answer.value_counts()
    assert set(task.answers) == set(count[count > 1].index)
    for k, name in enumerate(task.answers):
        assert (task.support[:, 1] == k).sum() == round(.7*count[name])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 9))
def test_tasks_keep_the_rules(seed, questions):
    asked = random_questions(seed, questions)
    try:
        data = build_tasks(asked)
    except ValueError:  # too few tasks
        return
    wanted = asked[asked.kind != 'yes/no']
    first = wanted.drop_duplicates(['question', 'image'])
    for task in all_tasks(data):
        of_task = first[first.question == task.question]
        check_task(task, data.images, of_task.set_index('image').answer)
    kept = [task.question for task in all_tasks(data)]
    order = [q for q in first.question.drop_duplicates() if q in kept]
    n_train = len(split_questions(order)[0])
    random.Random(2021).shuffle(order)
    assert kept == order
    assert len(data.tasks['train']) == round(.7*len(order)) == n_train


def test_text_of_any_language_survives(tmp_path, vqa):
    data = build_tasks(read_vqa(vqa))
    task = data.tasks['test'][0]
    n = len(task.answers)
    answers = 'grün', '红', 'q"uote'
    answers = answers[:n] if n <= 3 else tuple(f'é{i}' for i in range(n))
    question, prompt = '¿De qué color es el ☆?', 'el ☆ es {}'
    strange = Task(question, prompt, answers, task.support, task.query, 'x')
    tasks = dict(train=data.tasks['train'], test=[strange])
    save_metavqa(VQA(tasks, data.images), tmp_path)
    back = load_metavqa(tmp_path).tasks['test'][0]
    assert (back.question, back.prompt, back.answers) == (question, prompt, answers)
    assert '☆' in (tmp_path/'meta_test.json').read_text()


# --- files that are broken ---

def first_question_twice(content):
    questions = content['questions']
    return content | dict(questions=questions + questions[:1])


def misspelt_key(content):
    return {'annotation': content['annotations']}


def without_answers(content):
    rows = []
    for row in content['annotations']:
        others = row.keys() - {'multiple_choice_answer'}
        rows.append({key: row[key] for key in others})
    return dict(annotations=rows)


def other_images(content):
    rows = content['annotations']
    return dict(annotations=[row | dict(image_id=row['image_id'] + 1) for row in rows])


def in_a_list(content):
    return [content]


def answers_as_numbers(content):
    rows = content['annotations']
    return dict(annotations=[row | dict(multiple_choice_answer=7) for row in rows])


def numbers_as_letters(content):
    rows = content['questions']
    return dict(questions=[row | dict(question_id='a') for row in rows])


BROKEN = [  # 0: questions, 1: annotations; what is done to them; what is said
    (0, first_question_twice, 'question_id .* occurs twice'),
    (1, misspelt_key, 'no list "annotations"'),
    (1, without_answers, '"multiple_choice_answer" of entry 0 is missing'),
    (1, other_images, '"image_id" of question_id'),
    (0, in_a_list, 'object in braces'),
    (1, answers_as_numbers, 'not a text'),
    (0, numbers_as_letters, 'not a whole number'),
]


@pytest.mark.parametrize('which, change, says', BROKEN, ids=[b[2] for b in BROKEN])
def test_broken_files_are_named(tmp_path, vqa, which, change, says):
    copy_questions(vqa, tmp_path)
    file = tmp_path/FILES['val2014'][which]
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=f'(?s){file.name}.*{says}'):
        read_vqa(tmp_path)


def test_rows_that_cannot_be_used_are_counted(tmp_path, vqa):
    copy_questions(vqa, tmp_path)
    file = tmp_path/FILES['train2014'][1]
    annotations = json.loads(file.read_text())['annotations']
    file.write_text(json.dumps(dict(annotations=annotations[5:])))
    missing = '5 questions without an annotation in train2014'
    with pytest.warns(UserWarning, match=missing):
        asked = read_vqa(tmp_path)
    assert len(asked) == len(read_vqa(vqa)) - 5
    asked.loc[:3, 'answer'] = ' \t'
    with pytest.warns(UserWarning, match='4 rows with an empty answer'):
        build_tasks(asked)


# --- from files to a table ---

def copy_photos(vqa, folder, lost):
    "All images in one folder this time; of the lost ones the first is damaged"
    folder.mkdir()
    for path in vqa.rglob('*.jpg'):
        (folder/path.name).write_bytes(path.read_bytes())
    damaged, *missing = lost
    (folder/f'{damaged}.jpg').write_bytes(b'no picture')
    for name in missing:
        (folder/f'{name}.jpg').unlink()


def without_images(tasks, lost):
    "What `drop_images` leaves, without its warnings"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return drop_images(tasks, lost)


def test_any_clip_from_files_to_a_table(
    tmp_path, vqa, small_clip, monkeypatch, hyperclip
):
    monkeypatch.chdir(tmp_path)
    add_preset(
        'tiny', 'smoke', multitask=dict(epochs=1), weights=dict(steps=3),
        hvae=dict(steps=30), hyperldm=dict(steps=30), few_shot=dict(steps=2),
    )
    name, weights = small_clip
    cpu = '--device', 'cpu'

    code, _, _ = hyperclip('data', 'build', '--vqa', vqa, '--to', 'tasks')
    assert code == 0
    data = load_metavqa('tasks')
    test = data.tasks['test']
    lost = [data.images[int(i)] for i in test[0].pairs[:, 0]]
    copy_photos(vqa, tmp_path/'photos', lost)

    features = 'data', 'features', 'tasks', '--images', 'photos'
    model = '--model', name, '--pretrained', weights
    compared = []
    monkeypatch.setattr(cli_data, '_warn_alike', lambda *asked: compared.append(asked))
    code, out, err = hyperclip(*features, *model, '--workers', 0, *cpu)
    assert code == 0 and len(compared) == 1
    for image in lost:
        assert f'unreadable: {image}' in err
    assert f'"{test[0].question}" is left out' in err
    assert f'{len(lost)} cannot be read' in out

    grid = '--methods', 'clip,multitask,hvae-hyperldm-ours', '--gamma', '1.5'
    where = '--data', 'tasks', '--preset', 'tiny', '--out', 'run'
    code, out, err = hyperclip('reproduce', *where, *grid, *cpu)
    assert code == 0, err
    results = read_results('run')
    kept = without_images(test, image_ids(data.images, lost))
    assert len(results['test'][0]) == len(kept) < len(test)
    assert '100%, unseen images' in table1(results)
    assert results['config']['clip']['name'] == f'{name}:{weights}'
    assert '--data' in results['command']

    code, _, err = hyperclip(*features, '--model', 'tiny', *cpu)
    assert code == 2
    assert 'by another CLIP' in err
    assert 'images-00000.safetensors' in err
    run = Run.open('run')
    assert run.clip.fingerprint == results['config']['clip']['fingerprint']
    assert run.adapter.width == 32


def test_unseen_images_are_those_that_training_never_showed(tmp_path, vqa):
    data = build_tasks(read_vqa(vqa))
    test = data.tasks['test']
    shown = set()
    for task in data.tasks['train']:
        shown.update(task.pairs[:, 0].tolist())
    ends = np.cumsum([len(task.query) for task in test])
    unseen = np.split(unseen_queries(data.tasks), ends[:-1])
    for task, new in zip(test, unseen):
        assert new.tolist() == [i not in shown for i in task.query[:, 0].tolist()]

    save_metavqa(data, tmp_path)
    features = tmp_path/'features'
    encode_files(load_clip(), vqa, data.images, texts_of(data), features)
    of_run = Run(preset('smoke'), 'smoke', data=tmp_path).data['test']
    assert of_run.size['unseen'].tolist() == [int(new.sum()) for new in unseen]
    assert (of_run.parts['unseen'] <= of_run.parts['query']).all()
    with_unseen = sum(new.any() for new in unseen)
    assert stats(data).test['tasks with unseen queries'] == with_unseen


# --- features that are stopped ---

ENCODE = '''
import sys
import torch
torch.set_num_threads(1)
from hyperclip_nb.data.metavqa import load_metavqa
from hyperclip_nb.data.batches import all_texts
from hyperclip_nb.vision.clip import load_clip
from hyperclip_nb.vision.photographs import encode_files
_, tasks, images, out = sys.argv
data = load_metavqa(tasks)
texts = all_texts([task for part in data.tasks.values() for task in part])
encode_files(load_clip(), images, data.images, texts, out, shard=100)
'''


def start_encoding(tasks, images, out):
    "A process that makes features, which can be killed"
    folders = map(str, (tasks, images, out))
    return subprocess.Popen([sys.executable, '-c', ENCODE, *folders])


def kill_after_two_shards(process, folder):
    end = time.time() + 120
    while process.poll() is None and time.time() < end:
        if len(list(folder.glob('images-*'))) >= 2:
            break
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_killed_features_go_on(tmp_path, vqa):
    data = build_tasks(read_vqa(vqa))
    save_metavqa(data, tmp_path)
    whole, killed = tmp_path/'whole', tmp_path/'killed'
    assert start_encoding(tmp_path, vqa, whole).wait(300) == 0
    kill_after_two_shards(start_encoding(tmp_path, vqa, killed), killed)
    with pytest.raises(ValueError, match='holds no features'):
        open_features(killed, data.images, texts_of(data))
    assert start_encoding(tmp_path, vqa, killed).wait(300) == 0
    for path in whole.glob('*.safetensors'):
        again = load_file(killed/path.name)['features']
        assert torch.equal(load_file(path)['features'], again)


# --- sizes ---

def n_params(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_the_paper_preset_has_the_papers_sizes():
    paper = PRESETS['paper']
    hvae_settings, ldm_settings = paper['paper_hvae'], paper['paper_hyperldm']
    latent = hvae_settings['latent']
    adapter = Adapter(768, **paper['adapter'])
    assert adapter.n_weights == 394_240
    with torch.device('meta'):
        assert round(n_params(HNet(adapter.n_weights))/1e6, 1) == 101.3
        hvae = HVAE(adapter.n_weights, latent, hvae_settings['hidden'])
        net = NoiseNet(latent, 768, ldm_settings['hidden'])
    assert round(n_params(hvae)/1e6) == 203
    assert n_params(net) == 567_866_080 # as in the authors' code
    assert [layer.out_features for layer in hvae.decoder[:-1:2]] == [512, 256]
    assert len(linear_schedule()) == 350 == paper['paper_sampling']['steps']


def test_presets_change_only_what_they_say():
    default = PRESETS['default']
    assert json.dumps(default) == json.dumps(override(preset('default')))
    assert PRESETS['paper']['world'] == default['world']
