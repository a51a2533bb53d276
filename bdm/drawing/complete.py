"""Requests with nothing left open: every file found and known by its hash, every default said."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace

from ..errors import UserError
from ..formats.weights import resolve_folder
from ..shipped import find_path
from ..text.reader import read_prompt
from .library import DEFAULT_MODEL, Library
from .modes import with_defaults
from .request import FileRef, PluginUse, Request
from .samplers import named

#: Guidance scale of the shipped model, chosen by the sweep of configs/emoji/evaluate.yaml.
SHIPPED_GUIDANCE = 2.0
USUAL_GUIDANCE = 7.5


def complete(request: Request, library: Library, precision: str = "fp32") -> Request:
    """A request with nothing left open.

    Args:
        request: as somebody gave it.
        library: where its files are.
        precision: the usual one of the device.

    Raises:
        UserError: files that are not here, all of them named; an unknown sampler, mode or setting.
    """
    missing: list[str] = []
    model = _model(request.model, library, missing)
    plugins = _named([_located_plugin(plugin, library, missing) for plugin in _with_called(request, library)])
    branch = request.branch and _located(request.branch, "branch", library, missing)
    mode = with_defaults(request.mode)
    pictures = tuple((role, _located(file, _kind_of(role), library, missing)) for role, file in mode.pictures)
    beside = [replace(use, file=_located(use.file, "checkpoint", library, missing)) for use in request.beside]
    if missing:
        raise UserError(
            f"not here: {'; '.join(missing)}. Give the folders that hold them with --models, or put them"
            " beside the picture"
        )
    sampler, schedule = named(request.sampler, request.schedule)
    guidance = default_guidance(model) if request.guidance is None else float(request.guidance)
    return replace(
        request,
        model=model,
        branch=branch,
        plugins=plugins,
        mode=replace(mode, pictures=pictures),
        beside=tuple(beside),
        sampler=sampler,
        schedule=schedule,
        guidance=guidance,
        precision=request.precision or precision,
    )


def _kind_of(role: str) -> str:
    return role if role == "upscaler" else "picture"


def _with_called(request: Request, library: Library) -> list[PluginUse]:
    """The plug-ins of a request, and what its prompts call by name and the folders have."""
    plugins = list(request.plugins)
    if request.rules.emphasis != "a1111":
        return plugins
    names = {plugin.name or _stem(plugin) for plugin in plugins}
    for text in (request.prompt, request.prompt_en):
        for lora in read_prompt(text, full_width=text is request.prompt).loras:
            found = None if lora.name in names else library.listed(lora.name, "adapter")
            if found is not None:
                names.add(lora.name)
                file = FileRef.to(found)
                use = PluginUse(kind="adapter", file=file, name=lora.name, strength=lora.unet_strength)
                plugins.append(replace(use, text_strength=lora.text_strength))
    return [*plugins, *_called_embeddings(request, library, names)]


def _called_embeddings(request: Request, library: Library, names: Container[str]) -> Iterator[PluginUse]:
    """Embeddings whose names stand in the prompts, out of the folders that A1111 and ComfyUI keep them in.

    A picture that is drawn again had its own.
    """
    if request.versions.bdm:
        return
    said = " ".join((request.prompt, request.negative, request.prompt_en, request.negative_en)).lower()
    stems = [entry.path.stem for entry in library if entry.kind == "embedding"]
    for stem in dict.fromkeys(stems):
        if stem not in names and re.search(rf"(?<![a-z0-9_]){re.escape(stem.lower())}(?![a-z0-9_])", said):
            place = library.listed(stem, "embedding")
            assert place is not None
            yield PluginUse(kind="embedding", file=FileRef.to(place), name=stem)


def _model(file: FileRef | None, library: Library, missing: list[str]) -> FileRef:
    return library.model(None) if file is None else _located(file, "checkpoint", library, missing)


def _located(file: FileRef, kind: str, library: Library, missing: list[str]) -> FileRef:
    """A file with its place; one that is known by its hash alone and is not here is noted."""
    if file.source is not None or not file.hash:
        return library.located(file, kind)
    try:
        return library.located(file, kind)
    except UserError as error:
        missing.append(str(error))
        return file


def _located_plugin(plugin: PluginUse, library: Library, missing: list[str]) -> PluginUse:
    file = _located(plugin.file, plugin.kind, library, missing)
    picture = plugin.picture and _located(plugin.picture, "picture", library, missing)
    encoder = plugin.encoder and _located(plugin.encoder, "image_encoder", library, missing)
    text = plugin.strength if plugin.text_strength is None else plugin.text_strength
    text = text if plugin.kind == "adapter" else None
    return replace(plugin, file=file, picture=picture, encoder=encoder, text_strength=text)


def _named(plugins: Sequence[PluginUse]) -> tuple[PluginUse, ...]:
    """Each with a name of its own; an embedding's is its trigger word, so it has the first choice."""
    taken = {plugin.name for plugin in plugins if plugin.name}
    names: dict[int, str] = {}
    order = sorted(range(len(plugins)), key=lambda i: plugins[i].kind != "embedding")
    for i in order:
        names[i] = plugins[i].name or _free(_stem(plugins[i]), taken)
        taken.add(names[i])
    return tuple(replace(plugin, name=names[i]) for i, plugin in enumerate(plugins))


def _stem(plugin: PluginUse) -> str:
    source = plugin.file.source
    is_file = source is None or source.is_file()
    return plugin.file.name.rpartition(".")[0] or plugin.file.name if is_file else plugin.file.name


def _free(stem: str, taken: set[str]) -> str:
    """A stem, numbered where it is taken: many files are called model.safetensors."""
    number, name = 2, stem
    while name in taken:
        number, name = number + 1, f"{stem}-{number}"
    return name


def default_guidance(model: FileRef | str) -> float:
    """Guidance scale of the shipped model, however its path is written, or Stable Diffusion's usual one."""
    place = find_path(model) if isinstance(model, str) else model.source
    if isinstance(model, FileRef) and place is None:
        place = resolve_folder(model.name)
    return SHIPPED_GUIDANCE if place and place.resolve() == DEFAULT_MODEL.resolve() else USUAL_GUIDANCE
