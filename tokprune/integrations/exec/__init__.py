"""Load-time patches: any script, unmodified, runs with compressed visual tokens.

In one process, every supported model that ``from_pretrained`` returns is handed to
:func:`tokprune.patch` (:mod:`~tokprune.integrations.exec.patching`). ``tokprune exec`` has that
happen in a command and in every Python process that it starts
(:mod:`~tokprune.integrations.exec.run`, :mod:`~tokprune.integrations.exec.child`), counts what the
models were asked (:mod:`~tokprune.integrations.exec.watch`) and says at the end whether all of it
was compressed (:mod:`~tokprune.integrations.exec.verdict`).
"""
