"Everything about the package comes from `settings.ini`."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='])
ini.read(here/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_name']
statuses = [
    '1 - Planning', '2 - Pre-Alpha', '3 - Alpha', '4 - Beta',
    '5 - Production/Stable', '6 - Mature', '7 - Inactive',
]

setup(
    name=lib,
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'],
    author=cfg['author'],
    url=cfg['git_url'],
    license='Apache-2.0',
    long_description=(here/'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    classifiers=[
        f'Development Status :: {statuses[cfg.getint("status") - 1]}',
        f'Intended Audience :: {cfg["audience"]}',
        f'Natural Language :: {cfg["language"]}',
        *(f'Programming Language :: Python :: 3.{v}' for v in range(10, 14)),
    ],
    packages=find_packages(include=[cfg['lib_path'], f'{cfg["lib_path"]}.*']),
    package_data={cfg['lib_path']: ['assets/*']},
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require={
        name.removesuffix('_requirements'): cfg[name].split()
        for name in cfg if name.endswith('_requirements')
    },
    entry_points={
        'console_scripts': cfg['console_scripts'].split(),
        'nbdev': [f'{lib}={lib}._modidx:d'],
    },
    zip_safe=False,
)
