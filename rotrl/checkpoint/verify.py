"""Is a merged checkpoint what was written? Bytes against the manifest, headers against the index, finite values."""

from pathlib import Path

from rotrl.checkpoint.files import file_sha256
from rotrl.checkpoint.model_config import of_text
from rotrl.checkpoint.reader import Checkpoint, named, open_checkpoint
from rotrl.checkpoint.writer import MANIFEST, sealed_manifest, shard_fault
from rotrl.errors import CheckpointError


def verify(folder: Path) -> dict:
    """The manifest of a sound folder; CheckpointError lists every file that is absent, extra or changed."""
    folder = Path(folder)
    manifest = _manifest(folder)
    listed = manifest["files"]
    problems = []
    for name, entry in listed.items():
        file = folder / name
        if not file.is_file():
            problems.append(f"'{name}' is absent")
        elif file.stat().st_size != entry["bytes"]:
            problems.append(f"'{name}' has {file.stat().st_size} bytes, {entry['bytes']} were written")
        elif "blake3" in entry:
            problems += [f"'{name}': {fault}"] if (fault := shard_fault(file, entry)) else []
        elif file_sha256(file) != entry["sha256"]:
            problems.append(f"'{name}' has other bytes than were written")
    extra = sorted(file.name for file in folder.iterdir() if file.name not in {*listed, MANIFEST})
    problems += [f"'{name}' is not in the manifest" for name in extra]
    if problems:
        raise CheckpointError(f"{folder}: {'; '.join(problems)}; make the merge again with overwrite=true")
    checkpoint = open_checkpoint(folder)
    _check_vocabulary(checkpoint)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    if checkpoint.sha256 != manifest["weights_sha256"]:
        raise CheckpointError(f"{folder}: the weights are not those of {MANIFEST}; make the merge again")
    return manifest


def _check_vocabulary(checkpoint: Checkpoint) -> None:
    """Rows of embedding and head against config.json: engines trust one or the other."""
    expected = of_text(checkpoint.config).get("vocab_size")
    for module in ("embedding", "head"):
        name = named(checkpoint, module)
        if name and expected not in (None, rows := checkpoint.tensors[name].shape[0]):
            raise CheckpointError(
                f"{checkpoint.tensors[name].file}: tensor '{name}' has {rows} rows, config.json says vocab_size "
                f"{expected}; make the merge again"
            )


def _manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: folder does not exist; give a merged checkpoint")
    try:
        manifest = sealed_manifest(folder)
        if manifest is None:
            raise CheckpointError(f"{path}: has other bytes than were written; make the merge again")
        if all("bytes" in entry and entry.keys() & {"sha256", "blake3"} for entry in manifest["files"].values()):
            return {**manifest, "weights_sha256": manifest["weights_sha256"]}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: does not exist; only checkpoints that rotrl wrote can be verified") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable as a manifest ({error}); make the merge again") from error
    raise CheckpointError(f"{path}: entries lack bytes or digests; make the merge again")
