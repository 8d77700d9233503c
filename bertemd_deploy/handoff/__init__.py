"""Hand-offs: an artifact as a ready folder for Triton, for Node, as an HTTP service in a container, as one Python file.

In: an artifact. Out: a bundle, a folder that needs nothing of this package, complete or not there at all. Each kind has a
module here (`triton`, `node`, `fastapi`, `python`) and a folder of templates: real files, of which only README.md, config.pbtxt
and requirements.txt have places to fill, with numbers, names and versions that were checked. Labels and whatever else an
artifact brings go into JSON files beside the code, never into code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bertemd_deploy import __version__
from bertemd_deploy.artifact import MANIFEST, Artifact
from bertemd_deploy.errors import ArtifactError, RecipeError
from bertemd_deploy.files import new_bundle, read_json, sha256_file, write_json
from bertemd_deploy.handoff import fastapi, node, python, triton

BUNDLE = "bundle.json"
SCHEMA_VERSION = 1
# Each writes its files into an empty folder and returns the name of the graph that it took.
WRITERS: dict[str, Callable[[Artifact, Path], str]] = {
    "triton": triton.write,
    "onnxruntime-node": node.write,
    "fastapi-docker": fastapi.write,
    "python": python.write,
}


def write_bundle(artifact: Path, *, kind: str, out: Path, force: bool = False) -> Path:
    """Write a bundle and return its folder.

    Args:
        artifact: the folder `bertemd export` wrote.
        kind: a key of `WRITERS`.
        out: a new or empty folder.
        force: replace a bundle that is there; into a folder of other things the files are put beside them.

    Raises:
        RecipeError: there is no such kind.
        ArtifactError: the artifact is damaged, the kind cannot take its task or run its graphs, or `out` holds something,
            holds the artifact, or cannot be written.
    """
    if kind not in WRITERS:
        raise RecipeError(f"there is no bundle for {kind!r}; bundles are for {', '.join(WRITERS)}.")
    loaded = Artifact.load(artifact)
    with new_bundle(out, listing=BUNDLE, listed=_listed, sources={"artifact": artifact}, force=force) as folder:
        graph = WRITERS[kind](loaded, folder)
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        about = {
            "schema_version": SCHEMA_VERSION,
            "kind": kind,
            "graph": graph,
            "bertemd": __version__,
            "artifact": {"manifest_sha256": sha256_file(artifact / MANIFEST)},
            "files": {name: sha256_file(folder / name) for name in names},
        }
        write_json(folder / BUNDLE, about)
    return out


def _listed(path: Path) -> set[str]:
    """Return the names of the files of an earlier bundle."""
    try:
        files = read_json(path, what="bundle's list of files").get("files")
    except ArtifactError:  # of a damaged one every file is kept
        return set()
    return set(files) if isinstance(files, dict) else set()
