"""Would an engine read a compressed-tensors checkpoint as it is meant? Of this writer's own exports, and of other tools'.

lint.py          lint(): a folder, and what one engine would do with it
findings.py      what was found: layer, rule, what the engine does, what to do
checked.py       the checkpoint as rules look at it: groups, targets, modules and their tensors
kinds.py         what a group's arguments stand for: `int8`, `fp8-block`, `nvfp4`; and the tensors of each
config_rules.py  fields, formats, targets: what the config says against itself
tensor_rules.py  tensors that are missing, or of another shape, dtype or module than the config says
fused_rules.py   parts of one product: their schemes and global scales
engine_rules.py  what an engine has no kernel for, ignores, or builds without a quantisation
"""
