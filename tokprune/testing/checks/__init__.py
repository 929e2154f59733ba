"""The single checks. Each takes a :class:`tokprune.testing.Case`, says in words what it found, and
raises :class:`tokprune.testing.Fault` where something does not hold."""
