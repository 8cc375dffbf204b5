"One thread: on busy cores two OpenMP threads run far slower than one, and sums in a fixed order give the same numbers everywhere."
import os

for name in 'OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS': os.environ[name] = '1'  # read when torch is imported
os.environ.setdefault('MPLBACKEND', 'agg')  # no display needed
