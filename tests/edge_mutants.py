"""Bugs at the edges: threads, processors, schemas, streams, text; `tests.mutations` plants them.

They are plain data like those of `tests.kernel_mutants`.
"""

from __future__ import annotations

from tests.kernel_mutants import PlainMutant

_TURNS, _LLM, _ENGINE = "engine/turns.py", "llm.py", "engine/llm_engine.py"
_PROCESSORS, _CHANNEL = "engine/processors.py", "engine/ranks/channel.py"
_SCHEMA, _OUTPUTS, _TORCH = "engine/json_schema.py", "engine/outputs.py", "engine/torch_state.py"
_ROWS, _HIDDEN = "engine/changed_rows.py", "engine/hidden_rows.py"
_QUEUE = "engine/prompt_queue.py"
_STOPS, _READER = "utils/stop_strings.py", "utils/text_reader.py"
_NEW_TEXTS = "ids = [seq.request_id for seq in ended] + [self._slots[slot] for slot in slots]"

_PYTEST = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow")
TURNS = (*_PYTEST, "tests/test_threads.py", "-k", "TestTurns")
CALLS = (*_PYTEST, "tests/test_threads.py", "-k", "TestCalls")
OUTPUTS = (*_PYTEST, "tests/test_outputs.py")
PROCESSORS = (*_PYTEST, "tests/engine/test_processors.py")
SCHEMA = (*_PYTEST, "tests/engine/test_json_schema.py")
TORCH = (*_PYTEST, "tests/engine/test_torch_state.py", "-k", "freed or closed or pending")
PROGRESS = (*_PYTEST, "tests/test_progress.py")
COSTS = (*_PYTEST, "tests/test_step_costs.py")
STOPS = (*_PYTEST, "tests/utils/test_stop_strings.py")
DECODERS = (*_PYTEST, "tests/utils/test_decoders.py", "-k", "special_tokens or SpecialTokens")
TEXT = (*_PYTEST, "tests/utils/test_text.py")
EXACT_ROWS = (*_PYTEST, "tests/engine/test_exact_rows.py")
HIDDEN = (*_PYTEST, "tests/engine/test_hidden_states.py")
SURFACE = (*_PYTEST, "tests/test_surface.py")
PROMPTS = (*_PYTEST, "tests/utils/test_prompts.py")
PARAMS = (*_PYTEST, "tests/test_sampling_params.py")

EDGE_MUTANTS: tuple[PlainMutant, ...] = (
    (
        "hidden states: a cached token may hold the first position",
        (
            (
                "engine/requests.py",
                "hidden_states_start + self.num_hidden)",
                "hidden_states_start + 99)",
            ),
        ),
        HIDDEN,
    ),
    (
        "hidden states: positions computed again are added again",
        (("engine/requests.py", "found[max(0, known - (end - len(found))) :]", "found"),),
        HIDDEN,
    ),
    (
        "hidden states: a chunk's tokens before the first position are returned",
        ((_HIDDEN, "hidden_states_start - chunk.start) if chunk else 0", "0) if chunk else 0"),),
        HIDDEN,
    ),
    (
        "hidden states: decodes count from the first chunk",
        ((_HIDDEN, "num_drawn += chunk is None or chunk.samples", "num_drawn += 1"),),
        HIDDEN,
    ),
    (
        "hidden states: -1 is the last layer's input",
        ((_HIDDEN, "num_layers + 1 + asked", "num_layers + asked"),),
        HIDDEN,
    ),
    (
        "hidden states: the final norm is left out",
        ((_HIDDEN, "found.append(norm(last))", "found.append(last)"),),
        HIDDEN,
    ),
    (
        "hidden states: rows of prompts come before those of decodes",
        ((_HIDDEN, "(*decodes[1], *prompts[1])", "(*prompts[1], *decodes[1])"),),
        HIDDEN,
    ),
    (
        "hidden states: Granite's stream is not scaled back",
        (("models/decoder.py", ".total * self.spec.stream_scale", ".total"),),
        HIDDEN,
    ),
    (
        "surface: an end-of-sequence token is a stop reason",
        (
            (
                _OUTPUTS,
                "return last if last in seq.sampling.stop_token_ids else None",
                "return last",
            ),
        ),
        SURFACE,
    ),
    (
        "surface: the last one given of the stop strings that begin first is the reason",
        ((_STOPS, "found = place - end[0], -end[1]", "found = place - end[0], end[1]"),),
        STOPS,
    ),
    (
        "surface: a part has the log-probabilities of all tokens so far",
        ((_OUTPUTS, "_logprobs(seq, first, self", "_logprobs(seq, 0, self"),),
        SURFACE,
    ),
    (
        "surface: tokens of equal log-probability count as larger",
        (("layers/logits.py", "at[part]) > drawn", "at[part]) >= drawn"),),
        (*_PYTEST, "tests/layers/test_exact_logits.py"),
    ),
    (
        "surface: ranks are wanted by all or by none",
        (("engine/step_scores.py", "    return most, ranked\n", "    return most, False\n"),),
        SURFACE,
    ),
    (
        "surface: max_tokens=0 leaves room for a token",
        (
            (
                "engine/request_checks.py",
                "len(prompt) + (1 if most is None else most)",
                "len(prompt) + (most or 1)",
            ),
        ),
        SURFACE,
    ),
    (
        "surface: a recommended length beyond the window is refused",
        ((_LLM, "return params if fits else", "return params if True else"),),
        SURFACE,
    ),
    (
        "surface: special tokens have no text, even if asked for",
        (
            (
                _LLM,
                "decoder(self.tokenizer, skip_special_tokens=False)",
                "decoder(self.tokenizer)",
            ),
        ),
        SURFACE,
    ),
    (
        "surface: True is accepted in place of 1",
        (("utils/foreign_names.py", "type(value) is type(one) and value", "value"),),
        SURFACE,
    ),
    (
        "surface: padding is part of the prompt",
        (("utils/prompts.py", "for token, used in pairs if used", "for token, _ in pairs"),),
        PROMPTS,
    ),
    (
        "surface: an argument of chat may be given twice",
        (("utils/chats.py", "        if name in options:\n", "        if False:\n"),),
        PROMPTS,
    ),
    (
        "surface: numbers of NumPy in lists stay as they are",
        (("utils/rules.py", "return value if kinds <= _PLAIN else", "return value if kinds else"),),
        PARAMS,
    ),
    (
        "edge: a step reads the texts of requests that wait",
        ((_ENGINE, _NEW_TEXTS, "ids = list(self._read)"),),
        COSTS,
    ),
    (
        "edge: a request that ends without a token is not read to its end",
        ((_ENGINE, _NEW_TEXTS, "ids = [self._slots[slot] for slot in slots]"),),
        COSTS,
    ),
    (
        "edge: after a reset a step tells of its own requests alone",
        ((_QUEUE, "if plan and self._engine.num_resets == before:", "if plan:"),),
        COSTS,
    ),
    (
        "edge: what a step brought is not told after an interrupt",
        (
            (
                _QUEUE,
                "before, self._resets, ids = self._resets, None, None",
                "before, ids = self._resets, None",
            ),
        ),
        COSTS,
    ),
    (
        "edge: a part taken while the engine is closed is the last one",
        ((_OUTPUTS, "        if stream.ready():\n            news[request_id] = stream\n", ""),),
        COSTS,
    ),
    (
        "edge: a group looks at all its outputs when one ends",
        (
            (
                _OUTPUTS,
                "while self._num_ended < len(seqs)",
                "self._num_ended = 0\n        while self._num_ended < len(seqs)",
            ),
        ),
        COSTS,
    ),
    (
        "edge: a part copies the whole output",
        (
            (
                _OUTPUTS,
                "tokens = seq.token_ids[seq.num_prompt_tokens + first :]",
                "tokens = seq.output_token_ids[first :]",
            ),
        ),
        COSTS,
    ),
    (
        "edge: a part with the details of log-probabilities copies the prompt",
        (
            (
                _OUTPUTS,
                "given = self._prompt.prompt.token_ids",
                "given = seq.token_ids[: seq.num_prompt_tokens]",
            ),
        ),
        COSTS,
    ),
    (
        "edge: requests with and without special tokens in the text share no automata",
        ((_LLM, "else self._decode_all", "else decoder(self.tokenizer)"),),
        COSTS,
    ),
    (
        "edge: every thread that leaves asks all others",
        ((_TURNS, "list(ready if had_turn else islice(ready, 1))", "list(ready)"),),
        COSTS,
    ),
    (
        "edge: stop strings: a failure forgets shorter beginnings",
        ((_STOPS, "                state = fail[state]\n", "                state = 0\n"),),
        STOPS,
    ),
    (
        "edge: stop strings: one that another one contains is not found",
        ((_STOPS, "both = ends[state], ends[fail[state]]", "both = ends[state], None"),),
        STOPS,
    ),
    (
        "edge: stop strings: a complete one holds nothing back",
        ((_STOPS, "self.held[state] = self.held[fail[state]]", "self.held[state] = 0"),),
        STOPS,
    ),
    (
        "edge: stop strings: text that changed is not read again",
        (
            (
                _STOPS,
                "if self._seen is not None and new.startswith(self._seen):",
                "if self._seen is not None:",
            ),
        ),
        STOPS,
    ),
    (
        "edge: stop strings: text that stays is read again",
        (
            (
                _STOPS,
                "if self._seen is not None and new.startswith(self._seen):",
                "if self._seen is None:",
            ),
        ),
        STOPS,
    ),
    (
        "edge: stop strings: ignored text counts after it was appended",
        ((_STOPS, "max(0, self._passed - size)", "0"),),
        STOPS,
    ),
    (
        "edge: stop strings: a special token ends the output before it came",
        ((_STOPS, "self._waiting[:-1] if before_special else self._waiting", "self._waiting"),),
        DECODERS,
    ),
    (
        "edge: stop strings: text is told that a special token may follow",
        ((_STOPS, "return max(automaton.held", "return min(automaton.held"),),
        STOPS,
    ),
    (
        "edge: a text is copied with every token",
        ((_READER, "2 * len(parts[-1]) >= len(parts[-2])", "True"),),
        TEXT,
    ),
    (
        "edge: a thread that leaves wakes nobody who may step",
        ((_TURNS, "(first if had_turn else []) or ([] if first else next_step[:1])", "first"),),
        TURNS,
    ),
    (
        "edge: a step comes before short calls",
        (
            (
                _TURNS,
                "if any(one.done is None or one.done() for one in waiting):",
                "if any(one.done is not None and one.done() for one in waiting):",
            ),
        ),
        TURNS,
    ),
    (
        "edge: what was dropped during a turn waits for the next one",
        (
            (
                _TURNS,
                "                if mine:\n                    self._between()\n        finally:",
                "                pass\n        finally:",
            ),
        ),
        TURNS,
    ),
    (
        "edge: a call within another one ends the wait of both",
        (
            (
                _TURNS,
                "            if outer is None:\n",
                "            if True:\n",
            ),
        ),
        TURNS,
    ),
    (
        "edge: Ctrl-C may stop a step half-way into inference mode",
        (
            (
                _TORCH,
                "            with _C._InferenceMode(True):\n                if",
                "            with torch.inference_mode():\n                if",
            ),
        ),
        (*_PYTEST, "tests/engine/test_torch_state.py", "-k", "ctrl_c"),
    ),
    (
        "edge: a step begins while another thread reads its outputs",
        ((_LLM, "with self.engine.turns.step():", "with self.engine.turns.turn():"),),
        CALLS,
    ),
    (
        "edge: step loses what close has ended, if it is streamed",
        ((_LLM, "if not (self._ended or self._news):", "if not self._ended:"),),
        OUTPUTS,
    ),
    (
        "edge: an error ends all new requests but the first",
        (
            (
                _ENGINE,
                "ids = range(first, self._next_request_id)",
                "ids = range(first + 1, self._next_request_id)",
            ),
        ),
        OUTPUTS,
    ),
    (
        "edge: a failed step changes the reason of requests that had ended",
        (
            (
                _ENGINE,
                "if seq.finish_reason is None:\n                    seq.finish_reason = reason",
                "if True:\n                    seq.finish_reason = reason",
            ),
        ),
        OUTPUTS,
    ),
    (
        "edge: requests share what a processor refers to",
        ((_PROCESSORS, "copy.deepcopy(given) if", "copy.copy(given) if"),),
        PROCESSORS,
    ),
    (
        "edge: for_request may change the prompt",
        ((_PROCESSORS, "make(list(prompt), sample)", "make(prompt, sample)"),),
        PROCESSORS,
    ),
    (
        "edge: a rank keeps the processors of requests that have ended",
        (
            (
                _CHANNEL,
                "for call in self._kept.pop(request_id):\n                call.release()",
                "self._kept.pop(request_id)",
            ),
        ),
        PROCESSORS,
    ),
    (
        "edge: a processor is sent again after a preemption",
        ((_CHANNEL, "                self._kept[new.request_id] = calls", "                pass"),),
        PROCESSORS,
    ),
    (
        "edge: a tensor of another shape is spread over the row",
        ((_ROWS, "out.shape != shape or ", ""),),
        OUTPUTS,
    ),
    (
        "edge: a processor gets logits at the address that their place in the block gives",
        ((_ROWS, "logits[row].clone()", "logits[row]"),),
        EXACT_ROWS,
    ),
    (
        "edge: only the last processor's logits are kept",
        (
            (
                _ROWS,
                "            logits[row].copy_(out)  # fails",
                "        logits[row].copy_(out)  # fails",
            ),
        ),
        OUTPUTS,
    ),
    (
        "edge: other processors change logits after the schema",
        (
            (
                _SCHEMA,
                "(*params.logits_processors, schema)",
                "(schema, *params.logits_processors)",
            ),
        ),
        SCHEMA,
    ),
    (
        "edge: one end-of-sequence token of several",
        ((_SCHEMA, "allowed[self._eos] = self", "allowed[self._eos[:1]] = self"),),
        SCHEMA,
    ),
    (
        "edge: an error of llguidance is the end of the JSON",
        (
            (
                _SCHEMA,
                "            # After an error the mask is that of the end.\n"
                "            _check(self._matcher)\n",
                "",
            ),
        ),
        SCHEMA,
    ),
    (
        "edge: tokens beyond the logits",
        ((_SCHEMA, "max(self.vocab_size, len(self._tokenizer))", "self.vocab_size"),),
        SCHEMA,
    ),
    (
        "edge: time without a step counts for the next step",
        (
            (
                _OUTPUTS,
                "        self._last = now\n        self._bar",
                "        self._last = now if plan else self._last\n        self._bar",
            ),
        ),
        PROGRESS,
    ),
    (
        "edge: the last part keeps back what may begin a stop string",
        ((_OUTPUTS, "text.settled if reason is None else text.num_chars", "text.settled"),),
        OUTPUTS,
    ),
    (
        "edge: a function lives until the next one",
        ((_TORCH, "        del item, pending, work  # they", "        pass  # they"),),
        TORCH,
    ),
    (
        "edge: a closed thread takes a function that never ends",
        (
            (
                _TORCH,
                "        if not self._end.alive:\n            raise RuntimeError",
                "        if False:\n            raise RuntimeError",
            ),
        ),
        TORCH,
    ),
)
