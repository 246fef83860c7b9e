"""What several benches measure with.

search_work.py    the three ways to learn which layers can be quantised, and what each costs
search_turns.py   these ways, timed in turns on one task
peak_memory.py    the peak memory of a way, in a process of its own
parts.py          the parts of a bench, each with a limit of seconds
gpu_products.py   single layers and products on a GPU, against BF16
gpu_jobs.py       search, certificate and deployment on a GPU, and what they gain
layer_ranking.py  how well a score ranks layers
rival_scores.py   the scores that a ranking is compared with
"""
