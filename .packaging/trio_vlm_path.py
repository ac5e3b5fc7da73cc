"""Gives out trio-vlm's package under the name `trio`, also where the async library is installed.

Installed into site-packages and started by trio_vlm_path.pth, so it runs at every start of this
Python: it imports nothing new and works only when `trio` is looked for. Two cases: an editable
install or a checkout has our `trio/` in some directory of sys.path; a wheel has it in `_trio_vlm/`
beside this file, where no installer can mix it with the async library's files.
"""

import os
import sys
from _frozen_importlib_external import PathFinder  # importlib.machinery's, without importing that

PRIVATE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_trio_vlm")


class OursFirst:
    """Finder for the one name `trio`: the first directory that holds our package, not another's."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):  # type: ignore[no-untyped-def]
        if fullname != "trio":
            return None
        for entry in [*sys.path, PRIVATE]:
            # trio/_beside.py is in our package and in no other.
            if isinstance(entry, str) and os.path.isfile(os.path.join(entry, "trio", "_beside.py")):
                return PathFinder.find_spec(fullname, [entry])
        return None


sys.meta_path.insert(0, OursFirst)
