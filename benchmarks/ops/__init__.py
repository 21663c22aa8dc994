"""One module a family of ops: ``OPS``, what it times, and ``run(session)``, which times it."""
