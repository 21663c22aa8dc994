"""The benchmark suites: ``edlm bench ops | training | decode``, or from a checkout ``python benchmarks/ops/bench_<family>.py`` and
``python benchmarks/training/<family>.py``, ``python benchmarks/decode/<family>.py``.

They are installed as ``edlm.benchmarks`` beside the package's rooms; none of them imports it. Importing it imports nothing.
"""
