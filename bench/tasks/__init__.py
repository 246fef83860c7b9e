"""What the models are measured on: real tasks, and made-up ones whose truth is known.

real_tasks.py         all real tasks, and the baseline of each
real_data.py          where their data lie
click.py              click prediction on frappe
films.py              film recommendation on MovieLens
retrieval.py          semantic search in questions of StackExchange
sequence.py           next-item recommendation on video games
gpu_tasks.py          a click model that a GPU trains within seconds, and an encoder judged against itself
synthetic.py          a ranker with as many layers as asked
finite_population.py  every unit of a real task, scored under every map
false_cells.py        populations on which every certificate is false
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # for `helpers`
