"""Tensor parallelism: one process per rank, and a runner that sends every plan to all ranks.

`TensorParallelRunner.execute` (runner.py) encodes a plan once and writes the bytes into a socket of
every rank (channel.py). Each rank (worker.py) runs the plan on its share of the model, with sums
over all ranks (collectives.py). All ranks sample the same tokens; rank 0 sends them back.

A rank that raises an error sends the error. If a rank's process dies, WorkerDiedError is raised.
In both cases the runner kills the other ranks, as they may wait for the failed rank for ever.
"""
