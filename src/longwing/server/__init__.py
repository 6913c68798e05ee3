"""Text generation over HTTP: TGI's API and OpenAI's, in front of an engine. No torch.

options.py          what an operator may set
serving.py          what every route needs: the engine, the tokenizer, the limits
app.py, run.py      the application; the process: sockets, signals, drain
guard.py            who may ask, and how much: keys, hosts, headers, bodies, admission
body.py             JSON from strangers
faults.py           every error of every route, in its route's dialect
sse.py, leave.py    streams; clients that leave
access_log.py       one line a request
metrics.py          /metrics
tgi*.py             TGI's routes
openai*.py          OpenAI's

No names here, so that a part is imported without the others.
"""
