"""A folder of adapters as a registry: names with versions and tags; publishing is atomic, rolling back one rename.

names.py      how names, tags and versions are written
content.py    what an adapter says, and its hash
state.py      what a name means now, in one small file
versions.py   one version on disk
lookup.py     from what was asked for to what lies there
locks.py      locks between processes; scratch folders
store.py      publish, resolve, roll back, tag, remove, clean up
garbage.py    what nobody needs
listing.py    what lies there, with a diagnosis of each
locate.py     a path or a name → a folder
"""

from .garbage import Garbage
from .listing import Entry
from .locate import default_store, locate_adapter
from .names import Reference, check_name, check_tag, label_of, parse_reference, shown
from .store import Store
from .versions import About, Version, verify

__all__ = [
    "About",
    "Entry",
    "Garbage",
    "Reference",
    "Store",
    "Version",
    "check_name",
    "check_tag",
    "default_store",
    "label_of",
    "locate_adapter",
    "parse_reference",
    "shown",
    "verify",
]
