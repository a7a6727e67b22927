"""The KVM lane: an emulated outer machine with a working /dev/kvm, in which tests run. No test lives here."""
