"""The default guest: a small Linux for demos and tests, built from Debian's packages on first use.

`build` makes it, `locate` finds it, `GuestShell` (in `cloudvmm.guest.shell`) runs commands inside
it. What a VM is and how it is run is not known here.
"""

from cloudvmm.guest.builder import build
from cloudvmm.guest.cache import Guest, locate
from cloudvmm.guest.error import GuestBuildError, GuestError, GuestNotBuilt

# The kernel command line with which the guest boots fastest without KVM: no probing for hardware
# that an emulated machine lacks, no self-tests, no mitigations for speculation that never happens.
FAST_CMDLINE = (
    "console=ttyS0 quiet no_timer_check noreplace-smp tsc=reliable nokaslr mitigations=off "
    "cryptomgr.notests rcupdate.rcu_expedited=1 8250.nr_uarts=2 reboot=k panic=-1"
)

__all__ = ["FAST_CMDLINE", "Guest", "GuestBuildError", "GuestError", "GuestNotBuilt", "build", "locate"]
