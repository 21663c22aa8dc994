"""The benchmark suite: ``edlm bench ops``, or from a checkout ``python benchmarks/ops/bench_<family>.py``.

It is installed as ``edlm.benchmarks`` beside the package's rooms; none of them imports it. Importing it imports nothing.
"""
