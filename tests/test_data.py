"Data sets of files: tasks by the rules, features of any CLIP, one accuracy for all images and one for unseen ones."
import json, random, signal, subprocess, sys, time, warnings
import numpy as np, open_clip, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from hyperclip_nb.lab import experiments
from hyperclip_nb.base.adapter import Adapter
from hyperclip_nb.lab.runs import PRESETS, Run, override
from hyperclip_nb.lab.tables import table1
from hyperclip_nb.vision.photographs import (
    drop_images, encode_files, image_ids, open_features,
)
from hyperclip_nb.generators.hvae import HVAE
from hyperclip_nb.language.ddpm import linear_schedule
from hyperclip_nb.language.noise_net import NoiseNet
from hyperclip_nb.generators.maml import HNet
from hyperclip_nb.data.vqa import FILES, read_vqa, write_sample
from hyperclip_nb.data.metavqa import (
    VQA, build_tasks, load_metavqa, save_metavqa, split_questions, stats,
    unseen_queries,
)
from hyperclip_nb.data.statements import statement
from hyperclip_nb.data.batches import all_texts
from test_cli import hyperclip

few = settings(max_examples=30, deadline=None)


@pytest.fixture(scope='module')
def vqa(tmp_path_factory):
    folder = tmp_path_factory.mktemp('vqa'); write_sample(folder, tasks=60, seed=3)
    return folder


@pytest.fixture(scope='module')
def small_clip(tmp_path_factory):
    "A small model of open_clip with random weights: its name, and the file of its weights"
    folder = tmp_path_factory.mktemp('clip')
    (folder/'test-small.json').write_text(json.dumps(dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
                                                          text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1))))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    save_file({k: v.contiguous() for k, v in open_clip.create_model('test-small').state_dict().items()}, folder/'weights.safetensors')
    return 'test-small', folder/'weights.safetensors'


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_every_question_becomes_a_statement_with_one_gap(text):
    prompt = statement(text)
    assert prompt.count('{}') == 1 and prompt.format('red').count('{') == 0 and '  ' not in prompt


@few
@given(st.integers(0, 10_000), st.integers(3, 9))
def test_tasks_keep_the_rules(seed, questions):
    rng = np.random.default_rng(seed)
    asked = pd.DataFrame([(f'What is nr {q}?', f'image{rng.integers(60)}', 'abcdefgh'[min(rng.geometric(.4) - 1, 7)], rng.choice(['other', 'number', 'yes/no'], p=[.8, .15, .05]))
                          for q in range(questions) for _ in range(rng.integers(10, 120))], columns=['question', 'image', 'answer', 'kind'])
    try: made = build_tasks(asked)
    except ValueError: return
    first = asked[asked.kind != 'yes/no'].drop_duplicates(['question', 'image'])
    for t in [t for ts in made.tasks.values() for t in ts]:
        rows = first[first.question == t.question].set_index('image').answer
        assert len(t.pairs) > 20 and len(t.answers) > 1 and list(t.answers) == sorted(t.answers)
        assert {made.images[i]: t.answers[a] for i, a in t.pairs.tolist()} == rows[rows.isin(t.answers)].to_dict()
        count = rows.value_counts()
        assert set(t.answers) == set(count[count > 1].index)
        for k, a in enumerate(t.answers): assert (t.support[:, 1] == k).sum() == round(.7*count[a])
    kept = [t.question for ts in made.tasks.values() for t in ts]
    order = [q for q in first.question.drop_duplicates() if q in kept]
    random.Random(2021).shuffle(order)
    assert kept == order and len(made.tasks['train']) == round(.7*len(order)) == len(split_questions(order)[0])


def test_text_of_any_language_survives(tmp_path, vqa):
    data = build_tasks(read_vqa(vqa))
    t = data.tasks['test'][0]
    strange = t.__class__('¿De qué color es el ☆?', 'el ☆ es {}', ('grün', '红', 'q"uote')[:len(t.answers)] if len(t.answers) <= 3 else tuple(f'é{i}' for i in range(len(t.answers))), t.support, t.query, 'x')
    save_metavqa(VQA(dict(train=data.tasks['train'], test=[strange]), data.images), tmp_path)
    back = load_metavqa(tmp_path).tasks['test'][0]
    assert (back.question, back.prompt, back.answers) == (strange.question, strange.prompt, strange.answers)
    assert '☆' in (tmp_path/'meta_test.json').read_text()


BROKEN = [(0, lambda q: q | dict(questions=q['questions'] + q['questions'][:1]), 'question_id .* occurs twice'), (1, lambda a: {'annotation': a['annotations']}, 'no list "annotations"'),
          (1, lambda a: dict(annotations=[{k: v for k, v in x.items() if k != 'multiple_choice_answer'} for x in a['annotations']]), '"multiple_choice_answer" of entry 0 is missing'),
          (1, lambda a: dict(annotations=[x | dict(image_id=x['image_id'] + 1) for x in a['annotations']]), '"image_id" of question_id'), (0, lambda q: [q], 'object in braces'),
          (1, lambda a: dict(annotations=[x | dict(multiple_choice_answer=7) for x in a['annotations']]), 'not a text'), (0, lambda q: dict(questions=[x | dict(question_id='a') for x in q['questions']]), 'not a whole number')]

@pytest.mark.parametrize('which, change, says', BROKEN, ids=[b[2] for b in BROKEN])
def test_broken_files_are_named(tmp_path, vqa, which, change, says):
    for files in FILES.values():
        for name in files: (tmp_path/name).write_text((vqa/name).read_text())
    file = tmp_path/FILES['val2014'][which]
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=f'(?s){file.name}.*{says}'): read_vqa(tmp_path)


def test_rows_that_cannot_be_used_are_counted(tmp_path, vqa):
    for files in FILES.values():
        for name in files: (tmp_path/name).write_text((vqa/name).read_text())
    q, a = (json.loads((tmp_path/name).read_text()) for name in FILES['train2014'])
    (tmp_path/FILES['train2014'][1]).write_text(json.dumps(dict(annotations=a['annotations'][5:])))
    with pytest.warns(UserWarning, match='5 questions without an annotation in train2014'): asked = read_vqa(tmp_path)
    assert len(asked) == len(read_vqa(vqa)) - 5
    asked.loc[:3, 'answer'] = ' \t'
    with pytest.warns(UserWarning, match='4 rows with an empty answer'): build_tasks(asked)


def test_any_clip_from_files_to_a_table(tmp_path, vqa, small_clip, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setitem(PRESETS, 'tiny', override('smoke', multitask=dict(epochs=1), weights=dict(steps=3), hvae=dict(steps=30), hyperldm=dict(steps=30), few_shot=dict(steps=2)))
    run = lambda *args: hyperclip(monkeypatch, capsys, *args)
    assert run('data', 'build', '--vqa', vqa, '--to', 'tasks')[0] == 0
    data = load_metavqa('tasks')
    images = tmp_path/'photos'; images.mkdir()
    for p in vqa.rglob('*.jpg'): (images/p.name).write_bytes(p.read_bytes())           # all in one folder this time
    lost = [data.images[int(i)] for i in data.tasks['test'][0].pairs[:, 0]]
    (images/f'{lost[0]}.jpg').write_bytes(b'no picture')
    for name in lost[1:]: (images/f'{name}.jpg').unlink()
    name, file = small_clip
    code, out, err = run('data', 'features', 'tasks', '--images', 'photos', '--model', name, '--pretrained', file, '--workers', 0, '--device', 'cpu')
    assert code == 0 and all(f'unreadable: {n}' in err for n in lost) and f'"{data.tasks["test"][0].question}" is left out' in err and f'{len(lost)} cannot be read' in out
    code, out, err = run('reproduce', '--data', 'tasks', '--preset', 'tiny', '--methods', 'clip,multitask,hvae-hyperldm', '--gamma', '1.5', '--out', 'run', '--device', 'cpu')
    assert code == 0, err
    r = experiments.read_results('run')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); kept = drop_images(data.tasks['test'], image_ids(data.images, lost))
    assert len(r['test'][0]) == len(kept) < len(data.tasks['test'])
    assert '100%, unseen images' in table1(r) and r['config']['clip']['name'] == f'{name}:{file}' and '--data' in r['command']
    for change, says in ((('--model', 'tiny'), 'by another CLIP'),):
        code, _, err = run('data', 'features', 'tasks', '--images', 'photos', *change, '--device', 'cpu')
        assert code == 2 and says in err and 'images-00000.safetensors' in err
    run = Run.open('run')
    assert run.clip.fingerprint == r['config']['clip']['fingerprint'] and run.adapter.width == 32


def test_unseen_images_are_those_that_training_never_showed(tmp_path, vqa):
    data = build_tasks(read_vqa(vqa))
    seen = {i for t in data.tasks['train'] for i in t.pairs[:, 0].tolist()}
    new = np.split(unseen_queries(data.tasks), np.cumsum([len(t.query) for t in data.tasks['test']])[:-1])
    for t, n in zip(data.tasks['test'], new): assert n.tolist() == [i not in seen for i in t.query[:, 0].tolist()]
    save_metavqa(data, tmp_path)
    from hyperclip_nb.vision.clip import load_clip
    encode_files(load_clip(), vqa, data.images, all_texts([t for ts in data.tasks.values() for t in ts]), tmp_path/'features')
    test = Run('smoke', data=tmp_path).data['test']
    assert test.size['unseen'].tolist() == [int(n.sum()) for n in new]
    assert (test.parts['unseen'] <= test.parts['query']).all()
    assert stats(data).test['tasks with unseen queries'] == sum(n.any() for n in new)


def test_killed_features_go_on(tmp_path, vqa):
    data = build_tasks(read_vqa(vqa)); save_metavqa(data, tmp_path)
    texts = all_texts([t for ts in data.tasks.values() for t in ts])
    program = ("import sys, torch; torch.set_num_threads(1)\nfrom hyperclip_nb.vision.clip import load_clip; from hyperclip_nb.vision.photographs import encode_files; from hyperclip_nb.data.metavqa import load_metavqa; from hyperclip_nb.data.tasks import all_texts\n"
               "d = load_metavqa(sys.argv[1]); encode_files(load_clip(), sys.argv[2], d.images, all_texts([t for ts in d.tasks.values() for t in ts]), sys.argv[3], shard=100)")
    start = lambda out: subprocess.Popen([sys.executable, '-c', program, str(tmp_path), str(vqa), str(out)])
    assert start(tmp_path/'whole').wait(300) == 0
    process, end = start(tmp_path/'killed'), time.time() + 120
    while len(list((tmp_path/'killed').glob('images-*'))) < 2 and process.poll() is None and time.time() < end: time.sleep(.005)
    process.send_signal(signal.SIGKILL); process.wait()
    with pytest.raises(ValueError, match='holds no features'): open_features(tmp_path/'killed', data.images, texts)
    assert start(tmp_path/'killed').wait(300) == 0
    for p in (tmp_path/'whole').glob('*.safetensors'): assert torch.equal(load_file(p)['features'], load_file(tmp_path/'killed'/p.name)['features'])


def test_the_paper_preset_has_the_papers_sizes():
    p = PRESETS['paper']; adapter = Adapter(768, **p['adapter'])
    count = lambda m: sum(x.numel() for x in m.parameters())
    assert adapter.n_weights == 394_240
    with torch.device('meta'):
        assert round(count(HNet(adapter.n_weights))/1e6, 1) == 101.3
        hvae, net = HVAE(adapter.n_weights, p['hvae']['latent'], p['hvae']['hidden']), NoiseNet(p['hvae']['latent'], 768, p['hyperldm']['hidden'])
    assert [round(count(m)/1e6) for m in (hvae, net)] == [203, 1172]
    assert [m.out_features for m in hvae.decoder[:-1:2]] == [512, 256] and len(linear_schedule()) == 350 == p['sampling']['steps']
    assert json.dumps(PRESETS['default']) == json.dumps(override('default')) and p['world'] == PRESETS['default']['world']
