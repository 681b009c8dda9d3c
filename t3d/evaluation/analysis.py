"""How dependent are the tokens that one step unmasks?

    t3d analyse teacher=... trajectories=...

The analysis measures at states of trajectories, for a teacher and (``student=``) for its student:

    correlation     E_{x_S ~ p}[ log p(x_S | x_t) - sum_{i in S} log p(x_i | x_t) ],   S unmasked together in one step
    pair            TC(x_0 | x_t) + TC(x_t | x_T)
    risk            KL( p_phi(x_0 | x_t) || prod_{i in M} p_theta(x_0^i | x_t) ),      M masked, phi the teacher
    cross_entropy   mean_{i in M} -log p(x_0^i | x_t),                                 x_0 the trajectory's end
    entropy         mean_{i in M} H(p(. | x_t))

p(x_S | x_t) is the model's own one-by-one decoding of S in the trajectory's order, prod_k p(x_k | x_<k, x_t). The
correlation is the loss of a step that draws S at once from the product of marginals. It is 0 if the tokens are
independent. By the chain rule it is sum_k E_{x_<k}[ KL(p(x_k | x_<k, x_t) || p(x_k | x_t)) ]. The x_<k are sampled,
and the KL is exact, so every draw is at least 0, and the first token costs nothing. If p(x_i | x_t) are the marginals
of p(x_S | x_t), the correlation is the conditional total correlation TC of ReDi (arXiv 2507.15897). A network need not
be consistent in this way. Then the correlation is larger by the KL between the two, which the step loses too.

The pair is the loss of decoding in two steps: from x_T (the whole block masked) to x_t, and from x_t to x_0. It is the
correlation of the masked tokens at x_t plus the correlation of the shown tokens at x_T. T3D (arXiv 2602.12262) states
that trajectory distillation lowers it (Theorem 4.5).

The risk is the quantity of the paper's Proposition 4.3. Trajectory distillation minimises it on the states of the
teacher's decoding. It is the cross-entropy of the student's product under p_phi, minus the entropy of p_phi, where
p_phi is the teacher's one-by-one decoding at temperature 1. A student that matches all of the teacher's marginals has
the teacher's own correlation as its risk, and no product has less.

The estimators and the averages are ours: states after every r of a block's tokens, a mean over blocks, then over
sequences. Correlation, pair and risk are sums over a block's tokens. All figures are in nats, at temperature 1.
"""

import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from t3d.blocks.decoding import inverse_cdf, project
from t3d.common import paths
from t3d.common.errors import UserError, fault, run_main
from t3d.common.jsonfiles import atomic_write
from t3d.common.options import load
from t3d.data.dataset import load_trajectories
from t3d.decode.model_facts import full_attention, logit_shift, position_count
from t3d.evaluation.settings import AnalysisConfig
from t3d.models.loading import load_model, load_tokenizer, special_ids
from t3d.states.base import Batch, collate, generator_for
from t3d.states.groups import group_mean
from t3d.states.trajectory import TrajectoryNoise

log = logging.getLogger(__name__)

# (ids in the layout, places in the flattened ids (blocks, k)) -> log-probabilities (blocks, k, vocab)
Predict = Callable[[Tensor, Tensor], Tensor]


# ---------------------------------------------------------------------------------------------------------------------
# The estimators


def step_correlation(predict: Predict, ids: Tensor, place: Tensor, u: Tensor, marginal: Tensor | None = None) -> Tensor:
    """One draw of the loss of a step that unmasks ``place`` at once: KL of the product of marginals from the chain.

    Args:
        ids: the state x_t, masks at ``place``.
        place: (blocks, n) indices of the step's tokens in the flattened ids, in the order of the chain.
        u: (blocks, n) uniforms.
        marginal: (blocks, n, vocab) log-probabilities of another model's product; None = ``predict``'s own.

    Returns:
        (blocks,) nats, at least 0 up to rounding; the mean over draws is the correlation.
    """
    first, ids = predict(ids, place), ids.clone()
    total = first.new_zeros(len(place))
    marginal = first if marginal is None else marginal
    for k in range(place.shape[1]):
        conditional = predict(ids, place[:, k : k + 1])[:, 0] if k else first[:, 0]
        total = total + kl(conditional, marginal[:, k])
        ids.view(-1)[place[:, k]] = inverse_cdf(conditional.exp(), u[:, k])
    return total


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last dimension; p and q are log-probabilities."""
    return (p.exp() * torch.where(p == -torch.inf, 0.0, p - q)).sum(-1)


def entropy(p: Tensor) -> Tensor:
    """Entropy over the last dimension; p is log-probabilities."""
    return torch.special.entr(p.exp()).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks of trajectories, and a model on them


class Blocks(NamedTuple):
    """The whole blocks of some answers in the training layout, all masked.

    ids: (rows, length), every answer's noisy copy masked. place: (blocks, B) indices of a block's tokens in the
    flattened ids, in decode order. x0: (blocks, B) these tokens. sequence: (blocks,) index of their answer in
    ``names``. batch: the layout.
    """

    ids: Tensor
    place: Tensor
    x0: Tensor
    sequence: Tensor
    names: list[str]
    batch: Batch

    def uniforms(self, n: int, seed: int, visible: int) -> Tensor:
        """(blocks, n) for one draw of a step's tokens; a function of (seed, visible, the answer's id)."""
        count = self.sequence.bincount(minlength=len(self.names)).tolist()
        draws = zip(self.names, count, strict=True)
        parts = [torch.rand(k, n, generator=generator_for(seed, visible, name)) for name, k in draws]
        return torch.cat(parts).to(self.place.device)

    def state(self, visible: int) -> Tensor:
        """The ids with the first ``visible`` decoded tokens of every block shown."""
        ids = self.ids.clone()
        ids.view(-1)[self.place[:, :visible]] = self.x0[:, :visible]
        return ids


def whole_blocks(
    samples: list[dict],
    block_size: int,
    mask_id: int,
    pad_id: int,
    device: str | torch.device = "cpu",
    shift: bool = False,
) -> Blocks:
    """The blocks that hold no prompt token and end within the answer. ``shift``: see ``collate``."""
    noise = TrajectoryNoise(
        block_size, mask_id, torch.zeros(1, dtype=torch.long), mask_ratios=(1.0,), random_ratio=0.0, post_num=0
    )
    states = [noise(sample, torch.Generator()) for sample in samples]
    batch = collate([[state] for state in states], pad_id, shift=shift, device=device)
    _, block, size = torch.stack([batch.sequence, batch.block]).unique_consecutive(
        dim=1, return_inverse=True, return_counts=True
    )
    kept = (size == block_size)[block].nonzero().squeeze(-1)
    order = kept[torch.argsort(block[kept] * (block_size + 1) + batch.rank[kept])]
    shape = (-1, block_size)
    place, x0 = batch.place[order].view(shape), batch.targets[order].view(shape)
    names = [sample["id"] for sample in samples]
    return Blocks(batch.input_ids, place, x0, batch.sequence[order].view(shape)[:, 0], names, batch)


def predictor(model, batch: Batch, forbidden: Tensor) -> Predict:
    """The model's log-probabilities in a batch's layout, in fp32, without the forbidden ids."""
    source = torch.arange(batch.input_ids.numel(), device=batch.place.device)
    source[batch.place] = batch.loss_index

    def predict(ids: Tensor, place: Tensor) -> Tensor:
        def head(hidden: Tensor, weight: Tensor) -> Tensor:
            rows = hidden.flatten(0, 1)[source[place.flatten()]]
            return project(rows, weight, forbidden).log_softmax(-1).view(*place.shape, -1)

        return model(ids, batch.attention_mask, position_ids=batch.position_ids, use_cache=False, head=head)

    return predict


def _keep(found: dict[tuple, list[Tensor]], index: Tensor, key: tuple, value: Tensor) -> None:
    """Add the means over sequences of (blocks,) values."""
    found[key].append(group_mean(value, index, int(index[-1]) + 1).cpu())


@torch.inference_mode()
def measure(
    model,
    forbidden: Tensor,
    groups: Iterable[Blocks],
    tokens_per_step: list[int],
    draws: int,
    seed: int,
    teacher=None,
) -> dict[str, Any]:
    """The quantities for each number of visible tokens of a block: means over sequences with their errors. A single
    sequence has the error None.

    Args:
        teacher: the teacher of the risk; None = the model itself.

    Returns:
        ``steps``: a row per (tokens_per_step, visible) with ``correlation``; ``per_block``: a row per tokens_per_step,
        the sum over a block's steps; ``states``: a row per ``visible`` (a t) with ``pair``, its parts ``rest``
        TC(x_0 | x_t) and ``shown`` TC(x_t | x_T), ``risk``, ``cross_entropy`` and ``entropy``; ``pair``: the mean over
        t; ``sequences`` and ``blocks`` counted.
    """
    found: dict[tuple, list[Tensor]] = defaultdict(list)
    blocks = sequences = 0
    for group in groups:
        of_sequence, index = group.sequence.unique_consecutive(return_inverse=True)
        blocks, sequences = blocks + len(group.place), sequences + len(of_sequence)
        predict = predictor(model, group.batch, forbidden)
        phi = predict if teacher is None else predictor(teacher, group.batch, forbidden)
        for key, value in chain(
            _at_states(group, predict, phi, draws, seed), _of_steps(group, predict, tokens_per_step, draws, seed)
        ):
            _keep(found, index, key, value)

    def row(key: tuple) -> tuple[float, float | None]:
        values = torch.cat(found[key]).double()
        return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None

    def named(name: str, key: tuple) -> dict[str, float | None]:
        return dict(zip((name, f"{name}_error"), row(key), strict=True))

    visible = sorted(key[1] for key in found if key[0] == "risk")
    return {
        "sequences": sequences,
        "blocks": blocks,
        "per_block": [{"tokens_per_step": n, **named("correlation", ("block", n))} for n in tokens_per_step],
        **named("pair", ("mean pair",)),
        "steps": [
            {"tokens_per_step": key[1], "visible": key[2], **named("correlation", key)}
            for key in found
            if key[0] == "step"
        ],
        "states": [
            {"visible": v} | {k: x for name in _STATE for k, x in named(name, (name, v)).items()} for v in visible
        ],
    }


_STATE = ("pair", "rest", "shown", "risk", "cross_entropy", "entropy")


def _at_states(group: Blocks, predict: Predict, phi: Predict, draws: int, seed: int) -> Iterator[tuple[tuple, Tensor]]:
    """Name and (blocks,) values of the quantities at every state of a block."""
    size, pairs = group.place.shape[1], []
    for visible in range(size):
        state, masked = group.state(visible), group.place[:, visible:]
        p, target = predict(state, masked), group.x0[:, visible:].unsqueeze(-1)
        yield ("cross_entropy", visible), -p.gather(-1, target).squeeze(-1).mean(-1)
        yield ("entropy", visible), entropy(p).mean(-1)
        rest = _drawn(group, predict, state, masked, draws, seed, visible)
        shown = torch.zeros_like(rest)
        if visible:
            shown = _drawn(group, predict, group.ids, group.place[:, :visible], draws, seed, size + visible)
        risk = rest if phi is predict else _drawn(group, phi, state, masked, draws, seed, visible, p)
        pairs.append(rest + shown)
        for name, value in (("rest", rest), ("shown", shown), ("pair", pairs[-1]), ("risk", risk)):
            yield (name, visible), value
    yield ("mean pair",), torch.stack(pairs).mean(0)


def _of_steps(
    group: Blocks, predict: Predict, tokens_per_step: list[int], draws: int, seed: int
) -> Iterator[tuple[tuple, Tensor]]:
    """Name and (blocks,) values of the correlation of every step, and of all steps of a block together."""
    for n in tokens_per_step:
        steps = []
        for visible in range(0, group.place.shape[1], n):
            place = group.place[:, visible : visible + n]
            steps.append(_drawn(group, predict, group.state(visible), place, draws, seed, visible))
            yield ("step", n, visible), steps[-1]
        yield ("block", n), torch.stack(steps).sum(0)


def _drawn(
    group: Blocks,
    predict: Predict,
    state: Tensor,
    place: Tensor,
    draws: int,
    seed: int,
    key: int,
    marginal: Tensor | None = None,
) -> Tensor:
    """``step_correlation``, the mean over draws; the uniforms are a function of (seed, key) and the answer."""
    uniforms = (group.uniforms(place.shape[1], seed + draw, key) for draw in range(draws))
    return torch.stack([step_correlation(predict, state, place, u, marginal) for u in uniforms]).mean(0)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def analyse(config: AnalysisConfig) -> Path:
    """Measure one model or two, write the JSON file and its plot, print the table; the JSON's path."""
    results: dict[str, Any] = {"config": vars(config)}
    results["teacher"] = measure_checkpoint(config, "teacher", config.teacher, config.trajectories)
    if config.student:
        data = config.student_trajectories or config.trajectories
        results["student"] = measure_checkpoint(config, "student", config.student, data, config.teacher)
    output = paths.output(config.output)
    with atomic_write(output) as file:
        file.write(json.dumps(results, indent=2))
    plot(results, output.with_suffix(".svg"))
    for name in ("teacher", "student"):
        for row in results.get(name, {}).get("per_block", []):
            error = row["correlation_error"]
            numbers = f"{row['correlation']:.4f}" + ("" if error is None else f" +- {error:.4f}")
            print(f"{name:8} correlation at {row['tokens_per_step']} tokens per step: {numbers} nats a block")
        if name in results:
            states = results[name]["states"]
            risk, cross, spread = (
                sum(row[key] for row in states) / len(states) for key in ("risk", "cross_entropy", "entropy")
            )
            pair = results[name]["pair"]
            print(f"{name:8} TC(x_0|x_t) + TC(x_t|x_T) {pair:.4f}, risk {risk:.4f} nats a block, means over t")
            print(f"{name:8} cross-entropy {cross:.4f}, entropy {spread:.4f} nats a masked token")
    print(f"{output}\n{output.with_suffix('.svg')}")
    return output


def measure_checkpoint(
    config: AnalysisConfig, key: str, checkpoint: str, trajectories: str, teacher: str | None = None
) -> dict[str, Any]:
    """``measure`` on a model folder. ``teacher``: the teacher of the risk; None = the model itself."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def loaded(source: str, key: str):
        return load_model(source, dtype=config.dtype, attn_implementation="sdpa", device=device, key=key).eval()

    source = paths.model_source(checkpoint, key)
    tokenizer, model = load_tokenizer(source, key=key), loaded(source, key)
    if full_attention(model.config):
        raise UserError(f"{key}={checkpoint}: has full attention, and the measures need block-causal attention", key)
    phi = loaded(paths.model_source(teacher, "teacher"), "teacher") if teacher else None
    ids = special_ids(model.config, tokenizer, model.generation_config)
    samples, report = load_trajectories(
        paths.data_file(trajectories),
        tokenizer=tokenizer,
        mask_id=ids.mask_id,
        max_prompt_len=position_count(model.config),
        max_gen_length=config.max_gen_length,
        limit=config.limit,
    )
    block_size = report.block_size
    assert block_size is not None  # every trajectory has one
    if block_size != model.config.block_size:
        log.warning(
            "%s=%s decodes blocks of %d; it is measured on the trajectories' blocks of %d",
            key,
            checkpoint,
            model.config.block_size,
            block_size,
        )
    if too_many := [n for n in config.tokens_per_step if n > block_size]:
        raise fault("tokens_per_step", too_many[0], f"the trajectories have blocks of {block_size}; give at most that")
    groups = (
        whole_blocks([samples[i] for i in range(start, min(start + config.batch_size, len(samples)))], *layout)
        for layout in [(block_size, ids.mask_id, ids.pad_id, device, logit_shift(model.config))]
        for start in tqdm(range(0, len(samples), config.batch_size), desc=key, unit="batch", dynamic_ncols=True)
    )
    forbidden = torch.tensor(sorted(ids.forbidden_ids), device=device)
    used = (group for group in groups if len(group.place))
    if (first := next(used, None)) is None:
        raise fault("trajectories", trajectories, "no answer holds a whole block; roll out longer answers")
    found = measure(model, forbidden, chain([first], used), config.tokens_per_step, config.draws, config.seed, phi)
    return {"checkpoint": checkpoint, "trajectories": trajectories, "block_size": block_size, **found}


def plot(results: dict[str, Any], output: Path) -> None:
    """Teacher against student: correlation over tokens per step, cross-entropy and entropy over visible tokens."""
    from matplotlib.figure import Figure

    from t3d.evaluation.plots import METHOD_COLOURS, loss_plot

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    colours = {"teacher": METHOD_COLOURS["original"], "student": METHOD_COLOURS["t3d"]}
    models = {name: results[name] for name in colours if name in results}
    loss_plot(
        *figure.subplots(1, 3), models=models, styles={n: {"color": c, "marker": "o"} for n, c in colours.items()}
    )
    figure.savefig(output)


def main(argv: Sequence[str] | None = None) -> None:
    """Analyse. ``argv``: None = the process's own arguments."""
    analyse(load(AnalysisConfig, argv))


if __name__ == "__main__":
    run_main(main)
