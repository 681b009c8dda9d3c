"""Reads and writes rollouts in the published release's JSON layout. Stage 2 turns them into a training file."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from t3d.common.errors import UserError
from t3d.common.jsonfiles import read_json_array, write_json_array
from t3d.common.paths import model_name
from t3d.data.shards import ReadReport, read_shards
from t3d.data.trajectory import Trajectory, grows_over_blocks, response_blocks, split_id

log = logging.getLogger(__name__)


TEXT_KEYS = ("full_output", "answer")  # one list of texts, before and after data/rename_key.py
PER_RESPONSE = ("step_map", "extracted_output", "response_length")
RELEASE_BLOCK = 4  # the block size of the published rollouts
OUR_PER_RESPONSE = ("id", "response_ids", "unmask_step", "length", "finish_reason", "steps", "forwards", "seconds")
OUR_PER_ROW = ("prompt_ids", "block_size", "decode", "model", "ground_truth")


def write_release_json(
    path: str | Path,
    trajectories: str | Path | Iterable[Trajectory],
    rows: Sequence[Mapping[str, Any]] | None = None,
    extract: Callable[[str, dict[str, Any]], str] | None = None,
    prompt_text: Callable[[list[int]], str] | None = None,
    step_map: bool = True,
) -> int:
    """Write trajectories in the layout of the published release. Lists of our own keep the rest, so nothing is lost.

    There is one row per problem, ordered by (data set, row, sample). It has the fields of the data set's row and:
    - `prompt`: the text of the prompt's ids, by `prompt_text`;
    - `full_output[]`, `step_map[][]`: to the answer's end (`length`, its stop id included), as in the release. Our text
      has no special tokens, so a reader without our ids finds the step map one longer;
    - `extracted_output[]`, by `extract(text, row)`; `response_length[]`;
    - `response_ids[][]`, `unmask_step[][]`: ids and steps to the end of the last block.

    Args:
        trajectories: a shard folder (streamed, any size) or an iterable (sorted in memory).
        rows: the data set; without it the rows hold only question and answer.
        step_map: False leaves out the unmasking history.

    Returns:
        The number of rows. The file appears when it is complete.

    Raises:
        UserError: a trajectory's question is not its row's.
    """
    return write_json_array(path, release_rows(trajectories, rows, extract, prompt_text, step_map))


def release_rows(
    trajectories: str | Path | Iterable[Trajectory],
    rows: Sequence[Mapping[str, Any]] | None = None,
    extract: Callable[[str, dict[str, Any]], str] | None = None,
    prompt_text: Callable[[list[int]], str] | None = None,
    step_map: bool = True,
) -> Iterator[dict[str, Any]]:
    """The rows that `write_release_json` writes."""
    if isinstance(trajectories, str | Path):
        trajectories = read_shards(trajectories, ordered=True)
    else:
        trajectories = sorted(trajectories, key=lambda t: split_id(t.id))
    for (_, index), group in groupby(trajectories, key=lambda t: split_id(t.id)[:2]):
        samples = list(group)
        first = samples[0]
        _refuse_different(samples)
        if rows is None:
            row: dict[str, Any] = {"question": first.question, "ground_truth_answer": first.ground_truth}
        elif index < len(rows) and rows[index].get("question") == first.question:
            row = dict(rows[index])
        else:
            raise UserError(
                f"{first.id}: its question is not row {index} of the data set; use the rollouts' data", "question"
            )
        if prompt_text is not None:
            row["prompt"] = prompt_text(first.prompt_ids)
        row["full_output"] = [t.text for t in samples]
        row["step_map"] = [t.unmask_step[: t.length] for t in samples]
        if extract is not None:
            row["extracted_output"] = [extract(t.text, row) for t in samples]
        row["response_length"] = [t.length for t in samples]
        row |= {key: [getattr(t, key) for t in samples] for key in OUR_PER_RESPONSE}
        row |= {key: getattr(first, key) for key in OUR_PER_ROW}
        if any(t.initial_ids for t in samples):
            row["initial_ids"] = [t.initial_ids for t in samples]
        if not step_map:
            row = {key: value for key, value in row.items() if key not in ("step_map", "unmask_step")}
        yield row


def _refuse_different(samples: Sequence[Trajectory]) -> None:
    """Samples of a problem share one row, and so the facts that it names once."""
    first = samples[0]
    for other in samples:
        for key in (*OUR_PER_ROW, "question"):
            if getattr(other, key) != getattr(first, key) and _shared(other, key) != _shared(first, key):
                raise UserError(f"trajectories {first.id} and {other.id} of one problem differ in {key}", key)


def _shared(trajectory: Trajectory, key: str) -> Any:
    """A value that all samples of a problem share. A model counts by its name, not its path. A setting that an older
    record lacks counts with its default.
    """
    value = getattr(trajectory, key)
    if key == "model":
        return model_name(value)
    if key == "decode":
        from t3d.blocks.settings import DecodeSettings

        return asdict(DecodeSettings()) | value
    return value


def read_release_json(
    path: str | Path,
    encode: Callable[[str], list[int]] | None = None,
    *,
    stop_ids: Sequence[int] = (),
    fill_id: int | None = None,
    mask_id: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[Trajectory]:
    """Stream all trajectories of a file in the release's layout, before or after data/rename_key.py.

    Rows with our ids give the exact records. Rows without ids are tokenised, see `_Tokenised`. A text that does not fit
    its step map is dropped and counted in `report`; one warning at the end names the first.

    Args:
        encode: text -> ids. It adds no special tokens and recognises special tokens in the text.
        stop_ids: the end of a turn comes first.
        fill_id: fills a cut last block; None = the stop id.
        mask_id: must not occur in the ids.

    Raises:
        UserError: a broken file, an invalid record of ours, or text without ids when there is no `encode`.
    """
    path, report = Path(path), report if report is not None else ReadReport()
    tokenised = encode and _Tokenised(path, encode, list(stop_ids), fill_id, mask_id, report)
    seen: set[str] = set()
    for index, row in enumerate(read_json_array(path)):
        if "response_ids" in row:
            trajectories = _own_trajectories(row, f"{path}, row {index}")
        elif tokenised is not None:
            trajectories = tokenised.read(row, index)
        else:
            _check_text_row(row, f"{path}, row {index}")
            raise UserError(f"{path}, row {index}: text without token ids; give a tokenizer", "response_ids")
        for trajectory in trajectories:
            if trajectory.id in seen:
                report.repeated += 1
                continue
            seen.add(trajectory.id)
            yield trajectory
    report.announce(path)


def _own_trajectories(row: dict[str, Any], where: str) -> Iterator[Trajectory]:
    for sample in range(len(row["response_ids"])):
        try:
            trajectory = _own_trajectory(row, sample)
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{where}, response {sample}: {_say(error)}; run data/rename_key.py", where) from error
        yield trajectory


def _check_text_row(row: dict[str, Any], where: str) -> tuple[list[str], list[Any]]:
    """The row's responses and their step maps."""
    texts, step_maps = response_texts(row), row.get("step_map")
    if texts is None or not isinstance(step_maps, list):
        raise UserError(
            f"{where}: neither response_ids nor full_output/answer with step_map; roll out first", "step_map"
        )
    return texts, step_maps


@dataclass(frozen=True)
class _Tokenised:
    """Trajectories from a published file's text, which has no token ids.

    A response and its row's `prompt` are tokenised. The number of tokens must equal the number of steps. If no text of
    the file holds a stop id, the texts have lost their special tokens. Then one more step than tokens is the end, and
    the first of `stop_ids` is appended. In any other file a missing token means a shorter tokenisation with shifted
    steps, and the response is dropped. The steps must grow over the rollout's blocks of RELEASE_BLOCK.

    The release cuts the last block at the stop id. `fill_id` fills the lost tail at the block's last step, so that
    every training state of the block masks it. An answer that ended by length loses its unfinished last block instead.
    Steps are renumbered without gaps, because some steps unmasked only lost tokens.
    """

    path: Path
    encode: Callable[[str], list[int]]
    stop_ids: list[int]
    fill_id: int | None
    mask_id: int | None
    report: ReadReport

    def read(self, row: dict[str, Any], index: int) -> Iterator[Trajectory]:
        where = f"{self.path}, row {index}"
        texts, step_maps = _check_text_row(row, where)
        if not isinstance(row.get("prompt"), str):
            raise UserError(
                f"{where}: key 'prompt', the chat text that the rollout saw, is missing; add it to each row, or make "
                "rollouts with token ids by sample/sdar_sample.py",
                "prompt",
            )
        prompt = list(self.encode(row["prompt"]))
        for sample, text in enumerate(texts):
            name = f"{self.path.stem}/{index}/{sample}"
            fitted = self.fit(prompt, text, step_maps[sample] if sample < len(step_maps) else [])
            if isinstance(fitted, str):
                self.report.mismatch(f"{name}: {fitted}")
                continue
            yield Trajectory(
                id=name,
                prompt_ids=prompt,
                block_size=RELEASE_BLOCK,
                question=row.get("question", ""),
                ground_truth=str(row.get("ground_truth_answer", "")),
                text=text,
                **fitted,
            )

    def fit(self, prompt: list[int], text: str, steps: Any) -> dict[str, Any] | str:
        """The fields of a response, or the reason why its text and steps do not fit together."""
        tokens = list(self.encode(text))
        if self.mask_id is not None and self.mask_id in (*prompt, *tokens):
            return f"mask id {self.mask_id} in the text"
        if _usable(steps) and len(steps) == len(tokens) + 1 and self.ends_are_lost:
            tokens.append(self.stop_ids[0])
        return _fit(prompt, tokens, steps, RELEASE_BLOCK, self.stop_ids, self.fill_id)

    @cached_property
    def ends_are_lost(self) -> bool:
        rows = (row for row in read_json_array(self.path) if "response_ids" not in row)
        texts = (text for row in rows for text in response_texts(row) or ())
        return bool(self.stop_ids) and all(set(self.stop_ids).isdisjoint(self.encode(text)) for text in texts)


def response_texts(row: dict[str, Any]) -> list[str] | None:
    """The responses of a row in the release's layout, or None."""
    texts = next((row[key] for key in TEXT_KEYS if key in row), None)
    return [texts] if isinstance(texts, str) else texts


def _say(error: Exception) -> str:
    return f"key {error} is missing" if isinstance(error, KeyError) else str(error)


def _own_trajectory(row: dict[str, Any], sample: int) -> Trajectory:
    texts = response_texts(row)
    if texts is None:
        raise KeyError("full_output")
    trajectory = Trajectory(
        question=row["question"],
        text=texts[sample],
        **{key: row[key][sample] for key in OUR_PER_RESPONSE},
        **{key: row[key] for key in OUR_PER_ROW},
        initial_ids=row["initial_ids"][sample] if "initial_ids" in row else [],
    )
    if row["step_map"][sample] != trajectory.unmask_step[: trajectory.length]:
        raise ValueError("step_map is not the beginning of unmask_step")
    return trajectory


def _fit(
    prompt: list[int], tokens: list[int], steps: Any, block_size: int, stop_ids: list[int], fill_id: int | None
) -> dict[str, Any] | str:
    """The fields of a trajectory from tokenised text and its step map, or the reason why these do not fit together."""
    if not _usable(steps):
        return "no usable step map"
    if len(steps) != len(tokens):
        return f"{len(tokens)} tokens, {len(steps)} steps"
    if not grows_over_blocks(steps, len(prompt), block_size):
        return f"steps do not grow over blocks of {block_size}"
    length = next((i + 1 for i, token in enumerate(tokens) if token in stop_ids), None)
    beyond = (len(prompt) + len(tokens)) % block_size
    if length is None:
        keep = max(0, len(tokens) - beyond)
        tokens, steps = tokens[:keep], steps[:keep]
        if not tokens:
            return "no whole block"
    elif beyond:
        start, _ = response_blocks(len(prompt), len(tokens), block_size)[-1]
        missing = block_size - beyond
        tokens = tokens + [tokens[length - 1] if fill_id is None else fill_id] * missing
        steps = steps + [max(steps[start:])] * missing
    rank = {step: i for i, step in enumerate(sorted(set(steps)), 1)}
    return {
        "response_ids": tokens,
        "unmask_step": [rank[step] for step in steps],
        "length": length or len(tokens),
        "finish_reason": "stop" if length else "length",
    }


def _usable(step_map: Any) -> bool:
    return isinstance(step_map, list) and bool(step_map) and all(isinstance(s, int) and s >= 1 for s in step_map)


# ----------------------------------------------------------------------------------------------- stage 2: preprocessing


@dataclass
class Preprocessed:
    """Counts of `prepare_training_file`."""

    rows: int = 0
    kept: int = 0  # responses
    dropped: int = 0  # records of ours that are not valid
    mismatched: int = 0  # texts without ids that have no usable step map
    repeated: int = 0
    first_problem: str = ""
    finish_reasons: Counter[str] = field(default_factory=Counter)
    tokens: int = 0  # to the end of the answers
    unmasked: int = 0  # to the end of the last blocks
    steps: int = 0
    without_ids: int = 0

    def lines(self) -> list[str]:
        """The counts for people."""
        finish = ", ".join(f"{count} {reason}" for reason, count in sorted(self.finish_reasons.items())) or "none"
        first = f" (first: {self.first_problem})" if self.first_problem else ""
        lines = [
            f"kept: {self.kept} responses in {self.rows} rows",
            f"left out: {self.dropped} invalid, {self.mismatched} mismatched, {self.repeated} repeated{first}",
            f"finish reasons: {finish}",
            f"tokens: {self.tokens}, {self.tokens / max(1, self.kept):.1f} per response",
            f"tokens per step: {self.unmasked / max(1, self.steps):.2f}",
        ]
        if self.without_ids:
            lines.append(f"without token ids: {self.without_ids}; training tokenises them and checks their lengths")
        return lines


def prepare_training_file(
    sources: Sequence[str | Path], output: str | Path, rows: Sequence[Mapping[str, Any]] | None = None
) -> Preprocessed:
    """Stage 2: rollouts (release-layout files or shard folders) to one training file with `full_output` as `answer`.

    Every response is validated; an invalid response is removed from all lists of its row. `rows` is the data set, for
    shard folders. The file appears when it is complete. `UserError` if a source is no rollout file or no response is
    left.
    """
    result = Preprocessed()

    def prepared() -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        for source in map(Path, sources):
            for index, row in enumerate(release_rows(source, rows) if source.is_dir() else read_json_array(source)):
                if response_texts(row) is None:
                    raise UserError(
                        f"{source}, row {index}: key 'full_output' is missing; this is no rollout file", "full_output"
                    )
                keep = _usable_responses(row, f"{source.name}, row {index}", seen, result)
                if keep:
                    result.rows += 1
                    yield _renamed(row, keep)
        if not result.kept:
            reason = result.first_problem or "it is empty"
            raise UserError(f"{sources[0]}: no usable response ({reason}); roll out again", str(sources[0]))

    write_json_array(output, prepared())
    return result


def _usable_responses(row: dict[str, Any], where: str, seen: set[str], result: Preprocessed) -> list[int]:
    """The positions of a row's responses to keep; counts into `result`."""
    keep, own = [], "response_ids" in row
    for sample, text in enumerate(response_texts(row) or ()):
        try:
            if own:
                trajectory = _own_trajectory(row, sample)
                if trajectory.id in seen:
                    result.repeated += 1
                    continue
                seen.add(trajectory.id)
                finish, length = trajectory.finish_reason, trajectory.length
                steps, unmasked = trajectory.steps, len(trajectory.response_ids)
            else:
                step_map = row["step_map"][sample]
                if not text or not _usable(step_map):
                    raise ValueError("no text or no usable step map")
                finish, length, steps, unmasked = "unknown", len(step_map), len(set(step_map)), len(step_map)
        except (LookupError, TypeError, ValueError) as error:
            result.first_problem = result.first_problem or f"{where}, response {sample}: {_say(error)}"
            result.dropped += own
            result.mismatched += not own
            continue
        keep.append(sample)
        result.kept += 1
        result.without_ids += not own
        result.finish_reasons[finish] += 1
        result.tokens += length
        result.unmasked += unmasked
        result.steps += steps
    return keep


def _renamed(row: dict[str, Any], keep: list[int]) -> dict[str, Any]:
    """The row with the kept entries of its parallel lists, `full_output` as `answer`."""
    parallel = {*TEXT_KEYS, *PER_RESPONSE, *((*OUR_PER_RESPONSE, "initial_ids") if "response_ids" in row else ())}
    result = {}
    for key, value in row.items():
        if key in parallel and isinstance(value, list):
            value = [value[i] for i in keep if i < len(value)]
        result["answer" if key == "full_output" else key] = value
    return result
