"""What must be true whatever the numbers are.

Order, padding, batches, threads and files change no result, and each question of a
world has one right answer."""
import re
import string
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperclip_nb import Network, Writer
from hyperclip_nb.base.adapt import adapt_all, evaluate
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.data import scenes as names
from hyperclip_nb.data.batches import Features, TaskData, all_texts
from hyperclip_nb.data.files import (
    read_sealed, read_tensors, sealed, write_json, write_tensors,
)
from hyperclip_nb.data.metavqa import VQA, load_metavqa, save_metavqa
from hyperclip_nb.data.tasks import Task
from hyperclip_nb.data.world import make_world
from hyperclip_nb.vision.clip import load_clip

seeds = st.integers(0, 2**32 - 1)
few = settings(max_examples=10, deadline=None)
CLOSE = dict(rtol=1e-4, atol=1e-5)  # sums in another order
D, H = 12, 3  # width of features, hidden units


# ---- tasks of random features


def random_tasks(rng, n=7):
    "Tasks of different sizes about images that they share"
    tasks = []
    for number in range(n):
        n_answers, size = rng.integers(2, 6), rng.integers(6, 30)
        shown = rng.choice(60, size, replace=False)
        pairs = np.stack([shown, rng.integers(0, n_answers, size)], 1)
        answers = tuple(f'answer {number}.{i}' for i in range(n_answers))
        half = size//2
        tasks.append(Task(
            f'question {number}', 'it is {}', answers, pairs[:half], pairs[half:], '',
        ))
    return tasks


def random_features(tasks, rng):
    "Features of norm √D for all their images and texts"
    texts = all_texts(tasks)
    def scaled(n):
        x = torch.from_numpy(rng.standard_normal((n, D))).float()
        return torch.nn.functional.normalize(x, dim=1)*D**.5
    return Features(scaled(60), scaled(len(texts)), texts)


def adapted(tasks, features, W):
    "Weights after a few steps on the support sets, and accuracies on the query sets"
    data = TaskData(tasks, features)
    adapter = Adapter(D, H, temperature=10.)
    out = adapt_all(adapter, W, data, data.is_support, steps=5, lr=.1)
    return out, evaluate(adapter, out, data)


def start(rng):
    "Weights to begin with"
    n = Adapter(D, H, temperature=10.).n_weights
    return torch.from_numpy(rng.standard_normal(n)).float()*.3


def example(seed):
    rng = np.random.default_rng(seed)
    tasks = random_tasks(rng)
    return rng, tasks, random_features(tasks, rng), start(rng)


@few
@given(seeds)
def test_the_order_of_tasks_changes_nothing(seed):
    rng, tasks, features, W = example(seed)
    order = rng.permutation(len(tasks))
    weights, accuracies = adapted(tasks, features, W)
    others, other_accuracies = adapted([tasks[i] for i in order], features, W)
    torch.testing.assert_close(others, weights[order], **CLOSE)
    np.testing.assert_allclose(other_accuracies, accuracies[order], atol=1e-4)


@few
@given(seeds)
def test_other_tasks_and_their_padding_change_nothing(seed):
    _, tasks, features, W = example(seed)
    weights, accuracies = adapted(tasks, features, W)
    for number, task in enumerate(tasks):
        alone, accuracy = adapted([task], features, W)
        torch.testing.assert_close(alone[0], weights[number], **CLOSE)
        np.testing.assert_allclose(accuracy[0], accuracies[number], atol=1e-4)


@few
@given(seeds)
def test_the_order_of_examples_and_answers_changes_nothing(seed):
    rng, tasks, features, W = example(seed)

    def mixed(task):
        new = rng.permutation(len(task.answers))  # new place -> old place
        place = np.argsort(new)

        def shuffled(pairs):
            pairs = rng.permutation(pairs)
            return np.stack([pairs[:, 0], place[pairs[:, 1]]], 1)

        answers = tuple(task.answers[i] for i in new)
        support, query = shuffled(task.support), shuffled(task.query)
        return replace(task, answers=answers, support=support, query=query)

    weights, accuracies = adapted(tasks, features, W)
    others, other_accuracies = adapted([mixed(t) for t in tasks], features, W)
    torch.testing.assert_close(others, weights, **CLOSE)
    np.testing.assert_allclose(other_accuracies, accuracies, atol=1e-4)


@few
@given(seeds)
def test_threads_change_no_more_than_rounding(seed):
    _, tasks, features, W = example(seed)
    before = torch.get_num_threads()
    weights, accuracies = adapted(tasks, features, W)
    torch.set_num_threads(2)
    try:
        others, other_accuracies = adapted(tasks, features, W)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(others, weights, **CLOSE)
    np.testing.assert_allclose(other_accuracies, accuracies, atol=1e-4)


# ---- batches


@pytest.fixture(scope='module')
def clip():
    return load_clip()


@pytest.fixture(scope='module')
def writer():
    return Writer.from_pretrained()


@few
@given(seed=seeds, batch=st.integers(1, 9))
def test_batches_change_no_vector(clip, seed, batch):
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (9, 96, 96, 3), dtype=np.uint8)
    words = ['red', 'star', 'large', 'thing', 'the', 'is']
    texts = [' '.join(rng.choice(words, rng.integers(1, 9))) for _ in range(9)]
    parts = [clip.encode_image(pictures[i:i+batch]) for i in range(0, 9, batch)]
    torch.testing.assert_close(torch.cat(parts), clip.encode_image(pictures), **CLOSE)
    together = clip.encode_text(texts)
    torch.testing.assert_close(clip.encode_text(texts, batch), together, **CLOSE)


def test_questions_are_written_alike_alone_and_together(writer):
    questions = 'What color is the star?', 'Where is the ring?', 'How big is the ring?'
    together = writer.write(questions, seed=3)
    for question, network in zip(questions, together):
        alone = writer.write(question, seed=3)
        torch.testing.assert_close(alone.W, network.W, **CLOSE)


# ---- files


DTYPES = torch.float32, torch.float16, torch.int64, torch.bool, torch.bfloat16
shapes = st.lists(st.integers(0, 4), max_size=3)
letters = st.text(string.ascii_letters, min_size=1)
kinds = st.tuples(shapes, st.sampled_from(DTYPES))
tensor_facts = st.dictionaries(letters, kinds, max_size=4)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12,
)


@few
@given(facts=tensor_facts, about=st.dictionaries(st.text(), st.text()), seed=seeds)
def test_tensors_come_back_as_they_were(tmp_path_factory, facts, about, seed):
    about.pop('sha256', None)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (4*torch.randn(shape, generator=generator)).to(dtype)
        for name, (shape, dtype) in facts.items()
    }
    path = tmp_path_factory.mktemp('tensors')/'a.safetensors'
    write_tensors(path, tensors, about)
    found, metadata = read_tensors(path)
    assert metadata == about and found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and torch.equal(found[name], x)


@few
@given(content=st.dictionaries(st.text(), json_values))
def test_json_comes_back_as_it_was(tmp_path_factory, content):
    content.pop('sha256', None)
    path = tmp_path_factory.mktemp('json')/'a.json'
    write_json(path, sealed(content))
    assert read_sealed(path) == content


words = st.text(st.characters(exclude_categories=('Cs', 'Cc')), min_size=1)
words = words.filter(lambda text: text.strip() and '{' not in text and '}' not in text)


@few
@given(seed=seeds, said=st.lists(words, min_size=8, max_size=8, unique=True))
def test_tasks_come_back_as_they_were(tmp_path_factory, seed, said):
    rng = np.random.default_rng(seed)
    tasks = [
        replace(task, question=text, concept=text)
        for task, text in zip(random_tasks(rng, n=8), said)
    ]
    shown = sorted({i for task in tasks for i in task.pairs[:, 0].tolist()})
    place = {old: new for new, old in enumerate(shown)}

    def moved(pairs):
        return np.array([(place[i], a) for i, a in pairs.tolist()])

    tasks = [replace(t, support=moved(t.support), query=moved(t.query)) for t in tasks]
    images = [f'image {i:02d}' for i in range(len(shown))]
    folder = tmp_path_factory.mktemp('tasks')
    save_metavqa(VQA(dict(train=tasks[:5], test=tasks[5:]), images), folder)
    found = load_metavqa(folder)
    assert found.images == images
    again = found.tasks['train'] + found.tasks['test']
    for task, other in zip(tasks, again):
        assert (task.question, task.prompt) == (other.question, other.prompt)
        assert task.answers == other.answers
        assert np.array_equal(task.support, other.support)
        assert np.array_equal(task.query, other.query)


@few
@given(seed=seeds, samples=st.integers(1, 3), gamma=st.floats(0, 3))
def test_networks_come_back_as_they_were(
    writer, tmp_path_factory, seed, samples, gamma,
):
    network = writer.write('What color is the star?', gamma, samples, seed)
    path = tmp_path_factory.mktemp('network')/'a.safetensors'
    network.save(path)
    again = Network.load(path)
    assert torch.equal(again.W, network.W)
    assert again.about == network.about


# ---- an independent solver: from the words of a question, and things by their names


LEADS = ( # what stands before the thing that is asked about, and what is asked
    (r'what color is the background behind |which background color is behind |'
     r'what is the background color behind ', 'background'),
    (r'how many |what is the number of ', 'count'),
    (r'what color is |what is the color of |which color does ', 'color'),
    (r'what shape is |what is the shape of |which shape does ', 'shape'),
    (r'what pattern does |what is the pattern of |which pattern is on ', 'pattern'),
    (r'what size is |how big is |what is the size of ', 'size'),
    (r'where is |what is the position of |in which place is ', 'place'),
    (r'what is |which object is |what can you say about ', 'thing'),
)
BEYOND = {'left of': (0, -1), 'right of': (0, 1), 'above': (1, -1), 'below': (1, 1)}
FURTHEST = dict( # which of size, column, row is looked at, and its sign
    largest=(0, 1), smallest=(0, -1), leftmost=(1, -1), rightmost=(1, 1),
    highest=(2, -1), lowest=(2, 1),
)


def by_name(scene):
    "The things of a scene as dicts of words"
    things = []
    for shape, color, pattern, size, place in scene.tolist():
        if shape >= 0:
            things.append(dict(
                shape=names.SHAPES[shape], color=list(names.COLORS)[color],
                pattern=names.PATTERNS[pattern], size=names.SIZES[size],
                place=names.PLACES[place], at=(place % 3, place//3), rank=size,
            ))
    return things


def singular(word):
    return {'crosses': 'cross'}.get(word, word if word == 'cross' else word.rstrip('s'))


def fitting(words, things):
    "The things that a description such as 'small red stars' fits"
    words, _, place = words.removeprefix('the ').partition(' at the ')
    found = []
    for thing in things:
        said = {*(thing[key] for key in ('shape', 'color', 'pattern', 'size')), 'thing'}
        right_place = not place or thing['place'] == place
        if right_place and all(w in said or singular(w) in said for w in words.split()):
            found.append(thing)
    return found


def meant(words, things):
    "What 'the star', 'the thing above the star' or 'the largest thing' means"
    for side, (axis, sign) in BEYOND.items():
        if words.startswith(f'the thing {side} '):
            found = fitting(words.removeprefix(f'the thing {side} '), things)
            if len(found) != 1:
                return []
            here = found[0]['at'][axis]
            return [t for t in things if sign*(t['at'][axis] - here) > 0]
    for word, (what, sign) in FURTHEST.items():
        if words == f'the {word} thing':
            values = [sign*(t['rank'], *t['at'])[what] for t in things]
            return [t for t, v in zip(things, values) if v == max(values)]
    return fitting(words, things)


def solve(question, scene, background):
    "All that could be answered to a question about a scene"
    text = question.lower().rstrip('?')
    things = by_name(scene)
    for lead, ask in LEADS:
        match = re.match(lead, text)
        if not match:
            continue
        words = text[match.end():]
        words = re.sub(r' (have|are there|can you see)$', '', words)
        found = meant(words, things)
        if ask == 'count':
            return [['none', 'one', 'two', 'three'][len(found)]]
        if ask == 'background':
            return [list(names.BACKGROUNDS)[background]]*len(found)
        if ask == 'thing':
            return [f'{thing["color"]} {thing["shape"]}' for thing in found]
        return [thing[ask] for thing in found]


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), split=st.sampled_from(['concept', 'question']))
def test_each_question_has_one_right_answer(seed, split):
    world = make_world(seed, (60, 5, 5), (1500, 900, 900), split)
    rng = np.random.default_rng(seed)
    for task in sum(world.tasks.values(), []):
        for image, label in rng.permutation(task.pairs)[:12]:
            scene = world.scenes.objects[image]
            found = solve(task.question, scene, world.scenes.background[image])
            assert found == [task.answers[label]], (task.question, by_name(scene))
