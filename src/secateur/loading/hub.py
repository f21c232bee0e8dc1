"""Downloads a model from the Hugging Face hub to a folder, or finds it complete in the hub's cache."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import filter_repo_objects

from secateur.errors import ModelError
from secateur.loading.beside import LICENCE, TEMPLATES
from secateur.loading.built_in import BUILT_IN
from secateur.loading.library import first_line
from secateur.loading.weights import refuse_weights
from secateur.progress import say

_NEEDED = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
_CODE = ["*.py"]  # downloaded only with trust_remote_code
# Subfolders hold other formats (onnx, original checkpoints), "consolidated" files the same weights a second time.
_IGNORED = ["*/*", "consolidated*"]
_ALONG = [re.sub("[a-z]", lambda found: f"[{found[0]}{found[0].upper()}]", name) for name in (*LICENCE, *TEMPLATES)]
"""Files that opening a model does not need, but that are copied to a result. The hub's names are case-sensitive."""
_TIMEOUT_SECONDS = 10.0


def hub_folder(name: str, revision: str | None, trust: bool) -> Path:
    """The folder of a hub model, after downloading the files missing in the cache; one attempt, no long retries.

    When the hub cannot be reached, or fails, a complete earlier download is used. Raises ModelError with advice for any
    failure of the hub, the network or the disk.
    """
    needed = _NEEDED + (_CODE if trust else [])
    try:
        info = HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
    except HFValidationError as error:
        raise ModelError(f"{name!r} is neither a folder nor a hub id ({first_line(error)}).") from error
    except Exception as error:  # the client library changes its classes between versions
        if (refusal := _refusal(name, revision, error)) is not None:
            raise refusal from error
        return _cached_folder(name, revision, needed, error)
    files = [sibling.rfilename for sibling in info.siblings or []]
    if "config.json" in files and not any(file.endswith(".safetensors") and "/" not in file for file in files):
        refuse_weights(name, files)
    say(f"Downloading {name} from {constants.ENDPOINT}")
    try:
        # by the name of the revision, not by its commit: the cache then finds it by that name, also offline
        if any(filter_repo_objects(files, allow_patterns=_ALONG)):
            snapshot_download(name, revision=revision, allow_patterns=_ALONG)
        return Path(snapshot_download(name, revision=revision, allow_patterns=needed, ignore_patterns=_IGNORED))
    except Exception as error:
        raise (_refusal(name, revision, error) or _broken_off(name, error)) from error


def _cached_folder(name: str, revision: str | None, needed: list[str], failure: Exception) -> Path:
    """The complete copy of a model in the hub's cache; ``failure``: why the hub was not used."""
    try:
        commit = _whole_commit(name, revision)
        folder = snapshot_download(
            name, revision=commit, allow_patterns=needed, ignore_patterns=_IGNORED, local_files_only=True
        )
    except Exception as error:
        reason = f"the hub ({constants.ENDPOINT}) cannot be reached"
        if isinstance(failure, OfflineModeIsEnabled):
            reason = "HF_HUB_OFFLINE forbids access to the hub"
        elif (status := _status(failure)) is not None:
            reason = f"the hub ({constants.ENDPOINT}) answers with an error ({status})"
        if missing := _missing(error):  # the interrupted download has left its list of files
            raise ModelError(
                f"The hub's cache holds {name} only in part: {missing} missing; and {reason} to download the rest. "
                f"Complete it with a network connection: `hf download {name}`."
            ) from error
        at = f" at revision {revision}" if revision else ""
        hint = f" The built-in model needs no network: {', '.join(BUILT_IN)}." if "smol" in name.lower() else ""
        raise ModelError(
            f"There is no folder {name}, and {reason} to look for a model of that name{at}, nor is it in the hub's "
            f"cache. Download it with a network connection (`hf download {name} --local-dir DIR`) and give that "
            f"folder.{hint}"
        ) from error
    try:
        snapshot_download(name, revision=commit, allow_patterns=_ALONG, local_files_only=True)
    except Exception as error:  # such as a cache that was filled by another program with fewer files
        say(f"The hub's cache lacks {_missing(error)} of {name}. A result will lack it as well.")
    return Path(folder)


def _missing(error: Exception) -> str | None:
    """The files missing from a complete folder, if the cache knows them."""
    found = re.search(r"are missing \((.*?)\)\.", str(error))
    return None if found is None else found[1]


def _whole_commit(name: str, revision: str | None) -> str | None:
    """``revision``; the full commit when it is the beginning of one in the cache."""
    if revision is None or not re.fullmatch("[0-9a-f]{4,39}", revision):
        return revision
    kept = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    commits = [path.name for path in (kept / "snapshots").glob(f"{revision}*")]
    return commits[0] if len(commits) == 1 and not (kept / "refs" / revision).exists() else revision


def _refusal(name: str, revision: str | None, error: Exception) -> ModelError | None:
    """The error when the hub refuses this model; None when another attempt may succeed."""
    site, causes = constants.ENDPOINT, list(_causes(error))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ModelError(f"{name} is gated: accept its licence on {site}/{name}, then `hf auth login`.")
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return ModelError(f"{name} has no revision {revision!r} on {site}.")
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return ModelError(
            f"There is no folder {name} here and no model {name} on {site} (or it is private: `hf auth login`). "
            f"Built-in models: {', '.join(BUILT_IN)}."
        )
    return None


def _broken_off(name: str, error: Exception) -> ModelError:
    """The error when a download has begun and failed."""
    site, cache, status = constants.ENDPOINT, constants.HF_HUB_CACHE, _status(error)
    numbers = {cause.errno for cause in _causes(error) if isinstance(cause, OSError)}
    words = " ".join(str(cause) for cause in _causes(error))
    if numbers & {errno.ENOSPC, errno.EDQUOT, errno.EFBIG} or "No space left" in words:
        return ModelError(
            f"The disk is full: {name} does not fit into the hub's cache, {cache}. Free some space, or name another "
            "folder with the environment variable HF_HOME."
        )
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return ModelError(
            f"The hub's cache, {cache}, cannot be written. Change its permissions, or name another folder with the "
            "environment variable HF_HOME."
        )
    if status == 401:
        return ModelError(f"{site} does not serve the files of {name} (401). Log in: `hf auth login`.")
    if status == 403:
        return ModelError(
            f"{site} does not serve the files of {name} (403). Accept its licence on {site}/{name} if it has one. `hf "
            "auth whoami` shows whether you are logged in with an account that may read it."
        )
    if status == 429:
        return ModelError(
            f"{site} has had too many requests from here (429) to serve {name}. Wait some minutes and try again. `hf "
            "auth login` raises the limit."
        )
    if status is not None:
        return ModelError(f"{site} fails to serve {name} ({status}): {first_line(error)}. Try again later.")
    return ModelError(
        f"The download of {name} from {site} broke off ({first_line(error)}). Try again: the download is resumed."
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, from the last to the first."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Exception) -> int | None:
    """The status code of the hub's answer, if there was one."""
    for cause in _causes(error):
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            return int(cause.response.status_code)
    return None
