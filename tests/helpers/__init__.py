"""What several tests share. Nothing here is a test.

small_tasks.py         small tasks with a known truth
small_maps.py          maps made by hand
tiny_llama.py          a tiny random Llama as a Hugging Face folder, and a task of it
planted_faults.py      faults in a checkpoint, one at a time
engines.py             the serving engines of .venv-engines, asked in a process of theirs
real_models.py         real recommenders with published weights
planted_times.py       whole models whose times are planted
gpu_played.py          a CPU in the place of a GPU with FP8
followed_pages.py      a page of the documentation, followed
search_attempts.py     one search as a process that may be killed, and what two runs have in common
going_round.py         a model between processes and among threads
quantiser_oracle.py    the oracle of the quantiser, from ml_dtypes
spellings.py           every spelling of a product that a weight is read by
grouped_on_cpu.py      `torch._scaled_grouped_mm` for CPU tensors

The zoo, models that nobody here wrote and small faithful ones:

specimen.py            a model, how its owner calls it, and one batch
zoo.py                 the specimens for discovery
zoo_models.py          small models that keep their weights in unusual places
zoo_rankers.py         specimens of ranking models
zoo_ranking_models.py  small ranking models from the papers
zoo_libraries.py       specimens of torchrec and transformers
zoo_transformers.py    models of transformers, one line a model
zoo_language.py        families of language models
zoo_senses.py          families that read images, sound and series
zoo_deployed.py        what is asked of every model that is deployed
zoo_outside.py         what can be seen of a model from outside
zoo_flops.py           FLOPs by torch's own counter
"""
