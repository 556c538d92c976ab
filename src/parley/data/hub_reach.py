"""Whether the hub can be reached, asked once before datasets asks it again and again for most of a minute."""

from __future__ import annotations

from datasets import config as datasets_config
from datasets.naming import camelcase_to_snakecase
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from parley.errors import DataError
from parley.library_compat.huggingface_hub import HTTPError

TIMEOUT = 10.0  # seconds
UNREACHABLE = "no such file or folder here, and the hub cannot be reached; check the name or the network"


def check_hub_reached(source: str) -> None:
    """Raises DataError where the hub does not answer and no earlier download of the data set `source` is here."""
    owner, slash, name = source.rpartition("/")
    cached = f"{owner}{slash and '___'}{camelcase_to_snakecase(name)}"  # as datasets names its folder
    if (datasets_config.HF_DATASETS_CACHE / cached).is_dir():
        return
    try:
        HfApi().dataset_info(source, timeout=TIMEOUT)
    except (HfHubHTTPError, OfflineModeIsEnabled):
        return  # load_dataset says it in more detail, and at once
    except HTTPError:
        raise DataError(f"{source}: {UNREACHABLE}") from None
