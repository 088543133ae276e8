"""Upload the trained adapter to a hub."""

from __future__ import annotations

from pathlib import Path

from inlay.messages import AfterTrainingError, first_line
from inlay.models.hub import offline, why_offline


def claim_repository(repository: str) -> None:
    """Create the hub repository, or check that it can be written, before hours are spent."""
    from huggingface_hub import HfApi

    if offline():
        raise ValueError(f"push_to_hub: {repository} cannot be written: {why_offline()}")
    try:
        HfApi().create_repo(repository, exist_ok=True)
    except Exception as error:  # network, rights and names fail in many ways
        raise ValueError(f"push_to_hub: {repository} cannot be written: {first_line(error)}") from None


def upload_run(folder: Path, repository: str) -> None:
    """Upload a folder to the hub repository."""
    from huggingface_hub import HfApi

    try:
        HfApi().upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # network, rights and names fail in many ways, none of them worth losing the run for
        raise AfterTrainingError(
            f"upload to {repository} failed (the run is in {folder}): {first_line(error)}"
        ) from None
