"""Sends a converted model to the Hugging Face hub, through the hub's own client."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from instructblip.errors import UserError

_DENIED = (401, 403)


def check_push(repository: str, *, replace: bool) -> None:
    """Before a long conversion: whether the hub would take it.

    Args:
        repository: `USER/NAME`.
        replace: whether a repository of that name may be there already.

    Raises:
        UserError: no such name, no token, no answer, or the repository exists.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _refusals(repository):
        api.whoami()
        exists = api.repo_exists(repository)
    if exists and not replace:
        raise UserError(f"the hub has a {repository} already; choose another name, or give --overwrite")


def push(folder: Path, repository: str, *, public: bool) -> str:
    """Make the repository, private unless it is to be `public`, and send the folder as one commit; return its address.

    Files of an earlier commit that the folder has not are removed. One that exists keeps who may see it.

    Raises:
        UserError: the hub refuses, or does not answer.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _refusals(repository):
        address = str(api.create_repo(repository, private=not public, exist_ok=True))
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message=f"Upload {folder.name}", delete_patterns="*"
        )
    return address


@contextlib.contextmanager
def _refusals(repository: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError:
        raise UserError(f"--push {repository} is no name of the hub; give USER/NAME") from None
    except LocalTokenNotFoundError:
        raise UserError("the hub knows no token of yours; run `hf auth login`, or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in _DENIED:
            raise UserError(
                f"the hub refuses the token for {repository} (status {status}); take one that may write there: "
                "`hf auth login`, or HF_TOKEN"
            ) from None
        raise UserError(f"the hub refuses {repository} (status {status}: {_line(error)}); try again later") from None
    except Exception as error:  # a connection that breaks half-way is an error of whichever httpx the client uses
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        raise UserError(
            f"the hub does not answer for {repository} ({type(error).__name__}); check the connection, and HF_HUB_OFFLINE"
        ) from None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
