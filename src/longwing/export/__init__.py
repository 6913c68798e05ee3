"""Out to other engines: whether a folder loads in vLLM, SGLang or transformers, and one that does.

The face of the room. `read_facts` looks at a folder, `judge` says what an engine will make of it,
`export_model` writes the form that was judged. `targets` holds what each engine reads, `settings`
the fields, `repack` the packed forms that keep every value.
"""

from longwing.export.facts import Facts, read_facts
from longwing.export.folder import ExportReport, export_model, require_loads
from longwing.export.targets import TARGETS, Finding, Level, Target
from longwing.export.verdict import ExportOptions, Verdict, judge

__all__ = [
    "TARGETS",
    "ExportOptions",
    "ExportReport",
    "Facts",
    "Finding",
    "Level",
    "Target",
    "Verdict",
    "export_model",
    "judge",
    "read_facts",
    "require_loads",
]
