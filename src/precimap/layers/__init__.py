"""WHERE precision may be chosen: every weight and the op that reads it, found by watching one batch run.

Finding:
ops.py, equations.py  which calls contract a tensor with another one, over which dims
views.py     which tensors are a weight, or a view of one
interception.py  the one mechanism: a mode that sees every call and hands out those that read a weight
watching.py, counting.py  one batch under watch; the FLOPs of every op that torch dispatches
constants.py, owners.py, unread.py, influence.py  what is computed before the batch, who reads a weight, what none reads,
             what cannot change the output
special.py, refusals.py  what no precision can be chosen for, and why a layer cannot take a scheme on any hardware
groups.py    layers that an engine fuses (must share a scheme)
discover.py, inventory.py  the step as a whole, and what it gives: layers, other parameters, FLOPs, siblings, dead weights

Computing:
quantized.py one layer's codes and scales
emulation.py, code_products.py  a model that computes as a map says; products of codes in the machine's matrix unit
first_order.py  local errors of every call, and the gradient that meets them
recording.py, replay.py, nudging.py  the results of a baseline pass; what a probe computes again; results rounded anew
contents.py, same_bytes.py, storages.py  what each tensor holds and where, known without reading it again
realign.py, casting.py, prepared.py  the last logit's scale and shift, folded into its layer; the whole model in 16 bits;
             the model and the layers that a map says
target.py, stand_in.py  what a search asks of hardware, and the module that a timer is given for a layer
copying.py, given.py  a second module tree over the same tensors; how many rows a model is given
"""
