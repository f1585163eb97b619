"""Pushing what was trained to the Hub, and an adapter back from it, through huggingface_hub."""

import functools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..base.errors import FileError, HotLoraError
from ..base.files import read_json, visible_files
from .connection import unreachable

_CONFIGS = ("adapter_config.json", "config.json")
_OF_AN_ADAPTER = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
_MERGED = "hotlora_merged"  # of a config: the adapters that were merged into the model (`adapter.on_top_of`)


def check_push(name: str) -> None:
    """HotLoraError where `push` would be refused: a name that cannot be, no token or one that only reads, somebody
    else's namespace, no way to the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise HotLoraError(
            f"{name!r} cannot name a repository on the Hub: give NAME or OWNER/NAME, of letters, digits, - _ and ."
        ) from error
    token = get_token()
    if token is None:
        raise HotLoraError(f"to push to {name}, there is no token: hf auth login, or HF_TOKEN in the environment.")
    try:
        user = _user(token, huggingface_hub.constants.ENDPOINT)
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise HotLoraError(f"to push to {name}: the Hub does not know the token; make a new one.") from error
        raise _no_hub(name, error) from error
    except Exception as error:  # of the connection, or of the offline mode
        raise _no_hub(name, error) from error
    owner, _, alone = name.rpartition("/")
    mine, others = user["name"], [org["name"] for org in user.get("orgs", ())]
    if owner and owner not in (mine, *others):
        of = f"an organisation of yours ({', '.join(others)})" if others else "an organisation of yours"
        raise HotLoraError(f"{owner} is neither you ({mine}) nor {of}: give {mine}/{alone}.")
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HotLoraError(f"to push to {name}: the token only reads; make one that writes.")


def push(path: str | os.PathLike[str], name: str, *, private: bool = True) -> str:
    """Pushes an adapter's or a model's folder, or that of a run, as one commit; returns the repository's address.

    Nothing of the run beside it is pushed, and paths of this machine in its config are left out.

    Args:
        name: NAME or OWNER/NAME; a repository that is there is added to.
        private: of a repository that is made now.

    Raises:
        HotLoraError: as `check_push`; the Hub refuses.
        FileError: nothing to push is there.
    """
    folder = _trained(Path(path).expanduser())
    check_push(name)
    files = visible_files(folder)
    _check_links(folder, files)
    operations = [CommitOperationAdd(file.relative_to(folder).as_posix(), _shared(file) or file) for file in files]
    api = HfApi(endpoint=huggingface_hub.constants.ENDPOINT)
    try:
        repo = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(repo.repo_id, operations, commit_message="Trained with hotlora")
    except Exception as error:  # of the connection, or of what the Hub allows
        raise HotLoraError(
            f"{folder} could not be pushed to {name} ({_reason(error)}). It is whole here; try again with: "
            + shlex.join(["hotlora", "push", str(path), name])
        ) from error
    return str(repo)


def can_be_on_hub(name: str) -> bool:
    """Whether this is the form of a repository's name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def adapter_on_hub(name: str) -> Path | None:
    """Where an adapter of the Hub lies here, in the Hub's cache, downloaded if need be; None: the name is of none, or
    the Hub cannot be asked."""
    if not can_be_on_hub(name):
        return None
    try:
        config = huggingface_hub.try_to_load_from_cache(name, _CONFIGS[0])
        if config is None and not unreachable():
            config = huggingface_hub.hf_hub_download(name, _CONFIGS[0])
        if not isinstance(config, str):  # a model: the cache knows that it has no such file
            return None
    except Exception:  # no such file, no connection: what takes it for a model tells
        return None
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_OF_AN_ADAPTER))
    except Exception as error:
        raise HotLoraError(
            f"the adapter {name} could not be downloaded ({_reason(error)}): hf download {name} --local-dir FOLDER, "
            "and give that."
        ) from error


def _trained(path: Path) -> Path:
    if (path / "base").is_dir() and (path / "adapter").is_dir():
        raise HotLoraError(
            f"{path} holds a base and an adapter that belong together: push {path}/base, {path}/adapter."
        )
    for folder in (path, path / "adapter", path / "model"):
        if any((folder / name).is_file() for name in _CONFIGS):
            return folder
    raise FileError(f"{path} holds no adapter or model to push: give a run's folder that has ended, or an adapter's.")


def _check_links(folder: Path, files: list[Path]) -> None:
    """FileError for a link that leads out of the folder, which may come from somebody else, but to the files of the
    Hub's own cache."""
    own = folder.resolve()
    for file in files:
        found = file.resolve()
        if not found.is_relative_to(own) and found.parent != own.parent.parent / "blobs":
            raise FileError(f"{file} is a link to {found}, which would be pushed: delete it, or copy the file there.")


def public_name(path: str) -> str:
    """What a file or folder may be called elsewhere: without where it lies; of the Hub's own cache, the model."""
    found = Path(path).expanduser().resolve()
    if found.parent.name == "snapshots" and found.parent.parent.name.startswith(("models--", "datasets--")):
        return found.parent.parent.name.partition("--")[2].replace("--", "/")
    return found.name


def _shared(file: Path) -> bytes | None:
    """A config without where things lie on this machine; None of other files."""
    if file.name not in _CONFIGS:
        return None
    config = read_json(file)
    if file.name == _CONFIGS[1]:
        if not isinstance(merged := config.get(_MERGED), list):
            return None
        config[_MERGED] = [{**entry, "path": None} for entry in merged if isinstance(entry, dict)]
        return json.dumps(config, indent=2).encode()
    base, below = config.get("base_model_name_or_path"), config.get("on_top_of")
    if isinstance(base, str) and os.path.exists(os.path.expanduser(base)):
        config["base_model_name_or_path"] = public_name(base)
    if isinstance(below, list):
        config["on_top_of"] = [{**entry, "path": None} for entry in below if isinstance(entry, dict)]
    return json.dumps(config, indent=2).encode()


@functools.cache
def _user(token: str, endpoint: str) -> dict[str, Any]:
    """Who the token is of: asked once, for the Hub answers few such questions."""
    found = HfApi(endpoint=endpoint).whoami(token)
    if not isinstance(found, dict) or "name" not in found:
        raise ValueError("its answer is none of the Hub's: is something in between, such as a login page?")
    return found


def _no_hub(name: str, error: Exception) -> HotLoraError:
    return HotLoraError(
        f"to push to {name}, the Hub cannot be asked ({_reason(error)}): try again where it can be; a run without "
        "--push-to-hub can be pushed later (hotlora push)."
    )


def _reason(error: Exception) -> str:
    text = " ".join(str(getattr(error, "server_message", None) or error).split())
    return text if len(text) <= 200 else f"{text[:197]}..."
