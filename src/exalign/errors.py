"""What is raised when the input, not the program, is wrong; and its sentences that more than one place says."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from exalign.redaction import redact


class InputError(Exception):
    """One clear sentence for a person: what is wrong, where (file, row, setting), and what to do.

    The command line prints it without a traceback and exits with status 2. Credentials in an address that the sentence
    quotes are blotted out here, so that no message can forget it.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(redact(sentence))


def first_line(error: BaseException) -> str:
    """What a library's error says, as far as its first line, and the next where that only announces it."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first


def nearest(name: str, candidates: Iterable[str], otherwise: str = "") -> str:
    """Name the nearest candidate; where none is near, what is said `otherwise`, or all of them."""
    known = sorted(candidates)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else otherwise or f"there are: {', '.join(known)}."


def hub_sentence(kind: str, source: str, error: BaseException) -> str | None:
    """The sentence for an error of the hub's clients while they read the `kind` (model, tokenizer, data set) `source`.

    None where the error is about something else. Transformers and datasets wrap the hub's errors, so causes count too.
    """
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    names = {name.__name__ for cause in chain for name in type(cause).__mro__}
    said = " ".join(str(cause) for cause in chain)
    status = {getattr(getattr(cause, "response", None), "status_code", None) for cause in chain}
    if "GatedRepoError" in names or "gated" in str(error).lower() or 403 in status:
        page = "datasets/" + source if kind == "data set" else source
        return (
            f"The {kind} {source} is gated on the Hugging Face hub: accept its terms at https://huggingface.co/{page} "
            "and log in (hf auth login, or HF_TOKEN)."
        )
    if names & {"RepositoryNotFoundError", "RevisionNotFoundError", "DatasetNotFoundError"}:
        return f"There is no {kind} {source} on the Hugging Face hub, or none that you may read; check its name."
    lost = {"ConnectionError", "LocalEntryNotFoundError", "OfflineModeIsEnabled", "TransportError", "NetworkError"}
    if names & lost or "couldn't connect" in said:
        return (
            f"The Hugging Face hub did not deliver the {kind} {source}, and it is not whole in the cache; "
            "check the connection, or give a local folder."
        )
    return None
