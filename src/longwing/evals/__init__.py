"""What a model can do at length: tasks, runs that can be interrupted, and reports of them.

The room knows no engine and no torch: whatever answers prompts is handed in as a `Model`
(`task.py`), and that is a loaded model, a server, or a few lines in a test.

    task.py        Model, Sample, Cell, Task: what everything here speaks of
    words.py       the words and sentences that generated documents are made of
    retrieval.py   topics, lines, passkey, facts: hide something at a depth, ask for it
    longchat.py    LongChat's own cases of topics and lines
    quality.py     QuALITY: multiple choice over a whole story
    perplexity.py  loss by position, in windows, and at the end of a length
    run.py         Plan and TASKS: every case of every cell, once
    journal.py     the record of a run, a JSON object a line
    table.py       from records to rows: accuracy, intervals, loss
    published.py   the results others published
    charts.py      SVG
    entry.py       one model of a report
    fields.py      what stands in a table's fields
    *_section.py   the parts of a report: accuracy, loss, quantised against dense
    report.py      which of them it has
    page.py        how it is written: HTML and Markdown
    harness.py     a Model for lm-evaluation-harness
"""
