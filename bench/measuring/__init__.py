"""What several benches measure with.

search_work.py    the three ways to learn which layers can be quantised, and what each costs
search_turns.py   these ways, timed in turns on one task
peak_memory.py    the peak memory of a way, in a process of its own
layer_ranking.py  how well a score ranks layers
rival_scores.py   the scores that a ranking is compared with
"""
