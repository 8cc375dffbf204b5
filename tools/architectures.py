#!/usr/bin/env python3
"""Load every architecture of open_clip with random weights, and encode with it.

    python tools/architectures.py table.csv

Each one runs in a process of its own: `load_clip('NAME:random')`, a picture, two
sentences. Where the tokenizer or the text tower is one of another library that is not
here, the table says so; its encoders are then tried with numbers for words."""
import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

COLUMNS = [
    'architecture', 'kind', 'parameters (M)', 'width', 'tokenizer', 'seconds', 'ok',
]


def kind_of(config):
    "Which class of open_clip a configuration belongs to"
    if 'multimodal_cfg' in config:
        return 'CoCa'
    vision, text = config['vision_cfg'], config['text_cfg']
    tower = vision.get('timm_model_name', 'ViT' if 'patch_size' in vision else 'ResNet')
    words = 'Hugging Face' if 'hf_model_name' in text else 'own'
    name = 'CustomTextCLIP' if config.get('custom_text') else 'CLIP'
    return f'{name}, {tower.split("_")[0]}, text {words}'


def random_words(context, vocabulary):
    "Stands for a tokenizer: each text becomes numbers of its own"
    def tokens(texts):
        rows = []
        for text in texts:
            source = np.random.default_rng(list(text.encode()))
            rows.append(source.integers(1, vocabulary - 1, context))
        return torch.tensor(np.array(rows))
    return tokens


def load(name):
    "A `Clip`, and where its tokenizer comes from"
    import open_clip
    from open_clip.factory import get_model_config

    from hyperclip_nb.vision.clip import load_clip
    from hyperclip_nb.vision.encoders import wrap_clip
    try:
        return load_clip(f'{name}:random'), 'open_clip'
    except ValueError as error:
        if 'pip install transformers' not in str(error):
            raise
    text = get_model_config(name)['text_cfg']
    model, _, transform = open_clip.create_model_and_transforms(
        name, image_resize_mode='squash',
    )
    size = text.get('context_length', 77), text.get('vocab_size', 49408)
    return wrap_clip(model, transform, random_words(*size), name), 'transformers'


def examine(name):
    "One line of the table"
    from open_clip.factory import get_model_config
    logging.disable(logging.ERROR)
    torch.set_num_threads(1)
    start = time.time()
    config = get_model_config(name)
    clip, tokenizer = load(name)
    picture = np.random.default_rng(0).integers(0, 256, (1, 60, 90, 3), dtype=np.uint8)
    x = clip.encode_image(picture)
    t = clip.encode_text(['a red star', 'two things'])
    parameters = sum(p.numel() for p in clip.model.parameters())/1e6
    width = config['embed_dim']
    ok = x.shape == (1, width) and t.shape == (2, width) and clip.width == width
    ok = ok and bool(x.isfinite().all() and t.isfinite().all())
    ok = ok and not torch.equal(t[0], t[1])
    seconds = round(time.time() - start)
    return name, kind_of(config), round(parameters), width, tokenizer, seconds, ok


def in_own_process(name, limit):
    "The line of an architecture; what its process said last where it failed"
    command = [sys.executable, __file__, '--one', name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return name, '', '', '', '', limit, 'took too long'
    last = (done.stdout or done.stderr).strip().splitlines()[-1:] or ['killed']
    if done.returncode:
        return name, '', '', '', '', '', last[0][:150]
    return tuple(last[0].split('\t'))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('table', nargs='?', help='CSV file')
    parser.add_argument('--one', help='an architecture, in this process')
    parser.add_argument('--limit', type=int, default=900, help='seconds for each')
    asked = parser.parse_args()
    if asked.one:
        print(*examine(asked.one), sep='\t')
        return
    import open_clip
    rows = []
    for name in open_clip.list_models():
        rows.append(in_own_process(name, asked.limit))
        print(*rows[-1], sep=' | ', flush=True)
        table = pd.DataFrame(rows, columns=COLUMNS)
        if asked.table:
            Path(asked.table).write_text(table.to_csv(index=False))
    print((table.ok == 'True').sum(), 'of', len(table), 'encode at their own width')


if __name__ == '__main__':
    main()
