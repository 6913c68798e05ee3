"""The web page of `longwing serve`: its files, and what it asks of the server beside the two APIs.

    options.py    what an operator may set
    page.py       the files of the page, from memory, under a strict content security policy
    access.py     who may act: same origin, and the admin key
    bodies.py     bodies whose every field is known, or refused by name
    calls.py      what every route has in hand, and how a refusal is told
    session.py    what anybody may ask: the session, the state, documents, prompts
    routes.py     the other routes of /ui/api, and the list of all
    shelf.py      the models on this machine
    machine.py    its memory
    settings.py   from a body's fields to engine options, within the operator's limits
    plans.py      what a model on the shelf would need
    loading.py    the running engine, drained and replaced by another
    child.py      a longwing command as a child process, its lines as they come
    downloads.py  `longwing pull`, as a child
    records.py    the folder of evaluations
    runs.py       the one under way: `longwing eval`, as a child; and what became of others
    reports.py    reports of them, each at an address that holds for a while
    documents.py  a file as text, with its tokens counted
    reader.py     PDF and HTML as text, in a child process with limits
    web.py        all of it, as one extension of the server

Nothing here is imported by the server: `cli/serve.py` hands it `Web`, or does not (`--no-ui`).
Whatever takes long or reads what strangers made runs in a child process or a thread, so that the
server answers meanwhile.
"""
