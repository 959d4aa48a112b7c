"""Breaks the package in one place after the other, and demands that its tests notice.

    python -m tests.stress.mutations [--jobs 2] [NAME ...]

Each mutation is one small, plausible mistake. It is made in a copy of the working tree, the tests that
should know are run there until the first fails, and the mistake is taken back. A mutation that survives
is a test that is missing. Prints, for each, the test that found it; exits with 1 if one was not found.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 600
"""Seconds for the tests of one mutation; beyond that it counts as found, for it hangs."""


@dataclass(frozen=True)
class Mutation:
    """One mistake: in ``file``, ``old`` (which stands there once) becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    tests: str


EXACT = "tests/estimators/test_exactness.py"
CHEAPER = "tests/estimators/test_cheaper_acc.py"
STATISTICS = "tests/estimators/test_running_statistics.py"
FIDELITY = "tests/estimators/test_fidelity.py"
BITS = "tests/replay/test_bit_exact.py"
FORMS = "tests/replay/test_loss_forms.py"
INDICES = "tests/capture/test_indices.py"
MODULES = "tests/test_modules.py"
ENGINE = "tests/test_engine.py"
STORE = "tests/trajectory"
SCORES = "tests/test_scores.py"
DVEMB = "tests/estimators/test_dvemb.py"
EMBEDDINGS = "tests/test_embeddings.py"
QUERY = "tests/test_query.py"
PAGE = "tests/reports/test_html.py"
BROWSER = "tests/reports/test_html_browser.py"
LIVE = "tests/test_live.py"
DEVICES = "tests/test_devices.py"
LOGGERS = "tests/reports/test_loggers.py"
SAMPLES = "tests/reports/test_samples.py"
CLI = "tests/test_cli.py"
EXPLAIN = "tests/test_explain.py"
GROUPS = "tests/test_groups.py"

MUTATIONS = [
    # ------------------------------------------------------------------ capture
    Mutation(
        "index pairing: one batch late",
        "capture/indices.py",
        "while len(sampler.drawn) > outstanding:",
        "while len(sampler.drawn) > outstanding + 1:",
        INDICES,
    ),
    Mutation(
        "index pairing: the prefetched batch instead of the one at hand",
        "capture/indices.py",
        "samples, prints = delivered[0]",
        "samples, prints = delivered[-1]",
        INDICES,
    ),
    Mutation(
        "a drawing step is recorded as one that draws nothing",
        "capture/draws.py",
        "return Verdict(draws=True, random=None if known else before)",
        "return Verdict(draws=False)",
        BITS,
    ),
    Mutation(
        "a random state is left out where a sampler drew in between",
        "capture/draws.py",
        "random=None if known else before",
        "random=None if left is not None else before",
        BITS,
    ),
    Mutation(
        "calls between two readings are taken for ones that drew nothing",
        "capture/draws.py",
        "rest = Verdict(draws=verdict.draws)",
        "rest = Verdict(draws=False)",
        "tests/capture/test_draws.py",
    ),
    Mutation(
        "a run that drew goes on unread",
        "capture/draws.py",
        "waiting and not (self._drew or self.closely",
        "waiting and not (self.closely",
        "tests/capture/test_draws.py",
    ),
    Mutation(
        "numpy's and python's generators are not watched",
        "capture/draws.py",
        "return self._host_draws or self._reads < 2 * _CLOSELY",
        "return self._host_draws",
        MODULES,
    ),
    Mutation(
        "the settings are those before the run",
        "capture/recorder.py",
        "if settings != self._settings:",
        "if not self._settings:",
        EXACT,
    ),
    # ------------------------------------------------------------------ the store
    Mutation(
        "a checksum is not compared",
        "trajectory/files.py",
        "if sha256(content).hexdigest() != stored.sha256:",
        "if False:",
        STORE,
    ),
    Mutation(
        "the manifest is not compared as a whole",
        "trajectory/manifest.py",
        "if content != manifest.encode():",
        "if False:",
        STORE,
    ),
    Mutation(
        "the manifest is written before the files it names are in place",
        "trajectory/files.py",
        "        os.replace(temporary, path)\n",
        "        os.replace(temporary, path) if path.name == MANIFEST else path.write_bytes(content)\n",
        "tests/trajectory/test_killed.py tests/trajectory/test_writer.py",
    ),
    Mutation(
        "checkpoints: every candidate is thinned one time too often",
        "trajectory/checkpoints.py",
        "while _index(step) // stride + 1 > room:",
        "while _index(step) // stride + 1 >= room:",
        "tests/trajectory lightning_accie/trajectory",
    ),
    Mutation(
        "checkpoints: thinned ones stay in the manifest",
        "trajectory/writer.py",
        "            if stored.step not in keep:\n",
        "            if stored.step in keep and stored.step:\n",
        STORE,
    ),
    Mutation(
        "visits: a sample twice in a chunk counts once",
        "trajectory/chunks.py",
        "counts.astype(np.int64)",
        "np.ones_like(counts, dtype=np.int64)",
        STORE,
    ),
    Mutation(
        "scores: the numbers need not be those of the JSON",
        "scores_files.py",
        'if sha256(numbers).hexdigest() != document.get("tensors_sha256"):',
        "if False:",
        "tests/test_scores.py tests/test_damage.py",
    ),
    # ------------------------------------------------------------------ replay
    Mutation(
        "the random state is not restored",
        "replay/module.py",
        "            random.restore(self._cuda)\n        self.trainer.stand_at",
        "            pass\n        self.trainer.stand_at",
        BITS,
    ),
    Mutation(
        "what a step leaves out is told on the CPU",
        "replay/step.py",
        "ones * ~self._removes(removed).to(ones.device)",
        "ones * ~self._removes(removed)",
        DEVICES,
    ),
    Mutation(
        "NAdam's product of momenta begins on the CPU",
        "replay/adaptive_rules.py",
        "torch.ones((), dtype=_scalar_dtype(), device=param.device)",
        "torch.ones((), dtype=_scalar_dtype())",
        DEVICES,
    ),
    Mutation(
        "vmap draws dropout",
        "replay/operators.py",
        "(input.is_contiguous() and input.is_cpu)",
        "input.is_contiguous()",
        DEVICES,
    ),
    Mutation(
        "the replayed step sees no epoch",
        "replay/module.py",
        "self.trainer.stand_at(micro.epoch,",
        "self.trainer.stand_at(0,",
        BITS,
    ),
    Mutation(
        "buffers are not put back",
        "replay/walker.py",
        "        self.program.load_buffers(buffers)\n",
        "",
        BITS,
    ),
    Mutation(
        "the accumulation weight is forgotten in the replay",
        "replay/walker.py",
        "value = value / loss.micro.divisor * step.loss_scale",
        "value = value * step.loss_scale",
        BITS,
    ),
    Mutation(
        "the accumulation weight is forgotten in forward derivatives",
        "replay/module.py",
        "around=False)\n        return loss / self.micro.divisor",
        "around=False)\n        return loss",
        EXACT,
    ),
    Mutation(
        "the accumulation weight is forgotten in backward derivatives",
        "replay/module.py",
        "return Bound(loss / self.micro.divisor, ",
        "return Bound(loss, ",
        EXACT,
    ),
    Mutation(
        "clipping by norm has no derivative",
        "replay/update.py",
        "return {name: g * coefficient for name, g in grads.items()}",
        "return {name: g * coefficient.detach() for name, g in grads.items()}",
        EXACT,
    ),
    Mutation(
        "clipping by norm takes each tensor's own norm",
        "replay/update.py",
        "total = torch.linalg.vector_norm(norms)",
        "total = norms.max()",
        BITS,
    ),
    Mutation(
        "clipping by value is one-sided",
        "replay/update.py",
        "g.clamp(-self.limit, self.limit)",
        "g.clamp_max(self.limit)",
        BITS,
    ),
    Mutation(
        "the counts of updates stand still",
        "replay/walker.py",
        "counts = {name: n + (name in ran.gradient) for name, n in snapshot.counts.items()}",
        "counts = dict(snapshot.counts)",
        BITS,
    ),
    Mutation(
        "SGD: no dampening",
        "replay/update_rules.py",
        'add(grad, alpha=1 - settings["dampening"])',
        "add(grad)",
        EXACT,
    ),
    Mutation(
        "SGD: no dampening in the rule's own vjp",
        "replay/update_rules.py",
        'grad = buffer if first else buffer.mul(1 - settings["dampening"])',
        "grad = buffer",
        EXACT,
    ),
    Mutation(
        "SGD: dampening at the first step too, in the rule's own vjp",
        "replay/update_rules.py",
        'grad = buffer if first else buffer.mul(1 - settings["dampening"])',
        'grad = buffer.mul(1 - settings["dampening"])',
        EXACT,
    ),
    Mutation(
        "SGD: Nesterov without the look ahead",
        "replay/update_rules.py",
        'grad = torch.add(grad, buffer, alpha=momentum) if settings["nesterov"] else buffer',
        "grad = buffer",
        BITS,
    ),
    Mutation(
        "SGD: Nesterov's term is missing in the rule's own vjp",
        "replay/update_rules.py",
        "            if nesterov:\n                grad = grad + direction\n",
        "",
        EXACT,
    ),
    Mutation(
        "SGD: weight decay with the wrong sign, in the rule's own vjp",
        "replay/update_rules.py",
        'param = torch.add(param, grad, alpha=settings["weight_decay"])',
        'param = torch.sub(param, grad, alpha=settings["weight_decay"])',
        EXACT,
    ),
    Mutation(
        "SGD: maximize is forgotten in the rule's own vjp",
        "replay/update_rules.py",
        'return param, before, -grad if settings["maximize"] else grad',
        "return param, before, grad",
        EXACT,
    ),
    Mutation(
        "Adam: no bias correction of the first moment",
        "replay/update_rules.py",
        "step_size = lr / (1 - beta1**count)",
        "step_size = lr",
        BITS,
    ),
    Mutation(
        "Adam: the second moment is corrected by the step before",
        "replay/update_rules.py",
        "(1 - beta2**count) ** 0.5",
        "(1 - beta2 ** max(1, step)) ** 0.5",
        BITS,
    ),
    Mutation(
        "Adam: amsgrad takes the last instead of the largest",
        "replay/update_rules.py",
        "torch.maximum(largest, exp_avg_sq)",
        "exp_avg_sq",
        BITS,
    ),
    Mutation(
        "AdamW: coupled weight decay",
        "replay/update_rules.py",
        'if settings.get("decoupled_weight_decay", self.decoupled):',
        "if False:",
        EXACT,
    ),
    Mutation(
        "Adam: an infinite derivative where a weight never got a gradient",
        "replay/update_rules.py",
        "second.clamp_min(torch.finfo(second.dtype).tiny).sqrt()",
        "second.sqrt()",
        f"{MODULES} tests/estimators",
    ),
    Mutation(
        "duplicate draws: only the first place of a sample is left out",
        "replay/step.py",
        "return ones * ~self._removes(removed).to(ones.device)",
        "hit = self._removes(removed)\n        return ones * ~(hit & (hit.cumsum(1) == 1))",
        "tests/test_loaders.py",
    ),
    Mutation(
        "counterfactuals one by one: each is the first",
        "replay/step.py",
        "lambda t: t[k], rows)",
        "lambda t: t[0], rows)",
        MODULES,
    ),
    Mutation(
        "a penalty on the weights is left out with the sample",
        "replay/step.py",
        "                if not self.penalty:\n",
        "                if True:\n",
        "tests/estimators tests/replay tests/test_engine.py",
    ),
    Mutation(
        "the `around` form forgets the weights",
        "replay/per_sample.py",
        "weights - 1",
        "weights * 0",
        "tests/replay tests/estimators",
    ),
    Mutation(
        "the denominator counts ignored targets",
        "replay/per_sample.py",
        "        return kept.sum()\n",
        "        return float(elements.numel())\n",
        FORMS,
    ),
    Mutation(
        "the denominator forgets class weights",
        "replay/per_sample.py",
        "return weight[torch.where(kept, target, 0)].mul(kept).sum()",
        "return kept.sum()",
        FORMS,
    ),
    # ------------------------------------------------------------------ estimators
    Mutation(
        "SGD-IE: the other sign",
        "estimators/sgd_ie.py",
        "-by_weight.double()",
        "by_weight.double()",
        EXACT,
    ),
    Mutation(
        "SGD-IE: a sample twice in a batch counts once",
        "estimators/sgd_ie.py",
        "walk.influence.index_add_(0, part.map.samples, -by_weight.double().cpu())",
        "walk.influence[part.map.samples] -= by_weight.double().cpu()",
        "tests/test_loaders.py",
    ),
    Mutation(
        "ACC-SGD-IE: the effect begins one step late",
        "estimators/acc_sgd_ie.py",
        "begun = int((first <= visit.step).sum())",
        "begun = int((first < visit.step).sum())",
        EXACT,
    ),
    Mutation(
        "ACC-SGD-IE: no correction by the sample's own curvature",
        "replay/step.py",
        "                curved[name].index_add_(0, places, value * scale)\n",
        "                scale = 0.0\n",
        EXACT,
    ),
    Mutation(
        "ACC-SGD-IE: a correction at random is not divided by its probability",
        "estimators/thinning.py",
        "return applied[place] / self.probability",
        "return applied[place].float()",
        CHEAPER,
    ),
    Mutation(
        "ACC-SGD-IE: a segment's curvature is not scaled",
        "estimators/thinning.py",
        "return float(length) if",
        "return 1.0 if",
        CHEAPER,
    ),
    Mutation(
        "layers: the rest does not count in the gradient's norm",
        "replay/part.py",
        "{n: g for n, g in gradient.items() if n in rest}",
        "{}",
        CHEAPER,
    ),
    Mutation(
        "layers: the chosen ones are held too",
        "replay/part.py",
        "rest = {name: value for name, value in state.params.items() if name not in chosen.params}",
        "rest = dict(state.params)",
        CHEAPER,
    ),
    Mutation(
        "ACC-SGD-IE: Adam's bracket is linearised",
        "replay/step.py",
        "[(n - b) + m for n, b, m in leaves]",
        "[m for n, b, m in leaves]",
        EXACT,
    ),
    Mutation(
        "running statistics: the layer's momentum is not used",
        "replay/statistics.py",
        "factor = part.momentum\n",
        "factor = part.momentum and 0.1\n",
        STATISTICS,
    ),
    Mutation(
        "running statistics: a cumulative average forgets the micro-batches before it",
        "replay/statistics.py",
        "+ turn + 1)",
        "+ 1)",
        STATISTICS,
    ),
    Mutation(
        "running statistics: backwards, the first micro-batch is pulled through first",
        "replay/step.py",
        "for loss in reversed(self.losses):",
        "for loss in self.losses:",
        STATISTICS,
    ),
    Mutation(
        "ACC-SGD-IE: the query is not evaluated at the moved weights",
        "estimators/acc_sgd_ie.py",
        "moved = {name: at[name] + value",
        "moved = {name: at[name] - value",
        EXACT,
    ),
    Mutation(
        "ACC-SGD-IE: a blow-up is trusted",
        "estimators/acc_sgd_ie.py",
        '& (figures["relative_change"] <= BLOW_UP)',
        "",
        FIDELITY,
    ),
    Mutation(
        "exact replay: the other sign",
        "estimators/leave_one_out.py",
        'influence = figures.get("without", nothing) - everything',
        'influence = everything - figures.get("without", nothing)',
        EXACT,
    ),
    Mutation(
        "exact replay: begins after the first visit",
        "estimators/leave_one_out.py",
        "if visit.step >= begin:",
        "if visit.step > begin:",
        EXACT,
    ),
    Mutation(
        "TracIn: the optimiser's own state is passed by",
        "replay/step.py",
        "return back, torch.cat([_slopes(loss, state.params, direction) for loss in self.losses])",
        "return cotangent, torch.cat([_slopes(loss, state.params, direction) for loss in self.losses])",
        FIDELITY,
    ),
    # ------------------------------------------------------------------ query, ranking, scores
    Mutation(
        "the query: every batch weighs the same",
        "query.py",
        "return 0.0 if entry is None else entry.weight(self.name, place.batch)",
        "return 0.0 if entry is None else 1.0",
        QUERY,
    ),
    Mutation(
        "the query: a callable's batches weigh the same",
        "query.py",
        "return float(extract_batch_size(place.batch))",
        "return 1.0",
        QUERY,
    ),
    Mutation(
        "ranking: an exact figure does not replace the estimate",
        "ranking.py",
        "return torch.where(self.exact.isnan(), self.estimate, self.exact)",
        "return self.estimate",
        f"{ENGINE} {MODULES}",
    ),
    Mutation(
        "ranking: what was drawn at random passes as the strongest",
        "ranking.py",
        '"strongest": known & ~self.at_random',
        '"strongest": known',
        ENGINE,
    ),
    Mutation(
        "ranking: only harm is refined",
        "estimators/base.py",
        "helpful = order[len(order) - count // 2 :]",
        "helpful = order[(count + 1) // 2 : count]",
        f"{ENGINE} tests/estimators",
    ),
    Mutation(
        "agreement: Jaccard by the intersection's share of one side",
        "agreement.py",
        "len(one & other) / len(one | other)",
        "len(one & other) / len(one)",
        "tests/test_agreement.py",
    ),
    Mutation(
        "agreement: Jaccard of harm only",
        "agreement.py",
        "helpful = _jaccard(_lowest(-estimate, k), _lowest(-exact, k))",
        "helpful = harmful",
        "tests/test_agreement.py",
    ),
    Mutation(
        "cleaned(): the most helpful are dropped",
        "scores.py",
        "dropped = set(self.index[harmful[:k]].tolist())",
        "dropped = set(self.index[self._helpful()[:k]].tolist())",
        SCORES,
    ),
    Mutation(
        "cleaned(): drops by place instead of by index",
        "scores.py",
        "dropped = set(self.index[harmful[:k]].tolist())",
        "dropped = set(harmful[:k].tolist())",
        SCORES,
    ),
    Mutation(
        "ranked(): the strongest help first",
        "scores.py",
        "return self._rows(self._ranking())",
        "return self._rows(self._ranking(sign=-1))",
        SCORES,
    ),
    Mutation(
        "rows of what is not ranked: in another order than the tensors",
        "scores.py",
        "rows = self if self.rank is not None else self._rows(torch.arange(len(self)))",
        "rows = self if self.rank is not None else self.ranked()",
        SCORES,
    ),
    Mutation(
        "figures: a notebook shows no picture of them",
        "plots.py",
        "from lightning_accie.notebook_figure import NotebookFigure",
        "from matplotlib.figure import Figure as NotebookFigure",
        "tests/test_notebook.py",
    ),
    # ------------------------------------------------------------------ data value embeddings
    Mutation(
        "DVEmb: the other sign",
        "estimators/dvemb.py",
        "found.index_add_(0, places, -(step.slopes @ rows.T))",
        "found.index_add_(0, places, step.slopes @ rows.T)",
        DVEMB,
    ),
    Mutation(
        "DVEmb: the last visit alone",
        "estimators/dvemb.py",
        "found.index_add_(0, places, -(step.slopes @ rows.T))",
        "found[places] = -(step.slopes @ rows.T)",
        DVEMB,
    ),
    Mutation(
        "DVEmb: the empirical curvature forgets the samples' shares",
        "estimators/projected.py",
        "slopes, slopes / shares[:, None])",
        "slopes, slopes)",
        DVEMB,
    ),
    Mutation(
        "DVEmb: accumulation is not in the samples' shares",
        "estimators/projected.py",
        "return 1.0 / (len(loss.samples) * loss.micro.divisor)",
        "return 1.0 / len(loss.samples)",
        DVEMB,
    ),
    Mutation(
        "DVEmb: Gauss-Newton without the loss's curvature",
        "estimators/projected.py",
        "loss.samples, slopes, shares, along.flatten(0, 1), pushed.flatten(0, 1)",
        "loss.samples, slopes, shares, along.flatten(0, 1), along.flatten(0, 1)",
        DVEMB,
    ),
    Mutation(
        "DVEmb: a layer's second call replaces its first",
        "estimators/projected.py",
        "found[name] = found[name] + value if name in found else value",
        "found[name] = value",
        DVEMB,
    ),
    Mutation(
        "DVEmb: what no factors make up is left out",
        "estimators/projected.py",
        "return [n for n in self._projection.names if n in visit.map.used and n not in found]",
        "return []",
        DVEMB,
    ),
    Mutation(
        "DVEmb: the padding token gets a gradient",
        "estimators/projected.py",
        "slopes = slopes * (call.inputs != call.padding)[None, :, :, None]",
        "pass",
        DVEMB,
    ),
    Mutation(
        "projection: not scaled",
        "estimators/projection.py",
        "* (size / k) ** 0.5",
        "* 1.0",
        DVEMB,
    ),
    Mutation(
        "ACC-DVEmb: no correction",
        "estimators/acc_dvemb.py",
        "factor = 1.0 + (step.slopes * along[spots]).sum(1) / step.shares",
        "factor = 1.0 + 0.0 * step.shares",
        DVEMB,
    ),
    Mutation(
        "ACC-DVEmb: those that a window draws are carried as the others",
        "estimators/acc_dvemb.py",
        "whole[drawn.to(whole.device)] = part[: len(drawn)]",
        "pass",
        DVEMB,
    ),
    Mutation(
        "embeddings: a checksum is not compared",
        "embeddings_files.py",
        'if checksum != document["sha256"]:',
        "if False:",
        EMBEDDINGS,
    ),
    Mutation(
        "embeddings: the old document stays while the new is written",
        "embeddings_files.py",
        "    (directory / JSON_FILE).unlink(missing_ok=True)\n",
        "",
        EMBEDDINGS,
    ),
    Mutation(
        "embeddings: those of another run are opened",
        "embeddings.py",
        'if content["trajectory"] != _fingerprint(run):',
        "if False:",
        EMBEDDINGS,
    ),
    Mutation(
        "embeddings: those of a part of the run are opened",
        "embeddings.py",
        'if content["steps"] != len(run.walker):',
        "if False:",
        EMBEDDINGS,
    ),
    # ------------------------------------------------------------------ the page, the command line
    Mutation(
        "the page rounds an influence twice",
        "reports/html/table.py",
        "_DIGITS = 3",
        "_DIGITS = 4",
        BROWSER,
    ),
    Mutation(
        "an identifier is sent to the browser as a number that it rounds",
        "reports/html/table.py",
        "_EXACT_INTEGERS = 2**53",
        "_EXACT_INTEGERS = 2**63",
        PAGE,
    ),
    Mutation(
        "the page sorts what is unknown as if it were 0",
        "reports/html/assets/report.js",
        "if (unknown(a) || unknown(b)) return",
        "if (false) return",
        BROWSER,
    ),
    Mutation(
        "a filter is not combined with the others",
        "reports/html/assets/report.js",
        "asked.every((test) => test(row))",
        "!asked.length || asked.some((test) => test(row))",
        BROWSER,
    ),
    Mutation(
        "texts of the user's are written as HTML",
        "reports/html/page.py",
        "autoescape=True",
        "autoescape=False",
        PAGE,
    ),
    Mutation(
        "an address on the network passes for a picture",
        "reports/html/samples.py",
        "(picture and not _PICTURE.fullmatch(picture))",
        "(picture and not isinstance(picture, str))",
        PAGE,
    ),
    Mutation(
        "the mean of a group is of what is not finite too",
        "reports/html/figures.py",
        "finite = values[np.isfinite(values)]",
        "finite = values",
        PAGE,
    ),
    Mutation(
        "a report that fails ends the run",
        "reports/html/beside.py",
        "except Exception as error:",
        "except ZeroDivisionError as error:",
        PAGE,
    ),
    Mutation(
        "the live view's next stretch starts from the state before the last one",
        "capture/stretch.py",
        "self._steps, self._before = [], after",
        "self._steps = []",
        LIVE,
    ),
    Mutation(
        "the live view leaves the random state further on",
        "live.py",
        '            random_state.isolated(device if device.type == "cuda" else None),\n',
        "",
        "tests/test_untouched.py",
    ),
    Mutation(
        "two runs have the same names in a logger",
        "reports/namespaces.py",
        'return f"{_FIRST}-{number}" if number else _FIRST',
        "return _FIRST",
        LOGGERS,
    ),
    Mutation(
        "what render= returns is not looked at",
        "rendered.py",
        "image = None if isinstance(found, Sequence) else as_image(found)",
        "image = as_image(found)",
        SAMPLES,
    ),
    Mutation(
        "an overwritten run keeps the earlier report",
        "scores_files.py",
        "        REPORT_FILE,\n        EXAMPLES_FILE,\n",
        "",
        PAGE,
    ),
    Mutation(
        "what is refused ends with exit code 0",
        "cli.py",
        'finding.state == "refused"',
        'finding.state == "nothing"',
        CLI,
    ),
    Mutation(
        "two rankings are matched by index where both have ids",
        "comparison.py",
        'return "sample_id" in one.columns and',
        'return "sample_id" in one.info and',
        CLI,
    ),
    Mutation(
        "a replay that was not made is exported as NaN",
        "export.py",
        "None if math.isnan(figure) else figure",
        "figure",
        CLI,
    ),
    # ------------------------------------------------------------------ many queries, groups
    Mutation(
        "explain: the order of micro-batches is turned round",
        "replay/many.py",
        "gammas = by_weight[::-1] or",
        "gammas = by_weight or",
        EXPLAIN,
    ),
    Mutation(
        "explain: one query's Hessian product goes to all",
        "replay/tape.py",
        "return [self._named([value[place] for value in found]) for place in range(len(pairs))]",
        "return [self._named([value[0] for value in found]) for place in range(len(pairs))]",
        EXPLAIN,
    ),
    Mutation(
        "explain: a wrong rule for many is used all the same",
        "replay/many.py",
        "return all(_alike(one, other) for one, other in leaves)",
        "return all(True for one, other in leaves)",
        EXPLAIN,
    ),
    Mutation(
        "explain: verification draws the weakest",
        "explanation.py",
        "torch.argsort(largest, descending=True, stable=True)",
        "torch.argsort(largest, descending=False, stable=True)",
        EXPLAIN,
    ),
    Mutation(
        "groups: a set begins where its last member is drawn",
        "estimators/sets.py",
        "first = torch.where(drawn, replay.first, never).amin(1)",
        "first = torch.where(drawn, replay.first, -1).amax(1)",
        GROUPS,
    ),
    Mutation(
        "groups: figures stand in the order of the walk",
        "estimators/sets.py",
        "influence[part], trusted[part] = found.influence, found.trusted",
        "influence[part.sort().values], trusted[part] = found.influence, found.trusted",
        GROUPS,
    ),
]


def source(tree: Path, mutation: Mutation) -> Path:
    return tree / "lightning_accie" / mutation.file


@contextmanager
def mutated(tree: Path, mutation: Mutation) -> Iterator[None]:
    """Make the mistake in a copy of the package."""
    path = source(tree, mutation)
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        yield
    finally:
        path.write_text(text)


def stale(mutations: list[Mutation]) -> list[str]:
    """The mutations whose text does not stand in the package once: they need to be written anew."""
    texts = {m.file: source(ROOT, m).read_text() for m in mutations}
    return [m.name for m in mutations if texts[m.file].count(m.old) != 1 or m.old == m.new]


def run_tests(tree: Path, tests: str) -> tuple[int, str]:
    """Run tests until the first failure; give the exit code and the failing test."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_ADDOPTS": "",  # what the run around this one was given
    }
    try:
        done = subprocess.run(
            command,
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONGEST,
        )
    except subprocess.TimeoutExpired:
        return 1, f"(hung for {LONGEST} s)"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return done.returncode, found.group(1) if found else done.stdout[-400:]


def copy_tree(target: Path) -> Path:
    """What the tests need, without what they leave behind."""
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("lightning_accie", "tests", "docs", "benchmarks", "examples"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, target / name, ignore=ignored)
    for path in (*ROOT.glob("*.*"), ROOT / "NOTICE"):
        if path.is_file():
            shutil.copy(path, target)
    return target


def verdict(mutation: Mutation, trees: Queue[Path]) -> tuple[bool, str]:
    """Whether the tests found the mistake, and a line for the table."""
    tree = trees.get()
    try:
        with mutated(tree, mutation):
            code, test = run_tests(tree, mutation.tests)
    finally:
        trees.put(tree)
    found = code == 1  # anything above is no failing test but a broken run
    words = f"`{test}`" if found else f"**not found** (exit code {code}): {test.strip()}"
    return found, f"| {mutation.name} | {words} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names; all mutations by default")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    wanted = options.names or [""]
    chosen = [m for m in MUTATIONS if any(part in m.name for part in wanted)]
    if old := stale(chosen):
        print("These no longer fit the package: " + "; ".join(old))
        return 1
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        trees: Queue[Path] = Queue()
        for job in range(options.jobs):
            trees.put(copy_tree(Path(name) / str(job)))
        print("| mistake | found by |\n|---|---|", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            for found, line in pool.map(lambda m: verdict(m, trees), chosen):
                missed += not found
                print(line, flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} found.")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
