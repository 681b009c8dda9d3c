"""On-policy rounds on SGLang servers: the student of a round is written, loaded by the servers, and decodes there."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator

from t3d.blocks.special_ids import SpecialIds
from t3d.decode.protocol import Engine
from t3d.models.fingerprint import weights_fingerprint
from t3d.models.loading import load_tokenizer

TIMEOUT = 1800.0  # seconds to wait for one answer


def serve(urls: Sequence[str], folder: Path, ids: SpecialIds, accelerator: Accelerator, max_active: int) -> Engine:
    """An engine on the servers, which have the student of ``folder`` then. All processes call it.

    Args:
        folder: a model folder that the servers see under the same path.
        max_active: most answers in flight to one server, over all processes.

    Raises:
        UserError: a server does not answer, or cannot load the folder.
    """
    from t3d.decode.sglang import HttpServer, SGLangEngine, Weights, push_weights

    version = weights_fingerprint(str(folder))
    if accelerator.is_main_process:
        push_weights(urls, folder, version, TIMEOUT)
    accelerator.wait_for_everyone()
    return SGLangEngine(
        lambda: [HttpServer(url, TIMEOUT) for url in urls],
        Weights(str(folder), version, push=True),
        mask_id=ids.mask_id,
        stop_ids=ids.stop_ids,
        words=len(load_tokenizer(str(folder), key="model.pretrained_model")),
        max_active=max(1, max_active // accelerator.num_processes),
    )
