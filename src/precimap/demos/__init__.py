"""The embedded default: a real model and real text, offline.

docstrings.py       real questions and answers: the docstrings installed on this machine
minilm.py           all-MiniLM-L6-v2
semantic_search.py  both as a Task, from the side of the queries or of the documents
click_logs.py       generated click logs, for those who have none at hand
demo.py             the main job on it, end to end
"""
