"""The models that are measured: trained here or untrained, in their several forms.

trained.py           models that the benches train themselves: the same weights each time, and kept
click_training.py    how a click model is trained
click_model.py       DCNv2, a click model
wukong.py            Wukong, a click model of stacked factorization machines
sasrec.py            SASRec, a next-item model, and how it is trained
variants.py          one ranking task served in several ways
all_low.py           a model with every layer low that a target takes
cpu_speed_models.py  whole models on this CPU, in all their forms
cpu_speed_peers.py   the same models in other engines
gpu_models.py        two untrained models and their FP8 forms, for GPUs
zoo_more.py          models of libraries that the tests do not install
zoo_recommenders.py  ranking models of such libraries
"""
