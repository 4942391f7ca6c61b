"""Sending files to a model repository of the Hugging Face Hub. No torch.

The endpoint, the token and the proxies are those of huggingface_hub: HF_ENDPOINT, HF_TOKEN or `hf auth login`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger("vitfreeze")


class HubError(ValueError):
    """Files could not be sent; the message says why, and what to do."""


def push_files(files: Mapping[str, Path | bytes], *, repo: str, message: str, private: bool = False) -> str:
    """Commit files, by their names in the repository, to a model repository, which is made if it is not there.

    Args:
        files: what to send: the file at a path, or content.
        repo: 'owner/name'.
        message: of the commit.
        private: whether a repository that is made is seen by its owner alone.

    Returns:
        The address of the repository.

    Raises:
        HubError: a name that the Hub does not allow, no token, no connection, or an answer that is no consent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
    from huggingface_hub.utils import disable_progress_bars, validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        rule = str(error).partition(f": '{repo}'")[0].rstrip(".")
        raise HubError(f"{repo!r} is no name of a repository on the Hub, owner/name: {rule}") from None
    if "/" not in repo:
        raise HubError(f"{repo!r} does not say whose repository it is: owner/name")
    if get_token() is None:
        raise HubError("there is no token for the Hugging Face Hub: `hf auth login` stores one, or set HF_TOKEN")
    disable_progress_bars()
    api = HfApi(library_name="vitfreeze")
    operations = [
        CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in files.items()
    ]
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        logger.info("sending %d files to %s", len(files), url)
        api.create_commit(repo, operations, commit_message=message)
    except HfHubHTTPError as error:
        said = error.server_message or f"{error.response.status_code} {error.response.reason_phrase}"
        raise HubError(f"{api.endpoint} refused {repo}: {' '.join(said.split())}") from None
    except (HTTPError, OSError, RuntimeError) as error:  # an upload's own error is the cause of a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise HubError(f"{api.endpoint} cannot be reached: {' '.join(str(cause).split())}") from None
    return str(url)
