"""A finished adapter on the Hugging Face Hub. Whether it may go there is asked before the run begins, so that nothing is lost."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub

from gatewise.errors import GatewiseError, reason_of


def check_upload(repository: str) -> None:
    """
    Raises:
        GatewiseError: the hub cannot be reached, does not know the user, or the user may not write there.
    """
    owner = repository.partition("/")[0]
    try:
        user = huggingface_hub.HfApi().whoami()
    except Exception as error:  # no token, one that is not valid, no network: the library raises many kinds
        why = reason_of(error) if huggingface_hub.get_token() else "there is no token"
        raise GatewiseError(
            f"push_to_hub is {repository}, but the hub does not say who you are ({why}): log in with `hf auth login`, go online "
            "or take the key out"
        ) from error
    owners = [user["name"], *(one["name"] for one in user.get("orgs", ()))]
    if owner not in owners:
        raise GatewiseError(
            f"push_to_hub is {repository}, but your token writes for {', '.join(owners)}: expected one of these names"
        )
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise GatewiseError(
            f"push_to_hub is {repository}, but your token may only read: log in with one that may write, `hf auth login`"
        )


def upload(adapter: Path, repository: str, private: bool, say: Callable[[str], None]) -> None:
    """Uploads an adapter's folder. What fails is said, with the command that does it later."""
    try:
        api = huggingface_hub.HfApi()
        where = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=adapter, commit_message="Trained with gatewise")
    except (Exception, KeyboardInterrupt) as error:
        later = f"hf upload {repository} {adapter}{' --private' if private else ''}"
        say(f"warning: the adapter could not be uploaded ({reason_of(error)}); the run is whole, and this uploads it: {later}")
    else:
        say(f"uploaded to {where}")
