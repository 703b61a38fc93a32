"""Tensor parallelism: one process per rank, and a runner that sends every plan to all ranks.

`TensorParallelRunner.execute` (runner.py) encodes a plan once, and sends the bytes to every rank
through a socket (channel.py). Each rank (worker.py) runs the plan on its share of the model, and
collectives add up partial results of all ranks (collectives.py). All ranks draw the same tokens;
rank 0 sends the tokens to the runner. If a rank raises an error, the rank sends the error to the
runner, which raises it. If a rank's process dies, the runner raises a WorkerDiedError. Either way
the runner kills all ranks, because a collective may wait for the failed rank for ever.
"""
