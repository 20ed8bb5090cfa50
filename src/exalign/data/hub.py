"""What the Hugging Face hub answered, as one sentence that says what to do; and what Git leaves of a file there."""

from __future__ import annotations

from pathlib import Path


def is_lfs_pointer(file: Path) -> bool:
    """Whether Git LFS did not fetch a file, and this stands in its place."""
    start = b"version https://git-lfs"
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


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
