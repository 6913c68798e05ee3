"""Tuning: adapters or whole models, on documents packed to a context; and what is made of them.

tune.py        one run, from a folder and files to a folder
spec.py        its settings
run.py         its steps
records.py     files to documents: tokens, and which of them are to be learned
packing.py     documents to rows of one length, and rows to steps
attention.py   attention that stays inside each document of a row
passes.py      a row through the model: checkpointed blocks, and the loss
loss.py        cross-entropy without the logits of a whole row
learner.py     what is trained, its optimiser, and both as tensors
state.py       those tensors on disk, by however many processes
journal.py     the record of an unfinished run
group.py       several processes, one model
shards.py      a part of the model in each of them
extend.py      RoPE settings into a folder
merge.py       an adapter into dense weights
memory.py      what a run takes on a GPU
result.py      the folder that a run leaves
"""

from longwing.errors import TuningError
from longwing.tune.extend import Extended, extend
from longwing.tune.merge import merge
from longwing.tune.spec import TuneSpec
from longwing.tune.tune import Tuned, tune

__all__ = ["Extended", "TuneSpec", "Tuned", "TuningError", "extend", "merge", "tune"]
