"""Many engines behind one HTTP API, on the machines of a Ray cluster. Needs the extra `cluster`.

A *front* is the server of `longwing.server`, unchanged: it tokenises, validates and streams. In
place of an engine of its own it has a `ClusterService`, which hands each request to one of many
*replicas*, each an `EngineService` with its model in memory. Requests that share a document go to
the replica that has read it (`affinity.py`); a request whose replica dies is asked again elsewhere
(`service.py`). Ray Serve places both, watches them, scales them and replaces them (`deploy.py`).
Weights never travel through Ray: every replica reads the model folder itself.

Beside serving, a cluster lends workers (`worker.py`, `crew.py`): an evaluation asks many engines as
one model (`pool.py`), and a quantising run spreads its calibration samples (`calibration.py`).

Only `front.py`, `router.py`, `deploy.py` and `crew.py` know Ray; the rest is plain Python.
"""
