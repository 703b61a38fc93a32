"""Tensor parallelism: one process per rank, and a runner that hands every plan to all of them.

`TensorParallelRunner.execute` (runner.py) encodes a plan once and writes the bytes into a socket of
every rank (channel.py). Each rank (worker.py) runs the plan on its share of the model, and sums
over the ranks as it goes (collectives.py). All sample the same tokens; rank 0 sends them back.

When a rank dies, its socket ends. The runner kills the other ranks, which may wait for the dead
one for ever, and raises WorkerDiedError; a rank that raises sends its error first.
"""
