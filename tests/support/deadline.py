"""How long tests wait: for ever, almost. A test that passes does not wait, so patience costs failures alone.

These are the harness's, for a guest that is emulated on a host that is busy. What the product promises (to
end within a few seconds, say) stands in the test of the promise, which takes it by a `watch.Watch`.
"""

from __future__ import annotations

import os
from typing import Final

BOOT_S: Final = float(os.environ.get("CLOUDVMM_TEST_BOOT_S", "240"))  # until a guest that boots answers
GUEST_S: Final = 120.0  # what a guest does: a script, a driver that finds its device
HOST_S: Final = 60.0  # what a process of the host does: it starts, listens, ends, is gone
