"""Planted bugs: each is put into a copy of the sources, and ordinary tests must notice it.

``python tests/programs/mutants.py`` plants every bug, runs the layers of tests that reach the code, and writes which of them
noticed into ``docs/mutants.md``; names of bugs restrict it to those, and keep the other rows. No test that is marked as slow
is among them, so ``make test`` runs them all. ``test_mutants.py`` holds the table to this file, and the bugs to the sources.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "mutants.md"
COPIED = ("coba_triton", "kernels", "tests", "pyproject.toml", "README.md")
LAYERS = {
    "equations": "the neuron's equations against closed forms and numbers by hand, their adjoint against autograd",
    "interpreter": "the Triton kernels in Triton's interpreter, against the reference",
    "executed": "the compiled kernels, executed thread by thread on the CPU by `tests/ptxsim`, against the reference",
    "CPU path": "the CPU kernels against the reference",
}
PYTEST = ["-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "no:benchmark"]
EXECUTED = ["-m", "ptxsim", "--arch", "80", *PYTEST, "tests/compiled/test_kernels.py", "-k"]
EQUATIONS = [*PYTEST, "tests/backend/test_reference.py", "tests/neuron/test_one_truth.py", "-m", "not slow"]
CPU_TESTS = ["tests/kernels/test_feed_forward_kernels.py", "tests/backend/test_cpu.py"]
CURRENT_TESTS = ["tests/neuron/test_current.py", "-m", "not slow", "-k"]
SHARED = "tests/kernels/test_recurrent.py"
RECURRENT = [*PYTEST, SHARED, "tests/kernels/test_recurrent_kernels.py", "-m", "not slow"]
RECURRENT += ["-k", "triton or recurrent_kernels"]
CPU_RECURRENT = [*PYTEST, SHARED, "tests/backend/test_cpu_recurrent.py", "-m", "not slow", "-k", "cpu"]
SPARSE = [*PYTEST, "tests/kernels/test_sparse_kernels.py", "-m", "not slow"]
EXECUTED_SPARSE = [argument.replace("test_kernels", "test_sparse_kernels") for argument in EXECUTED[:-1]]
SYNAPSES = [*PYTEST, "tests/ops/test_what_is_kept.py", "tests/ops/test_sparse.py", "-m", "not slow"]
# What reaches the code of an area, by layer: arguments of Python.
AREAS: dict[str, dict[str, list[str]]] = {
    "neuron": {"equations": EQUATIONS},
    "refractory": {
        "equations": [*PYTEST, "tests/neuron/test_refractory.py", "-m", "not slow", "-k", "not triton and not cpu"],
        "interpreter": [*PYTEST, "tests/neuron/test_refractory.py", "-m", "not slow", "-k", "triton"],
        "executed": [*EXECUTED, "refractory"],
        "CPU path": [*PYTEST, "tests/neuron/test_refractory.py", "-m", "not slow", "-k", "cpu"],
    },
    "current": {
        "equations": [
            *PYTEST,
            "tests/neuron/test_one_truth.py",
            *CURRENT_TESTS,
            "adjoint or single or (pulse and reference)",
        ],
        "interpreter": [*PYTEST, *CURRENT_TESTS, "few and triton"],
        "executed": [*EXECUTED, "currents"],
        "CPU path": [*PYTEST, *CURRENT_TESTS, "autograd_s_bits or (unconnected and cpu)"],
    },
    "adjoint": {
        "equations": EQUATIONS,
        "interpreter": [*PYTEST, "tests/kernels/test_feed_forward_kernels.py", "-m", "not slow", "-k", "triton"],
        "executed": [*EXECUTED, "feed_forward"],
    },
    "feed-forward": {
        "interpreter": [*PYTEST, "tests/kernels/test_feed_forward_kernels.py", "-m", "not slow", "-k", "triton"],
        "executed": [*EXECUTED, "feed_forward"],
    },
    "recurrent": {
        "interpreter": RECURRENT,
        "executed": [*EXECUTED, "recurrent or slices or tile or together"],
    },
    "blocks": {
        "interpreter": RECURRENT,
        "executed": [*EXECUTED, "recurrent or slices or tile or together"],
        "CPU path": CPU_RECURRENT,
    },
    "sparse": {"interpreter": SPARSE, "executed": EXECUTED_SPARSE},
    "CPU feed-forward": {
        "CPU path": [*PYTEST, *CPU_TESTS, "-m", "not slow", "-k", "not triton"],
    },
    "time chunks": {
        "interpreter": [*PYTEST, "tests/kernels/test_time_chunk_kernels.py", "-m", "not slow"],
        "executed": [*EXECUTED, "chunks"],
    },
    "CPU time chunks": {"CPU path": [*PYTEST, "tests/backend/test_time_chunks.py", "-m", "not slow"]},
    "CPU recurrent": {"CPU path": CPU_RECURRENT},
    "CPU sparse": {"CPU path": SYNAPSES},
    "synapses": {
        "equations": [*SYNAPSES, "-k", "TestEquations or TestGrid or reference or refuse"],
        "CPU path": [*SYNAPSES, "-k", "not TestEquations and not TestGrid"],
    },
}


class Mutant(NamedTuple):
    """A bug: every occurrence of each key of ``edits`` becomes its value."""

    area: str
    file: str
    edits: dict[str, str]

    def apply(self, text: str) -> str:
        """The source with the bug.

        Raises:
            ValueError: if the source has changed so that the bug can't be planted.
        """
        for old, new in self.edits.items():
            if old not in text:
                raise ValueError(f"{self.file} has no {old!r} any more: plant the bug in what stands there now")
            text = text.replace(old, new)
        return text


def neuron(edits: dict[str, str]) -> Mutant:
    return Mutant("neuron", "coba_triton/neuron/step.py", edits)


def adjoint(edits: dict[str, str]) -> Mutant:
    return Mutant("adjoint", "coba_triton/neuron/adjoint.py", edits)


def refractory(file: str, edits: dict[str, str]) -> Mutant:
    return Mutant("refractory", file, edits)


def current(file: str, edits: dict[str, str]) -> Mutant:
    return Mutant("current", file, edits)


def step(edits: dict[str, str]) -> Mutant:
    return Mutant("feed-forward", "kernels/neuron.py", edits)


def feed_forward(edits: dict[str, str]) -> Mutant:
    return Mutant("feed-forward", "kernels/feed_forward.py", edits)


def recurrent(edits: dict[str, str]) -> Mutant:
    return Mutant("recurrent", "kernels/recurrent.py", edits)


def sparse(edits: dict[str, str]) -> Mutant:
    return Mutant("sparse", "kernels/sparse.py", edits)


def sparse_meeting(edits: dict[str, str]) -> Mutant:
    return Mutant("sparse", "kernels/recurrent.py", edits)


def sparse_launch(edits: dict[str, str]) -> Mutant:
    return Mutant("sparse", "coba_triton/backend/triton/sparse.py", edits)


def launch(edits: dict[str, str], module: str = "feed_forward.py") -> Mutant:
    return Mutant("feed-forward", f"coba_triton/backend/triton/{module}", edits)


def blocks(edits: dict[str, str]) -> Mutant:
    return Mutant("blocks", "coba_triton/ops/time_blocks.py", edits)


def cpu(edits: dict[str, str]) -> Mutant:
    return Mutant("CPU feed-forward", "coba_triton/backend/cpu/feed_forward.py", edits)


def chunks(edits: dict[str, str]) -> Mutant:
    return Mutant("time chunks", "coba_triton/kernels/time_chunks.py", edits)


def cpu_chunks(edits: dict[str, str], file: str = "time_chunks.py") -> Mutant:
    return Mutant("CPU time chunks", f"coba_triton/backend/cpu/{file}", edits)


def cpu_rows(edits: dict[str, str]) -> Mutant:
    return Mutant("CPU feed-forward", "coba_triton/backend/cpu/rows.py", edits)


def cpu_sparse(edits: dict[str, str], file: str = "sparse.py") -> Mutant:
    return Mutant("CPU sparse", f"coba_triton/backend/cpu/{file}", edits)


def cpu_recurrent(edits: dict[str, str], file: str = "products.py") -> Mutant:
    return Mutant("CPU recurrent", f"coba_triton/backend/cpu/{file}", edits)


def synapses(file: str, edits: dict[str, str]) -> Mutant:
    return Mutant("synapses", f"coba_triton/{file}", edits)


SUMS_BARRIER = "tl.debug_barrier()  # the sums are complete before any thread takes them"
CLEARED = "tl.store(place, tl.zeros_like(i), mask=mask)"
ARRIVAL = "slot = sent + load_steps(delays_ptr, source, synapse, mask, per_ms, DELAY)"
SPIKE = "spike = fire(excess(u, c), left)"
CURRENT = "{}g_e * (c.e_rev_E - c.coupling * s.v)) + {}g_i * (c.e_rev_I - c.coupling * s.v))"
OWN_NEURONS = "neurons = tl.program_id(0).to(tl.int64) * {} + tl.arange(0, BLOCK)"
RESET_GRADIENT = "((grad_z + lam.v * c.v_reset) - lam.v * kept.u)"
BACKWARD_SWEEP = "for i in tl.static_range(STEPS - 1, {}, -1):"
LIST_BARRIER = "tl.debug_barrier()  # the list is complete before any thread reads it"
ADJOINT_BARRIER = "tl.debug_barrier()  # the adjoints of all neurons are written before any thread reads them"
KEPT_LEFT = "left = left_at(frame, {}FRAME_LEFT, j, holds)\n        a ="
STORED_SPIKE = "z: Any = 1.0 if (words[j] >> {}) & 1 else 0.0"
ROW_OF_CELLS = "cells[np.uintp(at + n * lanes + {})] = rows["
CARRIED = "[max(0, len(sent) - longest{}) : -1]{}"
LAST_SYNAPSE = "first, last = w.splits[part, source], w.splits[part + 1, source]"
IN_HISTORY = "by_spikes[begin - here.start :] += grad_history[begin - first : here.stop - first]"

MUTANTS = {
    "a potential on the threshold spikes": neuron({"z = x > 0.0": "z = x >= 0.0"}),
    "inhibition decays with excitation's rate": neuron({"g_i = g_i + c.decay_i * g_i": "g_i = g_i + c.decay_e * g_i"}),
    "voltage before conductances": neuron({CURRENT.format("", ""): CURRENT.format("s.", "s.")}),
    "reset adds instead of replacing": neuron({"(1.0 - z) * u.v + z * c.v_reset": "u.v + z * c.v_reset"}),
    "Triton: a potential on the threshold spikes": step({SPIKE: "spike = excess(u, c) >= 0.0"}),
    "a NaN input is dropped": step({"tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)": "tl.maximum(x, 0.0)"}),
    "mask one too wide": feed_forward({"mask = None if EVEN else neurons < M": "mask = None if EVEN else neurons <= M"}),
    "programs overlap": feed_forward({OWN_NEURONS.format("BLOCK"): OWN_NEURONS.format("(BLOCK // 2)")}),
    "offsets of 32 bits": feed_forward({"row = (t + i) * M\n": "row = (t + i).to(tl.int32) * M.to(tl.int32)\n"}),
    "last word of packed spikes left out": feed_forward({"if (end % 32 == 0) | (end == T):": "if end % 32 == 0:"}),
    "packed spikes one bit off": feed_forward({"<< ((t + i) % 32).to(tl.int32))": "<< ((t + i + 1) % 32).to(tl.int32))"}),
    "checkpoints of the rest all read as one": feed_forward(
        {"(T // EVERY + t % EVERY) * FIELDS * M": "T // EVERY * FIELDS * M"}
    ),
    "replay starts from the wrong checkpoint": feed_forward(
        {"checkpoints_ptr + block * FIELDS * M": "checkpoints_ptr + tl.maximum(block - 1, 0) * FIELDS * M"}
    ),
    "reset's gradient dropped": adjoint({RESET_GRADIENT: "grad_z"}),
    "recorded gradients one step late": feed_forward({"before = t + i - 1": "before = t + i"}),
    "reverse sweep leaves out the first step of a chunk": feed_forward(
        {BACKWARD_SWEEP.format("-1"): BACKWARD_SWEEP.format("0 if STEPS > 1 else -1")}
    ),
    "multiplications and additions fuse": launch({"enable_fp_fusion=False": "enable_fp_fusion=True"}, "launch.py"),
    "ragged launch says it is whole": launch({"EVEN=neurons % block == 0": "EVEN=neurons >= block"}),
    "no barrier after the list of spikes": recurrent({LIST_BARRIER: "pass"}),
    "no barrier after the adjoints": recurrent({ADJOINT_BARRIER: "pass"}),
    "one event too many": recurrent(
        {
            "listed = start + i < count": "listed = start + i <= count",
            "tl.where(mask, start + i, count) < count": "mask & (start + i <= count)",
        }
    ),
    "graded events count as 1": recurrent({"drive_i = drive_i + relu(-row) * values[i]": "drive_i = drive_i + relu(-row)"}),
    "a source without an event adds its weight": recurrent(
        {"tl.where(value != 0, excitatory, 0.0) * value": "excitatory * value"}
    ),
    "rows past the last one are projected": recurrent({"mask=tl.where(mask, row, R) < R": "mask=mask"}),
    "barrier without release and acquire": recurrent({'sem="release"': 'sem="relaxed"', 'sem="acquire"': 'sem="relaxed"'}),
    "barrier's target one short": recurrent(
        {
            "(arrived < target)": "(arrived < target - 1)",
            "arrived >= target": "arrived >= target - 1",
        }
    ),
    "groups of rows that go back together share a counter": recurrent({"arrived_ptr + group": "arrived_ptr"}),
    "the weights of the next neuron send back": recurrent(
        {"weights_ptrs = weights_ptr + sources[:, None] * N": "weights_ptrs = weights_ptr + (sources[:, None] + 1) * N"}
    ),
    "exchange with a single buffer": recurrent({"((t % 2) * B + row) * N": "row * N"}),
    "sparse: a delay is one step too short": sparse({ARRIVAL: f"{ARRIVAL} - 1"}),
    "sparse: delays are cut off, not rounded": sparse(
        {"((steps + 8388608.0) - 8388608.0).to(tl.int32)": "steps.to(tl.int32)"}
    ),
    "sparse: a slot of the ring is not cleared": sparse({CLEARED: "pass"}),
    "sparse: the last synapse of a source is left out": sparse(
        {"mask = synapse < end[:, None]": "mask = synapse < end[:, None] - 1"}
    ),
    "sparse: only the first synapses of a source are sent": sparse(
        {"for offset in range(0, longest, LANES):": "for offset in range(0, tl.minimum(longest, LANES), LANES):"}
    ),
    "sparse: signs are swapped": sparse(
        {"tl.where(weight < 0.0, limit, 0) + slot": "tl.where(weight > 0.0, limit, 0) + slot"}
    ),
    "sparse: inhibitory weights have the excitatory scale": sparse({"tl.where(weight < 0.0, scale_i, scale_e)": "scale_e"}),
    "sparse: the ring is one slot too long": sparse(
        {"tl.where(slot >= R, slot - R, slot)": "tl.where(slot > R, slot - R, slot)"}
    ),
    "sparse: a delivery wraps one slot too late": sparse(
        {"slot = tl.where(slot >= limit, slot - limit, slot)": "slot = tl.where(slot > limit, slot - limit, slot)"}
    ),
    "sparse: an integer is cut off, not rounded": sparse({"nearest(size * scale)": "(size * scale)"}),
    "sparse: negative values of a history add": sparse({"tl.where(value < 0.0, -amount, amount)": "amount"}),
    "sparse: no barrier after the sums": sparse({SUMS_BARRIER: "pass"}),
    "sparse: a meeting orders nothing": sparse_meeting({'sem="release"': 'sem="relaxed"', 'sem="acquire"': 'sem="relaxed"'}),
    "sparse: a meeting's target is one short": sparse_meeting(
        {"(arrived < target)": "(arrived < target - 1)", "return arrived >= target": "return arrived >= target - 1"}
    ),
    "sparse: a list's own counter is cleared": sparse({"(1 - counter) * B": "counter * B"}),
    "sparse: a begun word is lost": sparse({"mask=begun)": "mask=begun & (end < 0))"}),
    "sparse: a coarser grid is not made finer again": sparse(
        {"tl.load(scales_ptr + 2 + sign).to(tl.float64) * unit": "tl.load(scales_ptr + 2 + sign).to(tl.float64)"}
    ),
    "sparse: an input that is not finite drives nothing": sparse({'tl.where(infinite, float("nan"), unit)': "unit"}),
    "sparse: the gradient is read a step late": sparse(
        {"arrival = sent + load_steps(delays_ptr, held": "arrival = sent + 1 + load_steps(delays_ptr, held"}
    ),
    "sparse: inhibitory weights keep the gradient's sign": sparse({"tl.where(weight < 0.0, -total, total)": "total"}),
    "sparse: the gradient forgets who fired": sparse({"other=0.0) * value,)": "other=0.0),)"}),
    "sparse: windows longer than the shortest delay": sparse_launch(
        {"min(net.shortest, SPARSE_WINDOW": "min(net.shortest + 1, SPARSE_WINDOW"}
    ),
    "sparse: rows of a sample are strided": sparse_launch(
        {"permute(1, 3, 0, 2).contiguous()": "permute(1, 3, 2, 0).contiguous()"}
    ),
    "CPU sparse: a delay is one step too short": cpu_sparse(
        {"int(np.rint(w.delays[index] * w.per_ms))": "int(np.rint(w.delays[index] * w.per_ms)) - 1"}
    ),
    "CPU sparse: a slot of the ring is not cleared": cpu_sparse({"arriving.e[j] = 0\n": "pass\n"}, "recurrent.py"),
    "CPU sparse: a held neuron spikes": cpu_sparse(
        {"if forced else fire(excess(u, c), left)": "if forced else excess(u, c) > 0.0"}, "recurrent.py"
    ),
    "CPU sparse: what is under way when a block begins is lost": cpu_sparse(
        {"past_the_end or not under_way": "not under_way"}
    ),
    "CPU sparse: the second spike of a pair adds nothing to the weights' gradient": cpu_sparse(
        {" + flow[np.uintp(place + a)]) + flow[np.uintp(place + b)]": " + flow[np.uintp(place + a)])"}, "sparse_backward.py"
    ),
    "CPU sparse: the last synapse of a source is left out": cpu_sparse({LAST_SYNAPSE: f"{LAST_SYNAPSE} - 1"}),
    "CPU sparse: links that were moved up add as much": cpu_sparse(
        {"np.int64(link >> bits) if moved": "np.int64(link) if moved"}
    ),
    "CPU sparse: a link adds its place as well": cpu_sparse({"np.int64(link & ~of_place)": "np.int64(link)"}),
    "CPU sparse: links that fill up add again": cpu_sparse(
        {"numbers[begin + k] & np.uint64(of_place)": "numbers[begin + k]"}
    ),
    "CPU sparse: threads send along the links of all neurons": cpu_sparse({"part, parts, sent)": "0, parts, sent)"}),
    "CPU sparse: signs are swapped": cpu_sparse({"1 if weight < 0 else 0": "0 if weight < 0 else 1"}),
    "CPU sparse: the unit of graded inputs is forgotten": cpu_sparse(
        {"incoming.scales[2] * unit": "incoming.scales[2]", "incoming.scales[3] * unit": "incoming.scales[3]"}
    ),
    "CPU sparse: every block begins with the first slot": cpu_sparse({"(start + since) % longest": "0"}),
    "CPU sparse: a thread's synapses begin one neuron late": cpu_sparse({"bounds[p])": "bounds[p] + 1)"}),
    "CPU sparse: threads do not meet": cpu_sparse({"while word >> _NUMBER != number:": "while False:"}, "meeting.py"),
    "CPU sparse: more steps together than the shortest delay has": cpu_sparse(
        {"min(net.shortest, sparse.MOST_TOGETHER)": "min(net.shortest + 1, sparse.MOST_TOGETHER)"}, "launch/sparse.py"
    ),
    "CPU sparse: lanes are mixed up": cpu_sparse(
        {ROW_OF_CELLS.format("lane"): ROW_OF_CELLS.format("(lanes - 1 - lane)")}, "sparse_backward.py"
    ),
    "CPU sparse: what a spike adds to its weights is that of another row": cpu_sparse(
        {"((row[n] >> bit) & 1) << lane": "((row[n] >> bit) & 1) << (present - 1 - lane)"}, "sparse_backward.py"
    ),
    "CPU sparse: whole groups of rows are taken one neuron late": cpu_sparse(
        {"lanes, rows, start + n + lane * apart, apart": "lanes, rows, start + n + 1 + lane * apart, apart"},
        "sparse_backward.py",
    ),
    "CPU sparse: lanes forget what they had added": cpu_sparse(
        {"return builder.fadd(total, builder.fmul(every, loaded))": "return builder.fmul(every, loaded)"}, "lanes.py"
    ),
    "CPU sparse: a weight of 0 has a gradient": cpu_sparse(
        {"0 if weight == 0 else": "0 if weight != weight else"}, "sparse_backward.py"
    ),
    "CPU sparse: inhibitory weights keep the gradient's sign": cpu_sparse(
        {"signed = -by_weight[s] if": "signed = by_weight[s] if"}, "sparse_backward.py"
    ),
    "synapses: a spike arrives one step late": synapses(
        "backend/reference.py", {"len(history) - w.steps]": "len(history) - 1 - w.steps]"}
    ),
    "synapses: 64-bit sums on a grid two bits too fine": synapses("ops/grid.py", {"torch.int64: 62": "torch.int64: 64"}),
    "synapses: 32-bit sums on a grid two bits too fine": synapses("ops/grid.py", {"torch.int32: 30": "torch.int32: 32"}),
    "synapses: 32-bit sums of weights that are not exact": synapses(
        "ops/grid.py", {"return bool((scaled == torch.round(scaled)).all())": "return True"}
    ),
    "synapses: changes that PyTorch does not count are not seen": synapses("ops/grid.py", {"contents_of(weights))": "0)"}),
    "synapses: what was made of other tensors is found": synapses("ops/kept.py", {"all(a is b for": "all(a is a for"}),
    "synapses: spikes under way are lost between calls": synapses(
        "functional.py", {CARRIED.format("", ""): CARRIED.format("", " * 0")}
    ),
    "synapses: the oldest spikes under way are lost between calls": synapses(
        "functional.py", {CARRIED.format("", ""): CARRIED.format(" + 2", "")}
    ),
    "synapses: a matrix loses its delay": synapses(
        "ops/wiring.py", {'delay if name == "recurrent_weights" else None': "None"}
    ),
    "synapses: spikes in the last history have no gradient": synapses("ops/sparse_blocks.py", {IN_HISTORY: "pass"}),
    "synapses: what arrives after a block has no gradient": synapses(
        "ops/sparse_blocks.py", {"later = adjoints[:longest].clone()": "later = torch.zeros_like(adjoints[:longest])"}
    ),
    "synapses: what has changed is taken for what it was": synapses(
        "ops/kept.py", {"found[0] != (fits, _versions(tensor, *others))": "found[0][0] != fits"}
    ),
    "spikes before a block from the wrong bit": blocks({">> (WORD_BITS - 1)) & 1": ">> (WORD_BITS - 2)) & 1"}),
    "inhibitory weights keep the gradient's sign": blocks({"inhibitory, rows.sign()": "-inhibitory, rows.sign()"}),
    "a held neuron spikes": refractory("coba_triton/neuron/step.py", {"z = z & (left <= 0.0)": "z = z"}),
    "a held neuron integrates": refractory("coba_triton/neuron/step.py", {"where(left > 0.0, c.v_reset, v)": "v"}),
    "held one step too long": refractory("coba_triton/neuron/step.py", {"z * c.n_ref": "z * (c.n_ref + 1.0)"}),
    "a held step passes a gradient": refractory(
        "coba_triton/neuron/adjoint.py", {"du = where(left > 0.0, 0.0, du)": "du = du"}
    ),
    "a held step's reset gets no gradient": refractory(
        "coba_triton/neuron/adjoint.py", {"where(left > 0.0, lam.v, by_reset)": "by_reset"}
    ),
    "Triton: the adjoint reads another field than left": refractory(
        "kernels/neuron.py", {"kept = kept + (fields[3],)": "kept = kept + (fields[0],)"}
    ),
    "CPU: the adjoint reads left of the step after": refractory(
        "coba_triton/backend/cpu/feed_forward.py",
        {KEPT_LEFT.format(""): KEPT_LEFT.format("FRAME + ")},
    ),
    "CPU recurrent: every step reads the first gradient by the spikes": cpu_recurrent(
        {"t if len(gradient) > 1 else 0": "0"}, "recurrent.py"
    ),
    "CPU: the product back takes the other sign's adjoint": cpu_recurrent(
        {"select(inhibitory[k], i, e)": "select(inhibitory[k], e, i)"}
    ),
    "CPU: the product back forgets the last neuron": cpu_recurrent(
        {"for_range(builder, neurons) as": "for_range(builder, builder.sub(neurons, integer(1))) as"}
    ),
    "a current depends on the potential": current(
        "coba_triton/neuron/step.py", {"c.e_rev_E - c.coupling * s.v": "c.e_rev_E - s.v"}
    ),
    "a current's adjoint depends on the potential": current(
        "coba_triton/neuron/adjoint.py", {"ds * (c.e_rev_I - c.coupling * kept.v)": "ds * (c.e_rev_I - kept.v)"}
    ),
    "a current draws the potential back": current(
        "coba_triton/neuron/adjoint.py", {"(ds * kept.g_e) * c.coupling": "ds * kept.g_e"}
    ),
    "a current's adjoint multiplies in another order": current(
        "coba_triton/neuron/adjoint.py", {"(ds * kept.g_i) * c.coupling": "ds * (kept.g_i * c.coupling)"}
    ),
    "the capacitance's gradient takes currents for conductances": current(
        "coba_triton/neuron/adjoint.py", {"kept.g_e * (c.e_rev_E - c.coupling * kept.v)": "kept.g_e * (c.e_rev_E - kept.v)"}
    ),
    "Triton: the coupling is another constant": current("kernels/neuron.py", {"values[11]": "values[10]"}),
    "CPU: the coupling that neurons share is another constant": current(
        "coba_triton/backend/cpu/rows.py", {"shared[11]": "shared[10]"}
    ),
    "CPU: a neuron's coupling is another constant": current(
        "coba_triton/backend/cpu/rows.py", {"tile[first + 11 * ROW + j]": "tile[first + 10 * ROW + j]"}
    ),
    "time chunks: a repair stops after one stretch": chunks({"while apart & (t < end):": "if apart & (t < end):"}),
    "time chunks: an end that a repair changed is not told": chunks(
        {"tl.store(late_ptr + tile * chunks + chunk, late.to(tl.uint8))": "tl.store(late_ptr + tile * chunks + chunk, 0)"}
    ),
    "time chunks: settling forgets what it changed": chunks(
        {"        again = late\n": "        again = tl.load(late_ptr + tile * chunks + chunk) != 0\n"}
    ),
    "time chunks: back, a note is compared with the next one": chunks(
        {"notes_ptr + before // CHECK * NUM_FIELDS": "notes_ptr + (before // CHECK - 1) * NUM_FIELDS"}
    ),
    "time chunks: back, settling forgets what it changed": chunks(
        {"                late = differs(lam,": "                late = late & differs(lam,"}
    ),
    "time chunks: only potentials are compared": chunks({"range(1, FIELDS)": "range(1, 1)"}),
    "CPU time chunks: what a repair reached is not looked at": cpu_chunks(
        {"if len(apart) == 0:": "if len(apart) == 0 or tried == len(at):"}
    ),
    "CPU time chunks: what a run in order has passed is run again": cpu_chunks(
        {"np.flatnonzero(at > at[0])": "np.arange(1, len(at))"}
    ),
    "CPU time chunks: the final state of the first attempt stays": cpu_chunks(
        {"if at[count - 1] == units:": "if not compare:"}
    ),
    "CPU time chunks: a chunk leaves its neurons' constants behind": cpu_chunks(
        {"range(len(tile) // ROW)": "range(CONSTANTS // ROW)"}, "chunks.py"
    ),
    "CPU time chunks: spikes go on after the end": cpu_chunks(
        {"&= (1 << count % WORD) - 1": "&= (1 << WORD) - 1"}, "chunks.py"
    ),
    "CPU time chunks: back, what comes in at the end is lost in a shorter unit": cpu_chunks(
        {"if begins >= 0 and": "if begins < 0 and"}, "chunks_back.py"
    ),
    "CPU time chunks: back, the state before a chunk is taken for recorded": cpu_chunks(
        {"if 0 < t < steps:": "if 0 < t < steps and t % STEPS:"}, "chunks_back.py"
    ),
    "CPU time chunks: back, a unit begins with the sum of the one after it": cpu_chunks(
        {"clear_sums(tile, 0, lanes)": "clear_sums(tile, 0, 0)"}, "chunks_back.py"
    ),
    "CPU: a potential on the threshold spikes": cpu({SPIKE: "spike = excess(u, c) >= 0.0"}),
    "CPU: replay reads the neighbouring bit": cpu({STORED_SPIKE.format("bit"): STORED_SPIKE.format("(bit ^ 1)")}),
    "CPU: words keep what was there": cpu_rows(
        {"words[j] = word if bit == 0 else words[j] | word": "words[j] = words[j] | word"}
    ),
    "CPU: bfloat16 is cut off": cpu_rows({"(b + 0x7FFF + ((b >> 16) & 1)) >> 16": "b >> 16"}),
    "CPU: adjoint reads the conductances before the step": cpu({"after.g_e, after.g_i)": "before.g_e, before.g_i)"}),
}


def plant(mutant: Mutant | None, folder: Path) -> None:
    """A copy of the sources, with the bug, and of the kernels' machine code, which serves where the bug is elsewhere."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=shutil.ignore_patterns("*.pyc"))
        else:
            shutil.copy(source, folder / name)
    if mutant:
        path = folder / mutant.file
        path.write_text(mutant.apply(path.read_text()))


def notices(mutant: Mutant | None, layer: str, arguments: list[str]) -> bool:
    """Whether a test of the layer fails, hangs, or dies of a signal.

    Raises:
        RuntimeError: if the tests could not be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        plant(mutant, Path(folder))
        environment = os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{folder}/tests", "OMP_NUM_THREADS": "1"}
        environment["TRITON_INTERPRET"] = "0" if layer == "executed" else "1"
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
            )
        except subprocess.TimeoutExpired:
            return True
    ran = done.returncode <= 0 or " failed" in done.stdout or " error" in done.stdout  # less than 0: a signal
    if done.returncode > 1 or not ran:  # Python ends with 1, too, where pytest cannot be imported
        raise RuntimeError(f"{layer}: pytest ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.returncode != 0


def cells(name: str) -> list[str]:
    """A bug's row of the table: ``noticed``, ``no``, or empty where a layer does not reach the code."""
    mutant = MUTANTS[name]
    row = []
    for layer in LAYERS:
        arguments = AREAS[mutant.area].get(layer)
        row.append("" if arguments is None else "noticed" if notices(mutant, layer, arguments) else "no")
    print(f"{name}: {dict(zip(LAYERS, row, strict=True))}", flush=True)
    return row


def read(table: Path) -> dict[str, list[str]]:
    """The rows of a table that was written."""
    rows = {}
    for line in table.read_text().splitlines() if table.exists() else []:
        name, *verdicts = [cell.strip() for cell in line.strip("|").split("|")]
        if name in MUTANTS and len(verdicts) == len(LAYERS) + 1:
            rows[name] = verdicts[1:]
    return rows


def write(table: Path, rows: dict[str, list[str]]) -> None:
    lines = [
        "# Planted bugs",
        "",
        "`make mutants` plants each in a copy of the sources and runs the tests of every layer that reaches the code.",
        "",
    ]
    lines += [f"* **{layer}**: {what}" for layer, what in LAYERS.items()]
    lines += ["", f"| bug | file | {' | '.join(LAYERS)} |", "| --- | --- |" + " --- |" * len(LAYERS)]
    for name, mutant in MUTANTS.items():
        if name in rows:
            lines.append(f"| {name} | {Path(mutant.file).name} | {' | '.join(rows[name])} |")
    table.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="bugs to plant; all without a name")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    names = asked.names or list(MUTANTS)
    with ThreadPoolExecutor(asked.jobs) as pool:
        sound = {(layer, *arguments) for name in names for layer, arguments in AREAS[MUTANTS[name].area].items()}
        for failed in pool.map(lambda run: notices(None, run[0], list(run[1:])), sorted(sound)):
            if failed:
                raise SystemExit("the tests fail without a planted bug: mend that first")
        rows = dict(zip(names, pool.map(cells, names), strict=True))
    write(asked.table, read(asked.table) | rows)
    missed = [name for name, row in rows.items() if "noticed" not in row]
    print(f"{len(rows) - len(missed)} of {len(rows)} planted bugs were noticed")
    if missed:
        raise SystemExit("no layer noticed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
