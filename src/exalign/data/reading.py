"""Where data comes from, and its way to records: files, folders of them, hub data sets, and folders of our own.

Local files are read by our own thin readers, row by row, because a message about a bad row must name it; the hub and
folders saved by `datasets` go through that library. What the columns mean is the business of `shapes`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import random
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, field_validator

from exalign.data.record import Prompt, Record
from exalign.data.shapes import COLUMNS, Shape, as_messages, spelled
from exalign.data.store import iter_records
from exalign.errors import InputError, first_line, hub_sentence, nearest
from exalign.settings import CONTENT, NO_RESULT, Settings, Source
from exalign.storage import exists, is_lfs_pointer
from exalign.strict_yaml import parse_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
"""What can be read; all but Parquet also with `.gz` behind."""
MAX_ROW = 1 << 28
"""Bytes of one row: a small compressed file can unpack to a line that fills the memory."""
MAX_WHOLE = 1 << 31
"""Bytes of a JSON array, or of objects over several lines, which are in memory as a whole."""
SEEN = 100
"""Rows, the first of a source, that decide its shape."""
_SPLIT_OF = dict.fromkeys(("train", "training"), "train")
_SPLIT_OF |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_SPLIT_OF |= dict.fromkeys(("test", "testing", "eval", "evaluation"), "test")
"""The words that name the hub's splits."""
_SPACE = re.compile(r"\s*")
_BLANK = b" \t\r\n\v\f\xef\xbb\xbf"
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_NOT_READ = (".zst", ".bz2", ".xz", ".zip", ".arrow")
"""Ends of files that hold data in a form that is not read."""
_OTHER_FILES = ("dataset_info.json", "dataset_infos.json", "header.json")

Rows = Iterator[tuple[int, dict[str, Any]]]
ByteStream = BinaryIO | gzip.GzipFile


class DataSettings(Settings):
    """Which rows to read, and from where."""

    source: Source = Field(
        description="A JSONL, JSON, CSV, Parquet or text file (.gz allowed), a folder of them, a folder of our "
        "records, or the name of a data set on the Hugging Face hub.",
        json_schema_extra=CONTENT,
    )
    name: str | None = Field(None, description="The configuration of a hub data set that has several.")
    data_dir: str | None = Field(
        None,
        description="The folder of a hub data set that is read, e.g. helpful-base; null: all of it.",
    )
    split: str | None = Field(
        None, description="The split: of a hub data set (default `train`), or of a folder whose file names carry one."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Names columns, ours: theirs, or a JMESPath expression over the row, e.g. "
        "{prompt: question, completions: 'answers[].text', rewards: 'answers[].score'}.",
    )
    labels: dict[str, float | Literal["tie"]] = Field(
        default_factory=dict,
        description="What values mean, theirs: ours; of `preferred` the completion (from 0) or tie, of `label` and "
        "`rewards` the number, e.g. {model_a: 0, model_b: 1, tie: tie}.",
    )
    prompt_tokens: int | None = Field(
        None, gt=0, description="For rows of plain `text`: its first n tokens are the prompt, the rest the completion."
    )
    skip: int = Field(0, ge=0, description="Rows left out at the start (after shuffling).")
    limit: int | None = Field(None, gt=0, description="At most this many rows are read (after `skip`).")
    share: float = Field(
        1.0, gt=0, le=1, description="Each row is kept with this probability, by its place and `shuffle_seed` alone."
    )
    join: bool = Field(False, description="Makes one record of rows that follow one another and have the same prompt.")
    weight: float | None = Field(
        None, ge=0, description="The weight of each row of this source in the loss, times the row's own."
    )
    shuffle_seed: int | None = Field(
        None, ge=0, description="Shuffles all rows with this seed before `skip` and `limit`; none keeps their order."
    )
    chat: bool = Field(
        False,
        description="Prompts that are text become chat messages, for a model with a chat template: one of the user, "
        "or, of turns after `\\n\\nHuman:` and `\\n\\nAssistant:` as HH has them, one for each turn.",
    )
    streaming: bool = Field(
        False,
        description="Reads a hub data set row by row over the network instead of downloading it first.",
        json_schema_extra=NO_RESULT,
    )

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        if unknown := [name for name in columns if name not in COLUMNS]:
            near = difflib.get_close_matches(unknown[0], COLUMNS, n=1)
            said = f"did you mean {near[0]}?" if near else f"there are {', '.join(COLUMNS)}"
            raise ValueError(f"{unknown[0][:40]!r} is no column that is read; {said} (columns are given ours: theirs)")
        return columns

    @field_validator("labels", mode="before")
    @classmethod
    def _as_spelled(cls, labels: Any) -> Any:
        """What counts is how a value is written, whether YAML or Python gives it."""
        if not isinstance(labels, dict):
            return labels
        return {spelled(k): float(v) if isinstance(v, int) and abs(v) < 2**53 else v for k, v in labels.items()}


Sources = DataSettings | Annotated[list[DataSettings], Field(min_length=1)]
"""What one kind of data comes from: a source, or several that are read one after another."""


def each(sources: Sources) -> list[DataSettings]:
    return [sources] if isinstance(sources, DataSettings) else sources


def named(sources: Sources) -> str:
    return ", ".join(settings.source for settings in each(sources))


def settings_of(source: str, columns: Iterable[str], more: Iterable[str], split: str | None = None) -> DataSettings:
    """The settings that a command line gives: `columns` as OURS=THEIRS, `more` as KEY=VALUE with YAML's values.

    >>> settings_of("x.jsonl", ["prompt=question"], ["labels.tie=tie", "limit=5"]).labels
    {'tie': 'tie'}
    """
    values: dict[str, Any] = {"source": source, "split": split}
    for text in [*(f"columns.{pair}" for pair in columns), *more]:
        key, equals, value = text.partition("=")
        name, dot, entry = key.partition(".")
        if equals and name not in DataSettings.model_fields:
            known = nearest(name, DataSettings.model_fields)
            raise InputError(f"{key[:100]!r} is no setting of a data source; {known}")
        if not equals or not key or (dot and name not in ("columns", "labels")):
            raise InputError(f"{text[:100]!r} is not KEY=VALUE, as in columns.prompt=question or labels.model_a=0.")
        if dot:
            below = values.setdefault(name, {})
            if not isinstance(below, dict):
                raise InputError(f"{text[:100]!r}: {name} is a single value and has no settings below it.")
            below[entry] = value if name == "columns" else parse_yaml(value, key[:100])
        else:
            values[name] = parse_yaml(value, key[:100])
    try:
        return DataSettings.model_validate(values)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"]))[:100]
        given = f", not {found['input']!r:.60}" if found["type"] != "value_error" else ""
        raise InputError(f"{where}: {found['msg'].removeprefix('Value error, ')}{given}.") from None


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row: its columns, and where it stands (`number` counts from 1; in a text file it is the line)."""

    where: str
    number: int
    id: str
    values: dict[str, Any]


def read_source(
    sources: Sources, counts: Counter[str], tokenizer: PreTrainedTokenizerBase | None = None
) -> Iterator[Record]:
    """The records of one or several sources, streamed. `tokenizer` cuts texts (`prompt_tokens`), and token
    ids that records of a run bring along stay only where it reads their texts in them.

    A row's id is its place in the source (`train.jsonl:17`), so it does not depend on shuffling or limits; where there
    are several sources, the number of its own stands before it (`2/train.jsonl:17`). `counts` receives `rows` and
    `records`, what was dropped or left out (`pairs_equal`, `empty_completions`, …), what was mended
    (`prompts_taken_off_answers`), and the rows with each other column; of several sources also each on its own,
    under `source 2: rows`. A missing source or a setting that cannot take effect is an `InputError` now, a malformed
    row one (naming file and row) when it is reached.
    """
    if len(each(sources)) == 1:
        return _read_one(each(sources)[0], counts, tokenizer)
    own = [Counter[str]() for _ in each(sources)]
    read = [_read_one(settings, found, tokenizer) for settings, found in zip(each(sources), own, strict=True)]
    return _read_each(zip(read, own, strict=True), counts)


def _read_each(parts: Iterable[tuple[Iterator[Record], Counter[str]]], counts: Counter[str]) -> Iterator[Record]:
    for number, (records, found) in enumerate(parts, start=1):
        try:
            for record in records:
                yield replace(record, id=f"{number}/{record.id}")
        finally:  # also where who reads has enough
            counts.update(found)
            counts.update({f"source {number}: {name}": value for name, value in found.items()})


def _read_one(
    settings: DataSettings, counts: Counter[str], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Record]:
    path = local_path(settings)
    if settings.prompt_tokens is not None and tokenizer is None:
        raise InputError("`prompt_tokens` cuts texts with a tokenizer, which is not used where this data is read.")
    if path is not None and holds_records(path):
        records = _own_records(path, settings, counts, tokenizer)
    else:
        _check_settings(settings, path)
        records = _foreign_records(settings, path, counts, tokenizer)
    if settings.chat and settings.prompt_tokens is not None:
        raise InputError("`chat` makes a message of a whole prompt, and `prompt_tokens` cuts it; remove one.")
    if settings.chat:
        records = (as_messages(record, counts) for record in records)
    return _counted(_joined(records, counts) if settings.join else records, settings.weight, counts)


def holds_records(folder: Path) -> bool:
    """Whether a run wrote records there."""
    return any(exists(folder / name) for name in ("part-000000.parquet", "header.json"))


def _own_records(
    folder: Path, settings: DataSettings, counts: Counter[str], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Record]:
    if not (folder / "header.json").exists():
        raise InputError(f"{folder} was not finished (it has no header.json): run the stage that writes it again.")
    for name in ("name", "data_dir", "split", "columns", "labels", "prompt_tokens", "shuffle_seed"):
        if getattr(settings, name) not in (None, {}):
            raise InputError(f"`{name}` cannot take effect on {folder}, which already holds records.")
    records = _window(iter_records(folder), settings, counts)
    return records if tokenizer is None else _with_ids_of(tokenizer, records, counts)


def _with_ids_of(
    tokenizer: PreTrainedTokenizerBase, records: Iterator[Record], counts: Counter[str]
) -> Iterator[Record]:
    """The records, without ids and what was computed from them unless these are the tokenizer's."""
    from exalign.data.tokenization import reads_texts_in_ids

    seen = list(islice(records, SEEN))
    if reads_texts_in_ids(seen, tokenizer):
        yield from chain(seen, records)
    else:
        for record in chain(seen, records):
            counts["rows_with_ids_of_another_tokenizer"] += any(one.token_ids for one in record.completions)
            yield record.as_texts()


def _foreign_records(
    settings: DataSettings, path: Path | None, counts: Counter[str], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Record]:
    rows = _all_rows(settings, path, counts)
    seen = list(islice(rows, SEEN))
    if not seen:
        return
    try:
        shape = Shape([row.values for row in seen], settings.columns, settings.labels)
    except ValueError as error:
        raise InputError(f"{seen[0].where}: {error}") from None
    if settings.prompt_tokens is not None and shape.kind != "text":
        raise InputError(f"{seen[0].where}: `prompt_tokens` cuts plain `text`, but these rows have their own prompt.")
    for row in _window(_shuffled(chain(seen, rows), settings.shuffle_seed), settings, counts):
        try:
            records = list(shape.records(row.id, row.values, counts))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{row.where}, row {row.number}: {error}") from None
        if settings.prompt_tokens is not None and tokenizer is not None:
            from exalign.data.tokenization import split_text

            cut = (split_text(r, tokenizer, prompt_tokens=settings.prompt_tokens, counts=counts) for r in records)
            records = [record for record in cut if record is not None]
        yield from records


Placed = TypeVar("Placed", Record, SourceRow)


def _window(rows: Iterable[Placed], settings: DataSettings, counts: Counter[str]) -> Iterator[Placed]:
    """The rows of the share, after `skip`, up to `limit`, counted."""

    def drawn(row: Placed) -> bool:
        digest = hashlib.sha256(f"{settings.shuffle_seed or 0} {row.id}".encode("utf-8", "replace")).digest()
        inside = settings.share == 1 or int.from_bytes(digest[:8], "big") < settings.share * 2**64
        if not inside:
            counts["rows_beyond_the_share"] += 1
        return inside

    stop = None if settings.limit is None else settings.skip + settings.limit
    for row in islice(filter(drawn, rows), settings.skip, stop):
        counts["rows"] += 1
        yield row


def _joined(records: Iterable[Record], counts: Counter[str]) -> Iterator[Record]:
    for _, same in groupby(records, key=lambda record: (record.prompt, record.tools)):
        first, *_ = joined = list(same)
        if any(record.preferred is not None for record in joined):
            raise InputError(f"`join` cannot take effect on row {first.id}, which has a preferred completion already.")
        if any(record.weight != first.weight for record in joined):
            raise InputError(f"`join` cannot take effect on row {first.id}: rows of its prompt differ in `weight`.")
        if other := sum(record.columns != first.columns for record in joined):
            counts["joined_rows_with_other_columns_than_the_first"] += other
        yield replace(first, completions=tuple(c for record in joined for c in record.completions))


def _counted(records: Iterable[Record], weight: float | None, counts: Counter[str]) -> Iterator[Record]:
    for record in records:
        counts["records"] += 1
        if weight is not None:
            record = replace(record, weight=weight * (1.0 if record.weight is None else record.weight))
        yield record


def _shuffled(rows: Iterable[SourceRow], seed: int | None) -> Iterable[SourceRow]:
    if seed is None:
        return rows
    everything = list(rows)
    random.Random(seed).shuffle(everything)
    return everything


def read_rows(settings: DataSettings, counts: Counter[str]) -> Iterator[SourceRow]:
    """The rows of a source as they are, in their order (or shuffled), after `skip` and `limit`."""
    path = local_path(settings)
    _check_settings(settings, path)
    return _window(_shuffled(_all_rows(settings, path, counts), settings.shuffle_seed), settings, counts)


def prompt_digest(record: Record) -> bytes:
    """A hash of a record's prompt, or of a whole text that is still to be cut into prompt and completion.

    White space around a text, or a message, makes no difference.

    >>> prompt_digest(Record("0", "Hi")) == prompt_digest(Record("1", "Hi "))
    True
    """
    said = stripped(record.prompt or "".join(completion.text for completion in record.completions))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).digest()


def stripped(prompt: Prompt) -> str | list[dict[str, Any]]:
    """A prompt without the white space around it, or around each of its messages."""
    if isinstance(prompt, str):
        return prompt.strip()
    return [{**message, "content": message["content"].strip()} for message in prompt]


def local_path(settings: DataSettings) -> Path | None:
    """The file or folder that `source` names, or None where it is the name of a hub data set.

    What looks like a path and does not exist is an `InputError` that names the nearest existing one.
    """
    path = Path(settings.source)
    if exists(path):
        return path
    parent_exists = path.parent != Path(".") and exists(path.parent) and path.parent.is_dir()
    if looks_local(settings.source) or parent_exists or not _HUB_NAME.fullmatch(settings.source):
        raise InputError(f"There is no file or folder {str(path)[:300]}{_nearest(path) or '.'}")
    return None


def _nearest(path: Path) -> str:
    """`; did you mean …?` with the closest name in the nearest folder that exists, or nothing."""
    folder = path.parent
    wanted = path.name
    while not exists(folder) and folder != folder.parent:
        folder, wanted = folder.parent, folder.name
    if not folder.is_dir() or len(wanted) > 255:
        return ""
    with suppress(OSError):  # a folder that may not be listed
        there = [entry.name for entry in folder.iterdir()]
        for name in difflib.get_close_matches(wanted, there, n=1, cutoff=0.5):
            return f"; did you mean {folder / name}?"
    return ""


def _check_settings(settings: DataSettings, path: Path | None) -> None:
    if settings.streaming and settings.shuffle_seed is not None:
        raise InputError("`shuffle_seed` needs all rows at once: turn `streaming` off, or leave the order as it is.")
    for name in ("name", "data_dir"):
        if path is not None and getattr(settings, name) is not None:
            raise InputError(f"`{name}` applies to hub data sets only, but {path} is local.")
    if path is not None and path.is_file() and settings.split is not None:
        raise InputError(f"`split` applies to folders and hub data sets, but {path} is one file.")


# --- rows of a hub data set or a folder ---


def _all_rows(settings: DataSettings, path: Path | None, counts: Counter[str]) -> Iterator[SourceRow]:
    if path is None:
        yield from _hub_rows(settings, counts)
    elif path.is_file():
        yield from _file_rows(path, path.name, settings, counts)
    elif exists(path / "dataset_dict.json") or exists(path / "state.json"):
        yield from _saved_rows(path, settings)
    else:
        if unread := sum(file.suffix in _NOT_READ for file in path.rglob("*")):
            counts["files_not_read"] += unread
        for file in _split_files(path, settings.split):
            yield from _file_rows(file, file.relative_to(path).as_posix(), settings, counts)


def _file_rows(path: Path, label: str, settings: DataSettings, counts: Counter[str]) -> Iterator[SourceRow]:
    for number, values in read_file(path, streaming=settings.streaming, counts=counts):
        yield SourceRow(str(path), number, f"{label}:{number}", values)


def _split_files(folder: Path, split: str | None) -> list[Path]:
    """The data files below a folder, of one split. Splits are words of the file or folder names, as on the hub."""
    files = _data_files(folder)
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    found = sorted({name for name in splits.values() if name})
    if split is not None:
        wanted = _SPLIT_OF.get(split, split)
        matching = [file for file in files if splits[file] == wanted or _stem(file) == split]
        if not matching:
            names = ", ".join(found or sorted(set(map(_stem, files))))
            raise InputError(f"The folder {folder} has no split {split!r}; found {names}.")
        return matching
    if len(found) > 1:
        raise InputError(f"The folder {folder} has several splits ({', '.join(found)}): name one in `split`.")
    without = [file.relative_to(folder).as_posix() for file in files if splits[file] is None]
    if found and without:
        raise InputError(
            f"The folder {folder} has files of the split {found[0]} and others without one, as {without[0][:100]}: "
            f"name {found[0]} in `split`, or one file in `source`."
        )
    return files


def _data_files(folder: Path) -> list[Path]:
    def is_data(file: Path) -> bool:
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        return data_suffix(file) is not None and file.is_file() and not hidden and file.name not in _OTHER_FILES

    try:
        files = sorted(filter(is_data, folder.rglob("*")))
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be read ({error}).") from None
    if not files:
        raise InputError(f"The folder {folder} holds no data files ({', '.join(DATA_SUFFIXES)}).")
    tables = [file for file in files if ".txt" not in (data_suffix(file) or "")]  # texts beside data are about it
    return tables or files


def _stem(file: Path) -> str:
    """`train.jsonl.gz` → `train`, `train-00000-of-00002.parquet` → `train`."""
    return re.sub(r"-\d{5}-of-\d{5}$", "", file.name[: -len(data_suffix(file) or "")])


def _split_of(relative: Path) -> str | None:
    """The split that the file's own name says, else the nearest folder's."""
    for part in reversed(relative.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_OF:
                return _SPLIT_OF[word]
    return None


def _saved_rows(folder: Path, settings: DataSettings) -> Iterator[SourceRow]:
    """A folder written by `Dataset.save_to_disk`, memory-mapped."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, datasets.DatasetDict):
            split = next(iter(data)) if settings.split is None and len(data) == 1 else settings.split
            if split not in data:
                raise InputError(f"The folder {folder} has the splits {', '.join(data)}: name one of them in `split`.")
            data = data[split]
        elif settings.split is not None:
            raise InputError(f"`split` cannot take effect: the folder {folder} holds a single split.")
        for number, values in enumerate(data, start=1):
            yield SourceRow(str(folder), number, f"{folder.name}:{number}", dict(values))
    except InputError:
        raise
    except Exception as error:  # a damaged folder brings up errors of several libraries
        raise InputError(f"The folder {folder} cannot be read by datasets ({first_line(error)}).") from None


def _hub_rows(settings: DataSettings, counts: Counter[str]) -> Iterator[SourceRow]:
    import datasets

    split = settings.split or "train"
    where = f"{settings.source} ({split})"
    try:
        if settings.data_dir is not None:
            yield from _hub_folder_rows(settings, settings.data_dir.strip("/"), counts)
            return
        data = datasets.load_dataset(settings.source, settings.name, split=split, streaming=settings.streaming)
        for number, values in enumerate(data, start=1):
            yield SourceRow(where, number, f"{split}:{number}", dict(values))
    except InputError:
        raise
    except Exception as error:  # the hub client raises errors of several HTTP libraries
        near = _nearest(Path(settings.source))
        if (sentence := hub_sentence("data set", settings.source, error)) is not None:
            raise InputError(f"{sentence[:-1]}{near}" if near else sentence) from None
        raise InputError(
            f"{settings.source!r} is no local file{near.removesuffix('?')}, and reading it from the Hugging Face hub "
            f"failed: {first_line(error)}"
        ) from None


def _hub_folder_rows(settings: DataSettings, below: str, counts: Counter[str]) -> Iterator[SourceRow]:
    """One folder of a hub data set, as its files stand there; `datasets` would not find it again without the hub."""
    from huggingface_hub import snapshot_download

    if settings.name is not None:
        raise InputError("`name` chooses a configuration and `data_dir` a folder of a hub data set: give one of them.")
    folder = Path(snapshot_download(settings.source, repo_type="dataset", allow_patterns=f"{below}/*")) / below
    if not folder.is_dir():
        raise InputError(f"The data set {settings.source} has no folder {below}; correct `data_dir`.")
    named = any(_split_of(file.relative_to(folder)) for file in _data_files(folder))  # else all of it is `train`
    for file in _split_files(folder, settings.split or ("train" if named else None)):
        yield from _file_rows(file, file.relative_to(folder).as_posix(), settings, counts)


# --- rows of a file ---


def whole(settings: DataSettings) -> DataSettings:
    """The source with its texts not cut into prompt and completion, which takes a tokenizer."""
    return settings.model_copy(update={"prompt_tokens": None})


def looks_local(source: str) -> bool:
    """Whether this is no hub's name, which has one slash at most, and may have dots (Qwen/Qwen2.5-7B-Instruct)."""
    return source.startswith((".", "/", "~")) or source.count("/") > 1 or data_suffix(Path(source)) is not None


def data_suffix(path: Path) -> str | None:
    """The suffix of a data file, `.gz` included, or None.

    >>> data_suffix(Path("a/train.JSONL.gz")), data_suffix(Path("README.md"))
    ('.jsonl.gz', None)
    """
    name = path.name.lower()
    suffixes = [*DATA_SUFFIXES, *(suffix + ".gz" for suffix in DATA_SUFFIXES if suffix != ".parquet")]
    return next((suffix for suffix in suffixes if name.endswith(suffix)), None)


def read_file(path: Path, *, streaming: bool, counts: Counter[str]) -> Rows:
    """(row number, columns) of each row of a data file, read as it is asked for.

    Row numbers count from 1 and are line numbers in JSON lines and texts, and record numbers (the header not counted)
    in CSV. A `.json` file may hold an array of objects, or objects over several lines, which are loaded whole (an
    `InputError` when `streaming`), or JSON lines. A line of a text file is a row with a `text`. Anything malformed is
    an `InputError` that names the file and the row.
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise InputError(f"{path} is not a data file: its name must end in one of {', '.join(DATA_SUFFIXES)} (or .gz).")
    kind = suffix.removesuffix(".gz")
    row = 0
    try:
        if is_lfs_pointer(path):
            raise InputError(f"{path} is a Git LFS pointer, not the data: fetch it with `git lfs pull`.")
        if kind == ".parquet":
            yield from _parquet_rows(path)
            return
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as content:
            if kind in (".csv", ".tsv"):
                rows = _csv_rows(path, content, counts)
            elif kind == ".txt":
                rows = _text_rows(path, content, counts)
            else:
                rows = _json_rows(path, content, streaming, counts)
            for row, values in rows:
                yield row, values
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: reading stopped after row {row} ({error or type(error).__name__}).") from None


def _json_rows(path: Path, stream: ByteStream, streaming: bool, counts: Counter[str]) -> Rows:
    lines = (line.lstrip(_BLANK) for line in iter(lambda: stream.readline(MAX_ROW), b""))
    first = next(filter(None, lines), b"")
    more = stream.read(1)
    stream.seek(0)
    if first.startswith(b"[") or (first.startswith(b"{") and more and _goes_on(first)):
        if streaming:
            what = "one JSON array" if first.startswith(b"[") else "JSON over several lines"
            raise InputError(f"{path} is {what}, which cannot be streamed: write one object per line (JSON lines).")
        return _whole_json(path, stream)
    return _json_lines(path, stream, counts)


def _goes_on(line: bytes) -> bool:
    """Whether a line begins a JSON object and does not end it."""
    try:
        json.loads(line.decode())
    except json.JSONDecodeError as error:
        return error.pos >= len(error.doc.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _json_lines(path: Path, stream: ByteStream, counts: Counter[str]) -> Rows:
    for number, line in _lines(path, stream):
        if not line.strip():
            counts["blank_lines"] += 1
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, row {number}: not valid JSON ({_unreadable(error)}).") from None
        yield number, _object(value, path, number)


def _whole_json(path: Path, stream: ByteStream) -> Rows:
    try:
        content = stream.read(MAX_WHOLE + 1)
        if len(content) > MAX_WHOLE:
            raise InputError(f"{path} has more than {MAX_WHOLE >> 30} GiB: write one object per line (JSON lines).")
        text = content.decode("utf-8-sig")
        values, position = [], len(text) - len(text.lstrip())
        while position < len(text):
            value, position = json.JSONDecoder().raw_decode(text, position)
            values.append(value)
            position = _SPACE.match(text, position).end()  # type: ignore[union-attr]
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({_unreadable(error)}).") from None
    rows = values[0] if len(values) == 1 and isinstance(values[0], list) else values
    for number, value in enumerate(rows, start=1):
        yield number, _object(value, path, number)


def _unreadable(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has thousands of digits"


def _lines(path: Path, stream: ByteStream, unit: str = "row") -> Iterator[tuple[int, str]]:
    for number, line in enumerate(iter(lambda: stream.readline(MAX_ROW + 1), b""), start=1):
        if len(line) > MAX_ROW:
            raise InputError(f"{path}, {unit} {number} has more than {MAX_ROW >> 20} MiB.")
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            said = f"not valid UTF-8 at byte {error.start + 1} of the line"
            raise InputError(f"{path}, {unit} {number}: {said}.") from None


def _object(value: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}, row {number}: expected an object with named columns, found {type(value).__name__}.")
    return value


def _text_rows(path: Path, stream: ByteStream, counts: Counter[str]) -> Rows:
    for number, line in _lines(path, stream):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}
        else:
            counts["blank_lines"] += 1


def _csv_rows(path: Path, stream: ByteStream, counts: Counter[str]) -> Rows:
    csv.field_size_limit(MAX_ROW)  # the default refuses long texts
    number = 0
    try:
        lines = (line for _, line in _lines(path, stream, "line"))
        first = next(lines, "")
        tabs = (data_suffix(path) or "").startswith(".tsv")
        reader = csv.reader(
            chain([first], lines), delimiter="\t" if tabs else max(",;\t", key=first.count), strict=True
        )
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            raise InputError(f"{path}: the first line must name the columns, each once; found {header!s:.200}.")
        for cells in reader:
            if not cells:
                counts["blank_lines"] += 1
                continue
            number += 1
            if len(cells) != len(header):
                raise InputError(f"{path}, row {number}: {len(cells)} cells, but the header names {len(header)}.")
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: not valid CSV ({error}).") from None


def _parquet_rows(path: Path) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            if len(set(file.schema_arrow.names)) < len(file.schema_arrow.names):
                raise InputError(f"{path} has columns of one name; found {file.schema_arrow.names!s:.200}.")
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    # Values that Python cannot hold (text that is not UTF-8, a date beyond the year 9999) are not errors of Arrow.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: not readable as Parquet after row {number} ({said}).") from None
