"""Throughput and latency, outputs checked against transformers before any rate is printed.

    python bench.py                           CPU: beside transformers; CUDA: seeds and latency
    python bench.py --workload seeds latency ttft startup --shape qwen3-0.6b
    python bench.py --shape qwen3-8b --tensor-parallel 1 2 4 --workload seeds128 latency
    python bench.py --engine ours,transformers,vllm,nano-vllm,mini-sglang --report folder
    python bench.py --engine sequential,transformers,ours    speed-ups over no cache, no batch
    python bench.py --engine ours,ours:throughput            presets side by side
    python bench.py --engine ours,ours:low_latency --workload crowd
    python bench.py --workload filters text --shape qwen3-0.6b
    python bench.py --workload exact --shape qwen3-0.6b --tensor-parallel 1 2
    python bench.py --profile folder          time by phase and by kernel, and torch's trace
    nsys profile python bench.py --nvtx       the phases as ranges for nsys, on CUDA
    python bench.py --model path              a checkpoint of yours
    python bench.py --json results.json       all figures of every repeat as well

compare   one request, and 32 of mixed length
small     8 requests of 16 to 64 tokens in and out
seeds     256 requests of 100 to 1,024 tokens in and out, temperature 0.6
seeds128  the first 128 of them
latency   1, 8 and 64 requests of 128 tokens in and 512 out
ttft      time to the first token after 128, 1,024 and 3,800 tokens; the shipped model holds 2,048
crowd     16 requests that run while 32 prompts of 1,500 tokens are computed, and how long both
          kinds wait for their first token and between two
flood     1,024 requests of 16 to 64 tokens in and out
filters   what a decode step costs with top_k, top_p, min_p, a penalty, log-probabilities: 256
          requests (8 on a CPU) of 128 tokens in and 256 out, the variants in turn
text      what text costs, and looking for a stop string, against tokens alone: the seeds (8 of
          them on a CPU), the variants in turn; --shape gets a tokenizer of its vocabulary's size
startup   construction to ready in a new process, with a cold and a warm kernel cache
kernels   attention and the linears alone, against the machine's limits; CUDA
overlap   what the host does for a decode step of 256 requests while the device works; CUDA
scheduler schedule and commit alone, for 256 running and up to 100,000 waiting requests; then
          whole steps on a simulated runner, with streams and stop strings; no model
exact     how many of 64 requests (8 on a CPU) keep the bits that they have alone in a batch, in
          chunks, after prefix hits and preemptions and other settings; and how far the logits are
          from float32 beside those of transformers. Lost bits or too large a distance fail

Workloads with requests beyond the model's context window are named and left out. An option that
would be without effect is refused, and so is an output that could not be written, before anything
runs. A workload that fails costs no other its figures; the exit code is then 1.

Every engine runs in a process of its own. On a CPU they take turns; on CUDA each has the device
to itself, and its rates are printed before the next one starts. There the run also measures the
machine's read bandwidth and matmul rate and prints the fraction of the workload's roofline that
was reached (benchmarks/roofline.py).
"""

from __future__ import annotations

from benchmarks.command import run


def main() -> None:
    run(__doc__)


if __name__ == "__main__":
    main()
